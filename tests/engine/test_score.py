"""Log-probabilities of given tokens: right whatever runs beside them, and what transformers says."""

import math
import random
from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.engine.messages import Add, OutputItem, pack_tokens
from nanovllm_bento.errors import (
    EmptyPromptError,
    InvalidRequestError,
    PromptExceedsCacheError,
    PromptTooLongError,
    TokenOutOfVocabularyError,
)
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.core_shapes import core_shapes
from tests.engine.fake_runner import (
    VOCAB,
    add,
    add_score,
    check,
    expected_scores,
    expected_tokens,
    make_core,
    next_token,
    run,
    tokens_of,
)
from tests.engine.tiny_engines import make_engine
from tests.engine.tiny_models import FAMILIES, load_reference, make_tiny

prompt_tokens = st.lists(st.integers(0, 3), min_size=2, max_size=40)  # few values, so that prefixes repeat
score_requests = st.tuples(st.just("score"), prompt_tokens, st.integers(1, 39))
generate_requests = st.tuples(st.just("generate"), prompt_tokens, st.integers(1, 24))


def scores_of(items: list[OutputItem]) -> tuple[list[float], list[bool]]:
    (item,) = items
    assert item.finish_reason == "stop" and item.new_token_ids == [] and item.scheduled_at > 0
    assert item.logprobs is not None and item.is_greedy is not None
    return item.logprobs, item.is_greedy


@settings(max_examples=120)
@given(
    requests=st.lists(st.one_of(score_requests, generate_requests), min_size=1, max_size=12),
    shape=core_shapes,
    arrivals=st.integers(0, 3),
)
def test_scores_and_tokens_depend_on_the_request_alone(requests, shape, arrivals):
    """Not on the batch, the mode, the chunk size, the prefix cache, preemption or when others arrive."""
    core = make_core(**shape)
    expected, got, waiting = {}, {}, list(enumerate(requests))
    while waiting or core.has_work:
        for i, (task, prompt, number) in waiting[: arrivals or len(waiting)]:
            if task == "score":
                num_scored = min(number, len(prompt) - 1)
                add_score(core, str(i), prompt, num_scored)
                expected[str(i)] = expected_scores(prompt, num_scored)
            else:
                expected[str(i)] = expected_tokens(prompt, add(core, str(i), prompt, number))
        del waiting[: arrivals or len(waiting)]
        for _, item in core.step():
            got.setdefault(item.request_id, []).append(item)
        check(core)
    for request_id, wanted in expected.items():
        items = got[request_id]
        assert (scores_of(items) if isinstance(wanted, tuple) else tokens_of(items)) == wanted
    assert core.block_manager.num_used_blocks == 0 and not core.scheduler.sequences


def test_only_the_rows_that_are_asked_for_are_scored_and_the_last_token_is_not_fed():
    core = make_core(max_num_batched_tokens=16)
    add_score(core, "a", [*range(2, 42)], 5)
    run(core)
    assert core.runner.num_computed_tokens == 39
    assert [sum(c.num_scored for c in batch.scored) for batch in core.runner.batches] == [0, 0, 5]
    assert not any(batch.sampled for batch in core.runner.batches)
    assert core.stats.generation_tokens == 0 and core.stats.prompt_tokens == 40


def test_the_prefix_cache_serves_the_context_but_no_scored_row():
    core = make_core(block_size=4)
    prompt = list(range(2, 22))
    add_score(core, "first", prompt, 3)
    cold = scores_of(run(core)["first"])
    before = core.runner.num_computed_tokens
    add_score(core, "again", prompt, 3)
    items = run(core)["again"]
    assert scores_of(items) == cold and items[0].num_cached_tokens == 16
    assert core.runner.num_computed_tokens - before == 3
    add_score(core, "more", prompt, 10)  # rows that lie in cached blocks are computed again, and not stored
    items = run(core)["more"]
    assert scores_of(items) == expected_scores(prompt, 10) and items[0].num_cached_tokens == 9


def test_many_continuations_of_one_context_compute_it_once():
    core = make_core(block_size=4, num_blocks=200, max_num_batched_tokens=64)
    context = list(range(2, 34))
    for i in range(4):
        add_score(core, str(i), [*context, 3 + i, 4], 2)
    results = run(core)
    assert core.runner.num_computed_tokens == 33 + 3 * 2
    for i in range(4):
        assert scores_of(results[str(i)]) == expected_scores([*context, 3 + i, 4], 2)


def test_a_score_that_is_preempted_amid_its_rows_goes_on_with_those_it_has():
    core = make_core(num_blocks=11, block_size=4, max_num_batched_tokens=8, max_num_seqs=3, schedule_mode="mixed")
    params = {r: add(core, r, [2, 3, 4], 12, ignore_eos=True) for r in "ab"}
    for _ in range(3):
        core.step()
    prompt = list(range(2, 24))
    add_score(core, "score", prompt, 20)
    preempted = []
    original = core.scheduler._preempt
    core.scheduler._preempt = lambda seq: (preempted.append((seq.request_id, len(seq.logprobs))), original(seq))
    results = run(core)
    assert any(r == "score" and num_scored for r, num_scored in preempted), "it was meant to be preempted"
    assert scores_of(results["score"]) == expected_scores(prompt, 20)
    for r in "ab":
        tokens = tokens_of(results[r])
        assert tokens == expected_tokens([2, 3, 4], params[r])[-len(tokens) :]


def test_greedy_tokens_are_told():
    core = make_core()
    context = [5, 6, 7]
    greedy = next_token(context)
    add_score(core, "greedy", [*context, greedy], 1)
    add_score(core, "other", [*context, (greedy + 1) % VOCAB], 1)
    results = run(core)
    assert scores_of(results["greedy"])[1] == [True] and scores_of(results["other"])[1] == [False]


@pytest.mark.parametrize("steps", range(1, 5))
def test_an_aborted_score_frees_its_blocks_within_one_step(steps):
    core = make_core(max_num_batched_tokens=16)
    add_score(core, "a", [2] * 40, 30)
    for _ in range(steps):
        core.step()
    core.abort("a")
    assert core.step() == [] and core.block_manager.num_used_blocks == 0 and not core.has_work


def test_what_cannot_be_scored_is_refused():
    core = make_core(num_blocks=16, block_size=4, max_model_len=40)
    for prompt, num_scored, error in [
        ([], 1, EmptyPromptError),
        ([1, 2], 0, EmptyPromptError),
        ([1, 2], 2, EmptyPromptError),
        ([1, 2], -1, EmptyPromptError),
        ([1, VOCAB], 1, TokenOutOfVocabularyError),
        ([1] * 42, 1, PromptTooLongError),
    ]:
        with pytest.raises(error):
            add_score(core, "bad", prompt, num_scored)
    info, core.info = core.info, msgspec.structs.replace(core.info, num_blocks=5)
    with pytest.raises(PromptExceedsCacheError):
        add_score(core, "bad", [1] * 22, 3)
    core.info = info
    outputs = Add("bad", pack_tokens([1, 2]), SamplingParams(seed=0), pack_tokens([3]), task="score", num_scored=1)
    for add_message in (
        outputs,
        Add("bad", pack_tokens([1, 2]), SamplingParams(seed=0), task="translate"),
        Add("bad", pack_tokens([1, 2]), SamplingParams(seed=0), num_scored=1),
        Add("bad", b"12345", SamplingParams(seed=0)),
    ):
        with pytest.raises(InvalidRequestError):
            core.add(add_message)
    assert not core.has_work
    add_score(core, "longest", [1] * 41, 40)
    assert scores_of(run(core)["longest"]) == expected_scores([1] * 41, 40)


def test_scores_that_are_not_numbers_are_an_error_and_leave_nothing_in_the_cache(monkeypatch):
    core = make_core()
    launch = core.runner.launch

    def invalid(batch):
        flight = launch(batch)
        flight.scores[0].append(math.nan)
        monkeypatch.setattr(flight, "read_scores", lambda: ([math.nan] * 5, [False] * 5))
        return flight

    monkeypatch.setattr(core.runner, "launch", invalid)
    add_score(core, "nan", list(range(20)), 5)
    (item,) = run(core)["nan"]
    assert item.finish_reason == "error" and item.error_code == "engine_fault" and item.logprobs is None
    assert not core.block_manager.published and core.block_manager.num_used_blocks == 0


# -- a real model -----------------------------------------------------------------------------------------------------


def reference_scores(model, tokens: list[int], num_scored: int) -> tuple[list[float], list[bool]]:
    with torch.inference_mode():
        rows = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[-num_scored - 1 : -1]
    targets = torch.tensor(tokens[-num_scored:])
    return rows.gather(-1, targets[:, None])[:, 0].tolist(), (rows.argmax(-1) == targets).tolist()


def assert_scores_equal(found: tuple[list[float], list[bool]], wanted: tuple[list[float], list[bool]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    assert found[1] == wanted[1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_scores_equal_transformers(family, tmp_path):
    assert family in FAMILIES
    folder = make_tiny(family, tmp_path)
    reference, core = load_reference(folder), make_engine(folder, "cpu", max_num_batched_tokens=24)
    core.runner.score_rows = 7  # so that rows are split as those of a large vocabulary are
    rng = random.Random(0)
    with torch.inference_mode():
        greedy = reference.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)[0].tolist()
    prompts = [(greedy, 15)] + [([rng.randrange(3, 512) for _ in range(n)], k) for n, k in [(2, 1), (60, 59), (45, 4)]]
    for _ in range(2):  # with a cold and a warm prefix cache
        for i, (prompt, num_scored) in enumerate(prompts):
            add_score(core, str(i), prompt, num_scored)
        add(core, "beside", [9] * 30, 12, temperature=0.0, ignore_eos=True)
        results = run(core)
        for i, (prompt, num_scored) in enumerate(prompts):
            assert_scores_equal(scores_of(results[str(i)]), reference_scores(reference, prompt, num_scored))
    assert all(scores_of(results["0"])[1]), "greedy tokens are greedy"


def test_scores_of_a_model_do_not_depend_on_chunks_or_preemption(tmp_path):
    folder = make_tiny("qwen3", tmp_path)
    roomy = make_engine(folder, "cpu", enable_prefix_caching=False, num_gpu_blocks_override=256)
    prompts = [[3 + i, *range(3, 40 + 5 * i)] for i in range(4)]
    add_all = [(str(i), p, len(p) // 2) for i, p in enumerate(prompts)]
    expected = {}
    for request_id, prompt, num_scored in add_all:
        add_score(roomy, request_id, prompt, num_scored)
        expected[request_id] = scores_of(run(roomy)[request_id])
    for mode in ("two_phase", "mixed"):
        tight = make_engine(folder, "cpu", num_gpu_blocks_override=8, max_num_batched_tokens=24, schedule_mode=mode)
        add(tight, "beside", [7] * 20, 60, ignore_eos=True)
        for request_id, prompt, num_scored in add_all:
            add_score(tight, request_id, prompt, num_scored)
        results = run(tight)
        for request_id, wanted in expected.items():
            assert_scores_equal(scores_of(results[request_id]), wanted)
        assert tight.block_manager.num_used_blocks == 0
    assert all(a != b for a, b in pairwise(expected.values()))
