"""Benchmarks: workloads are exactly what they are said to be, and results say where they come from."""

import json
import sys
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from nanovllm_bento.bench import environment, offline
from nanovllm_bento.bench.scheduler import bench_scheduler
from nanovllm_bento.bench.startup import engine_phases
from nanovllm_bento.bench.workloads import Workload, fixed_workload, seed_workload, shared_prefix_len


def test_seed_workload_of_256_sequences() -> None:
    workload = next(seed_workload(256))
    assert len(workload.prompts) == len(workload.output_lens) == 256
    assert workload.num_input_tokens == 142_827
    assert workload.num_output_tokens == 133_966
    assert workload.temperature == 0.6
    assert all(100 <= len(p) <= 1024 for p in workload.prompts)
    assert all(100 <= n <= 1024 for n in workload.output_lens)
    assert max(map(max, workload.prompts)) <= 10_000 and min(map(min, workload.prompts)) >= 0


def test_seed_workload_draws_in_the_stated_order() -> None:
    random = Random(0)
    length = random.randint(100, 1024)
    first = [random.randint(0, 10_000) for _ in range(length)]
    assert next(seed_workload(2)).prompts[0] == first


def test_repeats_draw_fresh_prompts_of_the_same_lengths() -> None:
    one, two, three = islice(seed_workload(4), 3)
    assert [len(p) for p in one.prompts] == [len(p) for p in two.prompts] == [len(p) for p in three.prompts]
    assert one.output_lens == two.output_lens == three.output_lens
    assert one.prompts != two.prompts != three.prompts
    assert next(seed_workload(4)).prompts == one.prompts


def test_fixed_workload() -> None:
    one, two = islice(fixed_workload(3, 5, 7), 2)
    assert [len(p) for p in one.prompts] == [5, 5, 5] and one.output_lens == [7, 7, 7]
    assert one.prompts != two.prompts
    assert (one.temperature, one.max_len) == (0.0, 12)


def test_shared_prefix_len() -> None:
    assert shared_prefix_len([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix_len([1], [1, 2]) == 1
    assert shared_prefix_len([], [1]) == 0


class Echo:
    """An engine that repeats each prompt's first token."""

    def __init__(self, name: str, missing: int = 0) -> None:
        self.name, self.missing = name, missing
        self.seen: list[list[list[int]]] = []

    def run(self, workload: Workload, *, show_progress: bool = False) -> list[list[int]]:
        self.seen.append(workload.prompts)
        return [[p[0]] * (n - self.missing) for p, n in zip(workload.prompts, workload.output_lens, strict=True)]


def test_engines_get_the_same_prompts_and_fresh_ones_each_repeat() -> None:
    a, b = Echo("a"), Echo("b")
    workload, timings = offline.measure([a, b], fixed_workload(2, 3, 4), repeat=3)
    assert a.seen == b.seen and len(a.seen) == 3
    assert a.seen[0] == workload.prompts != a.seen[1]
    assert [len(t.seconds) for t in timings] == [3, 3]
    compared = offline.compare(timings, workload)
    assert compared["greedy_agreement"] == {"b": 1.0}


def test_an_engine_that_yields_too_little_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="yielded 6 tokens where 8 were asked for"):
        offline.measure([Echo("a", missing=1)], fixed_workload(2, 3, 4), repeat=1)


def test_headline_is_against_the_faster_peer() -> None:
    workload = next(fixed_workload(1, 2, 4))
    tokens = [[1, 2, 3, 4]]
    timings = [
        offline.Timing("ours", [2.0, 1.0], tokens),
        offline.Timing("slow", [9.0, 8.0], tokens),
        offline.Timing("fast", [4.0, 3.0], [[1, 2, 9, 9]]),
    ]
    compared = offline.compare(timings, workload)
    assert (compared["fastest_peer"], compared["speedup"]) == ("fast", 3.0)
    assert compared["greedy_agreement"] == {"slow": 1.0, "fast": 0.5}
    assert timings[0].as_dict(4) == {"engine": "ours", "seconds": [2.0, 1.0], "tok_s_first": 2.0, "tok_s_best": 4.0}


def test_a_peer_needs_fixed_lengths() -> None:
    with pytest.raises(ValueError, match="peer"):
        offline.bench_offline("demo", peers=["float32"])
    with pytest.raises(ValueError, match="both"):
        offline.bench_offline("demo", input_len=3)


def test_environment_says_where_a_result_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/nanovllm-bento", "bench", "--json", str(tmp_path / "a b.json")])
    found = environment.environment()
    assert found["command"] == "nanovllm-bento bench --json 'a b.json'"
    assert found["packages"]["torch"] and found["cpu"]["cores"] >= 1 and found["cpu"]["model"]
    assert str(tmp_path) not in json.dumps(found)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "benchmarks" / "ring.py"
    script.parent.mkdir()
    script.touch()
    monkeypatch.setattr("sys.argv", [str(script), "--count", "3"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert environment.command_line() == "python benchmarks/ring.py --count 3"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="nanovllm_bento.bench.serve"))
    assert environment.command_line() == "python -m nanovllm_bento.bench.serve --count 3"


def test_result_is_written_with_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment.write_result({"a": 1}, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"a": 1}
    environment.write_result({"a": 1}, None)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_engine_phases_are_read_from_the_servers_log() -> None:
    log = "x\nINFO ready on cpu in float32: resolve_model 0.1 s, load_weights 1.5 s\nlater 3 s\n"
    assert engine_phases(log) == {"resolve_model": 0.1, "load_weights": 1.5}
    assert engine_phases("nothing") == {}


def test_scheduler_bench_runs() -> None:
    result = bench_scheduler(num_seqs=8, num_steps=50, prompt_len=128)
    assert result["step"]["samples"] == 50 and result["step"]["median_us"] > 0
    assert result["prefix_lookup"]["median_us"] > 0
    json.dumps(result)
