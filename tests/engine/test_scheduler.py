"""Scheduler, block manager and core on a fake device that checks every block it reads."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.errors import (
    ConfigError,
    DeviceMemoryError,
    EmptyPromptError,
    InvalidRequestError,
    PromptExceedsCacheError,
    PromptTooLongError,
    TokenOutOfVocabularyError,
)
from tests.engine.core_shapes import core_shapes
from tests.engine.fake_runner import VOCAB, add, check, expected_tokens, make_core, run, tokens_of

prompt_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)  # few values, so that prefixes repeat
requests = st.lists(
    st.tuples(prompt_tokens, st.integers(1, 24), st.booleans(), st.integers(0, 2)), min_size=1, max_size=12
)


@settings(max_examples=120)
@given(
    requests=requests,
    shape=core_shapes,
    arrivals=st.integers(0, 3),
)
def test_tokens_depend_on_the_request_alone(requests, shape, arrivals):
    """Not on the batch, the schedule mode, the chunk size, the prefix cache, preemption or when others arrive."""
    core = make_core(**shape)
    expected, got, waiting = {}, {}, list(enumerate(requests))
    while waiting or core.has_work:
        for i, (prompt, max_tokens, ignore_eos, seed) in waiting[: arrivals or len(waiting)]:
            params = add(core, str(i), prompt, max_tokens, ignore_eos=ignore_eos, seed=seed)
            expected[str(i)] = expected_tokens(prompt, params)
        del waiting[: arrivals or len(waiting)]
        for _, item in core.step():
            got.setdefault(item.request_id, []).extend(item.new_token_ids)
        check(core)
        for batch in core.runner.batches[-1:]:
            assert batch.num_tokens <= shape["max_num_batched_tokens"]
            if shape["schedule_mode"] == "two_phase":
                assert not (batch.decode and batch.prefill)
    assert got == expected
    assert core.block_manager.num_used_blocks == 0


@settings(max_examples=40)
@given(data=st.data(), mode=st.sampled_from(["two_phase", "mixed"]))
def test_a_request_added_again_with_its_outputs_goes_on_with_the_same_tokens(data, mode):
    prompt = data.draw(prompt_tokens)
    core = make_core(schedule_mode=mode)
    whole = expected_tokens(prompt, add(core, "a", prompt, 20))
    assert tokens_of(run(core)["a"]) == whole
    done = data.draw(st.integers(0, max(0, len(whole) - 1)))
    for other in (core, make_core(schedule_mode=mode)):  # with a warm prefix cache and in a fresh engine
        add(other, "b", prompt, 20, outputs=whole[:done])
        assert whole[:done] + tokens_of(run(other)["b"]) == whole


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_nothing_leaks_after_ten_thousand_random_operations(mode):
    rng = random.Random(0)
    core = make_core(num_blocks=40, schedule_mode=mode, max_num_seqs=6, max_num_batched_tokens=24)
    alive, expected, got = [], {}, {}
    for i in range(10_000):
        roll = rng.random()
        if roll < 0.2 and len(alive) < 20:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
            expected[str(i)] = expected_tokens(prompt, add(core, str(i), prompt, rng.randrange(1, 30)))
            alive.append(str(i))
        elif roll < 0.27 and alive:
            victim = rng.choice(alive)
            core.abort(victim)
            expected.pop(victim, None)
        else:
            for _, item in core.step():
                got.setdefault(item.request_id, []).extend(item.new_token_ids)
                if item.finish_reason:
                    assert got[item.request_id] == expected.pop(item.request_id)
        alive = [r for r in alive if r in core.scheduler.sequences]
        check(core)
    assert core.scheduler.num_preemptions > 0, "the cache was meant to be too small"
    for request_id in alive:
        core.abort(request_id)
    run(core)
    assert core.block_manager.num_used_blocks == 0
    assert core.scheduler.num_running == core.scheduler.num_waiting == 0
    assert sorted(core.scheduler.free_slots) == list(range(6))


def test_equal_prompts_in_one_step_share_blocks():
    core = make_core(block_size=4)
    prompt = list(range(10))  # two full blocks and a half
    add(core, "a", prompt)
    add(core, "b", prompt)
    core.step()
    a, b = core.scheduler.decoding
    assert a.block_table[:2] == b.block_table[:2] and a.block_table[2] != b.block_table[2]
    assert core.runner.num_computed_tokens == 10 + 2
    items = run(core)
    assert items["b"][0].num_cached_tokens == 8
    assert tokens_of(items["a"]) == tokens_of(items["b"])


def test_a_fully_cached_prompt_recomputes_one_token_and_does_not_store_it():
    core = make_core(block_size=4)
    prompt = list(range(8))
    add(core, "a", prompt)
    first = run(core)
    before = core.runner.num_computed_tokens
    add(core, "b", prompt, max_tokens=1)
    core.step()
    (chunk,) = core.runner.batches[-1].prefill
    assert (chunk.start, chunk.end, chunk.store_from) == (7, 8, 8)
    assert core.runner.num_computed_tokens - before == 1
    items = run(core)
    assert items["b"][0].num_cached_tokens == 7
    assert tokens_of(items["b"]) == tokens_of(first["a"])[:1]


def test_the_next_turn_of_a_conversation_finds_what_was_generated():
    core = make_core(block_size=4)
    add(core, "first", list(range(2, 8)), 11, ignore_eos=True)
    answer = tokens_of(run(core)["first"])
    prompt = [*range(2, 8), *answer, 9, 9]
    add(core, "second", prompt)
    assert run(core)["second"][0].num_cached_tokens == 16  # of 6 + 10 computed tokens; the last was never fed


def test_another_salt_shares_nothing():
    core = make_core(block_size=4)
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        add(core, request_id, list(range(9)), salt=salt)
        run_items = run(core)
        assert run_items[request_id][0].num_cached_tokens == (8 if request_id == "c" else 0)


def test_a_hash_collision_is_not_a_hit(monkeypatch):
    monkeypatch.setattr("nanovllm_bento.engine.block_manager.xxh3_128_digest", lambda data, seed: b"same for all")
    core = make_core(block_size=4)
    for request_id, prompt in (("a", [2] * 9), ("b", [3] * 9)):
        params = add(core, request_id, prompt)
        assert tokens_of(run(core)[request_id]) == expected_tokens(prompt, params)


def test_max_num_seqs_is_never_exceeded():
    core = make_core(max_num_seqs=3)
    for i in range(10):
        add(core, str(i), [i] * 5)
    while core.has_work:
        core.step()
        assert core.scheduler.num_running <= 3


@pytest.mark.parametrize("bound", [1, 3, 8])
def test_decode_waits_for_a_bounded_number_of_prefill_steps(bound):
    core = make_core(max_num_seqs=32, num_blocks=400, max_num_batched_tokens=32, max_consecutive_prefill_steps=bound)
    add(core, "old", [1, 2], 20, ignore_eos=True)
    core.step()
    for i in range(30):  # steady arrivals, each a whole step of prefill
        add(core, str(i), [2 + i] * 30, 1, ignore_eos=True)
    run(core)
    old_rows = [i for i, b in enumerate(core.runner.batches) if any(s.request_id == "old" for s in b.decode)]
    gaps = [b - a - 1 for a, b in itertools.pairwise(old_rows)]
    assert max(gaps) == bound


def test_mixed_mode_decodes_in_every_step():
    core = make_core(schedule_mode="mixed", max_num_batched_tokens=16)
    add(core, "old", [1, 2], 12, ignore_eos=True)
    core.step()
    add(core, "new", [5] * 60, 2)
    run(core)
    rows = [any(s.request_id == "old" for s in b.decode) for b in core.runner.batches[1:]]
    assert all(rows[:11])
    assert any(b.decode and b.prefill for b in core.runner.batches)


def test_the_newest_sequence_gives_way_and_comes_back_first():
    core = make_core(num_blocks=8, block_size=4, max_num_seqs=4, enable_prefix_caching=False)
    params = {r: add(core, r, [i + 2] * 8, 12, ignore_eos=True) for i, r in enumerate("abc")}
    preempted = []
    original = core.scheduler._preempt
    core.scheduler._preempt = lambda seq: (preempted.append(seq.request_id), original(seq))
    items = run(core)
    assert preempted and preempted[0] == "c" and "a" not in preempted
    for i, r in enumerate("abc"):
        assert tokens_of(items[r]) == expected_tokens([i + 2] * 8, params[r])


def test_priority_runs_first_and_is_preempted_last():
    core = make_core(scheduling_policy="priority", max_num_seqs=1)
    for request_id, priority in (("low", 5), ("lower", 9), ("high", -1)):
        add(core, request_id, [3, 4], 2, priority=priority, ignore_eos=True)
    order = [next(iter(items)) for items in _first_items(core)]
    assert list(dict.fromkeys(order)) == ["high", "low", "lower"]


def _first_items(core):
    while core.has_work:
        items = {item.request_id for _, item in core.step()}
        if items:
            yield items


def test_priority_is_refused_where_it_would_be_ignored():
    with pytest.raises(InvalidRequestError, match="scheduling_policy"):
        add(make_core(), "a", [1], priority=3)


def test_an_aborted_request_frees_its_blocks_within_one_step():
    core = make_core(max_num_batched_tokens=16)
    add(core, "decoding", [1, 2, 3], 30, ignore_eos=True)
    core.step()
    core.step()
    add(core, "in-prefill", [4] * 60)
    core.step()
    assert core.scheduler.prefilling
    for request_id in ("decoding", "in-prefill"):
        core.abort(request_id)
    assert core.step() == []
    assert core.block_manager.num_used_blocks == 0 and not core.has_work


def test_min_tokens_and_stop_tokens_end_where_they_should():
    core = make_core()
    params = add(core, "a", [2, 3], 20, stop_token_ids=list(range(2, VOCAB)))
    items = run(core)["a"]
    assert tokens_of(items) == expected_tokens([2, 3], params)
    last = items[-1]
    assert last.finish_reason == "stop"
    assert last.stop_reason == (None if last.new_token_ids == [1] else last.new_token_ids[0])


def test_length_ends_with_length_and_every_item_comes_in_order():
    core = make_core()
    add(core, "a", [2, 3], 7, ignore_eos=True)
    items = run(core)["a"]
    assert [item.finish_reason for item in items] == [None] * 6 + ["length"]


def test_an_ending_costs_one_wasted_row_at_most_and_none_when_it_was_foreseen():
    foreseen, unforeseen = make_core(), make_core()
    add(foreseen, "a", [2, 3], 6, ignore_eos=True)
    params = add(unforeseen, "a", [2, 3], 60)
    num_tokens = len(expected_tokens([2, 3], params))
    assert num_tokens < 60, "it was meant to end at an end-of-sequence token"
    run(foreseen)
    run(unforeseen)
    assert foreseen.runner.num_computed_tokens == 2 + 5  # the last token is never fed back
    assert unforeseen.runner.num_computed_tokens == 2 + num_tokens - 1 + 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "numbers"),
    [
        ([], 4, EmptyPromptError, ()),
        ([1] * 40, 4, PromptTooLongError, ("40", "40")),
        ([1] * 39, 1, None, ()),
        ([1, -1], 4, TokenOutOfVocabularyError, ("-1", "49")),
        ([1, VOCAB], 4, TokenOutOfVocabularyError, ("50", "49")),
    ],
)
def test_bad_prompts_are_refused_on_arrival_with_both_numbers(prompt, max_tokens, error, numbers):
    core = make_core(num_blocks=16, block_size=4, max_model_len=40)
    params = add(core, "good", [7, 7], 5, ignore_eos=True)
    if error is None:
        add(core, "edge", prompt, max_tokens)
    else:
        with pytest.raises(error) as caught:
            add(core, "bad", prompt, max_tokens)
        assert all(number in str(caught.value) for number in numbers)
    items = run(core)
    assert tokens_of(items["good"]) == expected_tokens([7, 7], params)


def test_a_request_larger_than_the_cache_is_refused_and_one_that_just_fits_runs():
    core = make_core(num_blocks=5, block_size=4, max_model_len=20)
    core.info = type(core.info)(
        **{**{f: getattr(core.info, f) for f in core.info.__struct_fields__}, "num_blocks": 5, "max_model_len": 100}
    )
    with pytest.raises(PromptExceedsCacheError, match=r"21.*20"):
        add(core, "too-long", [1] * 12, 10)
    add(core, "fits", [1] * 12, 9, ignore_eos=True)
    assert len(tokens_of(run(core)["fits"])) == 9


def test_the_same_request_id_is_refused_while_it_runs():
    core = make_core()
    add(core, "a", [1, 2])
    with pytest.raises(InvalidRequestError, match="running already"):
        add(core, "a", [1, 2])


def test_settings_that_would_starve_are_refused():
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig.create(env={}, model="fake", max_num_seqs=64, max_num_batched_tokens=32)


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_a_step_without_memory_ends_its_requests_and_leaves_nothing_to_find(mode, monkeypatch):
    core = make_core(schedule_mode=mode)
    launch, prompt = core.runner.launch, list(range(20))

    def no_room_for_the_prompt(batch):
        if any(chunk.seq.request_id == "large" for chunk in batch.prefill):
            raise DeviceMemoryError("no memory")
        return launch(batch)

    add(core, "first", [1, 2, 3], 30, ignore_eos=True)
    for _ in range(4):
        core.step()
    monkeypatch.setattr(core.runner, "launch", no_room_for_the_prompt)
    add(core, "large", prompt, 5)
    results = run(core)
    assert results["large"][-1].finish_reason == "error" and results["large"][-1].error == "no memory"
    # a decode row of the same step goes with it; in two_phase there is none
    assert results["first"][-1].finish_reason == ("length" if mode == "two_phase" else "error")
    monkeypatch.setattr(core.runner, "launch", launch)
    params = add(core, "again", prompt, 5)
    again = run(core)["again"]
    assert tokens_of(again) == expected_tokens(prompt, params) and again[0].num_cached_tokens == 0
    assert core.block_manager.num_used_blocks == 0


def test_what_a_request_with_invalid_logits_wrote_is_not_found_again(monkeypatch):
    core = make_core()
    prompt = list(range(20))
    launch = core.runner.launch

    def invalid(batch):
        flight = launch(batch)
        wait = flight.wait
        monkeypatch.setattr(flight, "wait", lambda: [-1 for _ in wait()])
        return flight

    monkeypatch.setattr(core.runner, "launch", invalid)
    add(core, "nan", prompt, 5)
    assert run(core)["nan"][-1].finish_reason == "error"
    monkeypatch.setattr(core.runner, "launch", launch)
    params = add(core, "again", prompt, 5)
    again = run(core)["again"]
    assert again[0].num_cached_tokens == 0 and tokens_of(again) == expected_tokens(prompt, params)


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_a_step_may_fail_at_any_time_and_leaves_nothing_behind(mode, monkeypatch):
    """Also where a sequence of the failed step turns out to have ended with the step before."""
    prompts, ended_before = [[1, 2, 3], [2, 2, 2, 2, 2], [3, 1]], 0
    for failing in range(1, 24):
        core = make_core(schedule_mode=mode, max_num_seqs=4)
        launch = core.runner.launch

        def fail_once(batch, launch=launch, failing=failing):
            if batch.step == failing:
                raise DeviceMemoryError("no memory")
            return launch(batch)

        monkeypatch.setattr(core.runner, "launch", fail_once)
        params = {str(i): add(core, str(i), prompt, 20, seed=i) for i, prompt in enumerate(prompts)}
        results = run(core)
        monkeypatch.setattr(core.runner, "launch", launch)
        core.check()
        assert core.block_manager.num_used_blocks == 0 and not core.scheduler.ended
        for name, items in results.items():
            whole = expected_tokens(prompts[int(name)], params[name])
            if items[-1].finish_reason == "error":
                assert tokens_of(items) == whole[: len(tokens_of(items))]
            else:
                assert tokens_of(items) == whole
                ended_before += items[-1].finish_reason == "stop"
                # the next turn reads what this one left in the cache
                longer = prompts[int(name)] + whole + [8]
                again = add(core, "again", longer, 3)
                assert tokens_of(run(core)["again"]) == expected_tokens(longer, again)
    assert ended_before


def test_end_of_sequence_ids_outside_the_vocabulary_are_left_out():
    runner = make_core().runner
    settings = EngineConfig.create(env={}, model="fake", block_size=runner.block_size)
    core = EngineCore(settings, runner, eos_token_ids=[-1, 1, VOCAB, VOCAB + 7])
    assert core.eos_token_ids == {1} and core.info.eos_token_ids == [1]
