"""What the load generator sends: lengths, arrivals, traces and conversations are as asked for, and always the same."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nanovllm_bento.bench.serve_client import Bodies, transcript
from nanovllm_bento.bench.serve_options import LoadOptions, RunShape
from nanovllm_bento.bench.serve_processes import plans, request_head
from nanovllm_bento.bench.serve_workload import Spool, Work, arrivals, make_work
from nanovllm_bento.errors import ConfigError

SHAPE = RunShape(8, None, 4)


def bodies(work: Work) -> list[dict[str, Any]]:
    return [json.loads(item.body) for item in work.items]


def work(shape: RunShape = SHAPE, stream: int = 0, **options: Any) -> Work:
    return make_work(LoadOptions.create(**options), shape, "m", stream=stream)


def test_random_prompts_have_the_lengths_asked_for() -> None:
    made = bodies(
        work(random_input_len=100, random_output_len=10, random_range_ratio=0.5, random_prefix_len=7, ignore_eos=True)
    )
    assert len(made) == 8
    for body in made:
        assert 57 <= len(body["prompt"]) <= 157 and 5 <= body["max_tokens"] <= 15
        assert body["prompt"][:7] == made[0]["prompt"][:7] and body["prompt"][7:15] != [0] * 8
        assert body["ignore_eos"] is True and body["stream_options"] == {"include_usage": True}
        assert "temperature" not in body
    assert len({len(body["prompt"]) for body in made}) > 1
    assert len({tuple(body["prompt"][7:20]) for body in made}) == 8


def test_the_seed_decides_and_runs_share_no_prompt() -> None:
    assert bodies(work(seed=1)) == bodies(work(seed=1))
    assert bodies(work(seed=1)) != bodies(work(seed=2))
    first, second = bodies(work()), bodies(work(stream=1))
    assert not {tuple(b["prompt"][:8]) for b in first} & {tuple(b["prompt"][:8]) for b in second}


def test_ids_stay_below_the_vocabulary() -> None:
    assert max(max(b["prompt"]) for b in bodies(work(vocab_size=50))) < 50
    assert max(max(b["prompt"]) for b in bodies(work())) < 10_000


def test_chat_prompts_are_words() -> None:
    body = bodies(work(endpoint="chat", random_input_len=20, temperature=0.5, extra_body='{"top_p": 0.9}'))[0]
    assert len(body["messages"][0]["content"].split()) == 20
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)
    assert isinstance(bodies(work(prompt_form="text"))[0]["prompt"], str)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_arrivals_keep_the_rate_and_vary_as_asked(burstiness: float) -> None:
    times = arrivals(4000, 20.0, burstiness, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variation = sum((g - mean) ** 2 for g in gaps) / len(gaps) / mean**2
    assert times == sorted(times) and times[-1] == pytest.approx(200.0)
    assert variation == pytest.approx(1 / burstiness, rel=0.2)


def jsonl(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_keeps_its_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 3500, "input_length": 1100, "output_length": 6, "hash_ids": [1, 2, 9]},
        {"timestamp": 2000, "input_length": 3, "output_length": 1, "kind": "x"},
    )
    made = work(RunShape(None, None, None), dataset="trace", dataset_path=path, trace_speed=2.0)
    assert made.times == [0.0, 1.25, 0.5] and made.warnings == ["trace.jsonl: fields without a meaning here: kind"]
    a, b, c = bodies(made)
    assert [len(x["prompt"]) for x in (a, b, c)] == [1030, 1100, 3] and a["max_tokens"] == 5
    assert a["prompt"][:1024] == b["prompt"][:1024] and a["prompt"][1024:] != b["prompt"][1024:1030]
    assert work(SHAPE, dataset="trace", dataset_path=path).times is None  # the concurrency asked for holds


def test_a_trace_may_hold_the_prompts_themselves(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "hello", "output_len": 3}, {"prompt": [1, 2]}, {"prompt": "x"})
    made = bodies(work(RunShape(2, 1.0, None), dataset="trace", dataset_path=path, random_output_len=9))
    assert [(b["prompt"], b["max_tokens"]) for b in made] == [("hello", 3), ([1, 2], 9)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"output_length": 3}, "neither a prompt"),
        ({"prompt": "x"}, "timestamp"),
        ({"timestamp": 0, "input_length": -1}, "the input length is -1"),
        ({"timestamp": "now", "input_length": 1}, "timestamp='now'"),
        ({"timestamp": 0, "messages": []}, "--endpoint chat"),
        ([1], "JSON object"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused(tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        work(RunShape(None, None, None), dataset="trace", dataset_path=jsonl(tmp_path, line))


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"t\.jsonl"):
        work(dataset="trace", dataset_path=path)


def test_conversations_of_both_known_forms(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "max_tokens": 7},
        {
            "conversations": [
                {"from": "human", "value": "b"},
                {"from": "gpt", "value": "x"},
                {"from": "human", "value": "c"},
            ]
        },
    )
    made = work(RunShape(None, None, 1), dataset="multi-turn", dataset_path=path, endpoint="chat")
    assert (made.num_items, made.num_requests, made.conversations) == (2, 3, True)
    first, second = bodies(made)
    assert first == {"system": "s", "turns": [{"text": "a", "max_tokens": 7}]}
    assert [turn["text"] for turn in second["turns"]] == ["b", "c"]
    with pytest.raises(ConfigError, match="line 1"):
        work(dataset="multi-turn", dataset_path=jsonl(tmp_path, {"text": "x"}), endpoint="chat")


def test_a_transcript_ends_where_the_assistant_begins() -> None:
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    assert transcript(said) == "S\n\nUser: u\n\nAssistant:"


def test_the_spool_gives_back_what_went_in() -> None:
    with tempfile.TemporaryFile() as file:
        Spool(work(random_input_len=3).items, file)
        found = Bodies(file.fileno(), 8)
        expected = list(work(random_input_len=3).items)
        assert [found[i] for i in range(8)] == [(item.body, item.max_tokens) for item in expected]


# -- options and how the work is shared --------------------------------------------------------------------------------


def dealt(**given: Any) -> list[Any]:
    options = LoadOptions.create(**given)
    made = make_work(options, options.runs[0], "m")
    return plans(options, options.runs[0], made, "m", spool_fd=0, tickets_fd=0)


def test_slots_and_times_are_shared_among_the_processes() -> None:
    assert [p.concurrency for p in dealt(max_concurrency="10", num_prompts="50", processes=4)] == [3, 3, 2, 2]
    assert len(dealt(max_concurrency="2", num_prompts="50", processes=4)) == 2
    timed = dealt(request_rate="5", num_prompts="9", processes=2)
    assert sorted(item for p in timed for _, item in p.schedule) == list(range(9))
    assert all(p.schedule == sorted(p.schedule) and p.concurrency is None for p in timed)
    assert all(at == 0.0 for p in dealt(num_prompts="4") for at, _ in p.schedule)


def test_headers_name_the_host_and_carry_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = LoadOptions.create(base_url="http://h:9/base/v1/", api_key="k", header=["X-A=b=c"])
    head = request_head(options).decode().split("\r\n")
    assert head[0] == "POST /base/v1/completions HTTP/1.1"
    assert {"Host: h:9", "Authorization: Bearer k", "X-A: b=c"} <= set(head)
    recorded = json.dumps(options.recorded())
    assert "b=c" not in recorded and '"k"' not in recorded and "k" not in repr(options).partition("api_key")[2][:5]


def test_lists_are_runs() -> None:
    runs = LoadOptions.create(max_concurrency="1,64", num_prompts="20,500").runs
    assert [(r.num_prompts, r.name) for r in runs] == [(20, "concurrency 1"), (500, "concurrency 64")]
    assert LoadOptions.create(request_rate="inf").runs == [RunShape(None, None, None)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_concurrency": "0"}, "max-concurrency"),
        ({"request_rate": "fast"}, "request-rate"),
        ({"request_rate": "1,2", "max_concurrency": "3,4"}, "not both"),
        ({"max_concurrency": "1,2", "num_prompts": "1,2,3"}, "3 numbers for 2 runs"),
        ({"goodput": "ttft"}, "goodput"),
        ({"goodput": "itl:5"}, "ttft, tpot, e2el"),
        ({"header": ["x"]}, "NAME=VALUE"),
        ({"extra_body": "[]"}, "JSON object"),
        ({"base_url": "localhost:1"}, "http://"),
        ({"dataset": "trace"}, "--dataset-path"),
        ({"dataset": "sharegpt"}, "dataset"),
        ({"endpoint": "chat", "prompt_form": "ids"}, "completions"),
        ({"stream": False, "goodput": "ttft:5"}, "e2el"),
        ({"random_range_ratio": 1.0}, "random-range-ratio"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoadOptions.create(**given)
