"""generate_batch and score: every item has its own fate, its own caller, and bounds that keep the others going."""

import asyncio

import pytest

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.serving.auth import Caller, current_caller
from nanovllm_bento.serving.batch import BatchGate, BatchItem, ScoreItem, max_latency_ms, run_batch, run_scores
from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import FakeEngine, make_context


async def test_items_run_side_by_side_and_keep_their_order(context: ServingContext, engine: FakeEngine) -> None:
    items = [
        BatchItem(prompt="a", sampling={"max_tokens": 2}),
        BatchItem(prompt_token_ids=[5, 6], sampling={"stop": ","}),
        BatchItem(prompt="b"),
    ]
    first, second, third = await run_batch(context, items)
    assert (first.text, first.finish_reason, first.token_ids) == ("He", "length", list(b"He"))
    assert (second.text, second.stop_reason) == ("Hello", ",")
    assert second.usage is not None and (second.usage.prompt_tokens, second.usage.completion_tokens) == (2, 6)
    assert third.text == "Hello, world!"
    assert engine.most_open == 3 and context.num_open == 0


async def test_a_bad_item_fails_alone(context: ServingContext) -> None:
    bad = [
        (BatchItem(), "prompt"),
        (BatchItem(prompt="a", prompt_token_ids=[1]), "prompt"),
        (BatchItem(prompt=""), "prompt"),
        (BatchItem(prompt="x" * 600), "prompt"),
        (BatchItem(prompt_token_ids=[999]), "prompt"),
        (BatchItem(prompt="a", sampling={"temperature": -1}), "temperature"),
        (BatchItem(prompt="a", sampling={"temperature": "hot"}), "temperature"),
        (BatchItem(prompt="a", sampling={"mood": 1}), "mood"),
        (BatchItem(prompt="a", sampling={"n": 2}), "n"),
        (BatchItem(prompt="a", sampling={"logit_bias": {"1": 1}}), "logit_bias"),
    ]
    results = await run_batch(context, [item for item, _ in bad] + [BatchItem(prompt="a")])
    assert [result.error and result.error.param for result in results] == [param for _, param in bad] + [None]
    assert results[-1].text == "Hello, world!"


async def test_a_dead_engine_is_told_for_each_item(context: ServingContext, engine: FakeEngine) -> None:
    engine.dies_after = 2
    good, dead = await run_batch(context, [BatchItem(prompt="a", sampling={"max_tokens": 1}), BatchItem(prompt="b")])
    assert good.error is None and dead.error is not None and dead.error.code == "engine_dead"


async def test_scores_come_in_order_with_their_tokens(context: ServingContext, engine: FakeEngine) -> None:
    items = [
        ScoreItem(context="abc", continuation="de"),
        ScoreItem(context_token_ids=[1, 2, 3], continuation_token_ids=[10, 21]),
        ScoreItem(context_token_ids=[1], continuation="d"),
        ScoreItem(context="a  ", continuation="b"),
    ]
    both, ids, mixed, spaces = await run_scores(context, items)
    assert both.token_ids == list(b"de") and both.logprobs == [-1.0, -1.01] and both.is_greedy == [True, False]
    assert both.sum_logprob == pytest.approx(-2.01)
    assert both.usage is not None and (both.usage.prompt_tokens, both.usage.completion_tokens) == (5, 0)
    assert both.usage.prompt_tokens_details.cached_tokens == 4
    assert (ids.token_ids, ids.logprobs) == ([10, 21], [-0.1, -0.21])
    assert mixed.token_ids == list(b"d")
    assert spaces.token_ids == list(b"  b"), "spaces between them belong to the continuation"
    assert context.num_open == 0 and not engine.aborted


async def test_a_score_that_cannot_be_fails_alone(context: ServingContext) -> None:
    bad = [
        (ScoreItem(), "context"),
        (ScoreItem(context="a"), "continuation"),
        (ScoreItem(continuation="a"), "context"),
        (ScoreItem(context="a", context_token_ids=[1], continuation="b"), "context"),
        (ScoreItem(context="a", continuation="b", continuation_token_ids=[1]), "continuation"),
        (ScoreItem(context="", continuation="b"), "context"),
        (ScoreItem(context="a", continuation=""), "continuation"),
        (ScoreItem(context_token_ids=[999], continuation_token_ids=[1]), "context"),
        (ScoreItem(context="x" * 600, continuation="b"), "context"),
    ]
    results = await run_scores(context, [item for item, _ in bad] + [ScoreItem(context="a", continuation="b")])
    assert [result.error and result.error.param for result in results] == [param for _, param in bad] + [None]
    assert results[-1].logprobs == [-0.98]


async def test_what_one_item_may_ask_for_is_bounded(engine: FakeEngine) -> None:
    context = make_context(engine, score_max_tokens=10, generate_batch_max_tokens=5)
    fits, too_long = await run_scores(
        context,
        [ScoreItem(context="a" * 8, continuation="bc"), ScoreItem(context="a" * 8, continuation="bcd")],
    )
    assert fits.error is None
    assert too_long.error is not None and too_long.error.code == "context_length_exceeded"
    assert "11" in too_long.error.message and "10" in too_long.error.message
    fits, too_many, open_end = await run_batch(
        context, [BatchItem(prompt="a", sampling={"max_tokens": n}) for n in (5, 6, None)]
    )
    assert fits.error is None and open_end.token_ids == fits.token_ids
    assert too_many.error is not None and too_many.error.param == "max_tokens" and "5" in too_many.error.message


async def test_a_batch_ends_in_time_with_what_is_done_by_then(engine: FakeEngine) -> None:
    context = make_context(engine, batch_max_seconds=0.2)
    done = await run_batch(context, [BatchItem(prompt="a")])
    engine.hold = asyncio.Event()
    late = await run_batch(context, [BatchItem(prompt="a")])
    late_score = await run_scores(context, [ScoreItem(context="a", continuation="b")])
    assert done[0].error is None
    for result in (late[0], late_score[0]):
        assert result.error is not None and result.error.code == "deadline_exceeded"
    assert len(engine.aborted) == 2 and not engine.open and context.num_open == 0


async def test_each_item_runs_for_the_caller_whose_request_it_came_in(
    context: ServingContext, engine: FakeEngine
) -> None:
    """BentoML runs a batch in a task of its own, where the current caller is somebody else."""

    def item_of(caller: Caller) -> tuple[ScoreItem, BatchItem]:
        token = current_caller.set(caller)
        try:
            return ScoreItem(context="a", continuation="b"), BatchItem(prompt="a", cache_salt="mine")
        finally:
            current_caller.reset(token)

    first, second = Caller("first", priority=3, cache_salt="s1"), Caller("second", priority=-2, cache_salt="s2")
    pairs = [item_of(first), item_of(second)]
    await run_scores(context, [score for score, _ in pairs])
    await run_batch(context, [batch for _, batch in pairs])
    assert list(engine.options.values()) == [
        (first.salt(None), 3),
        (second.salt(None), -2),
        (first.salt("mine"), 3),
        (second.salt("mine"), -2),
    ]


async def test_a_fault_of_one_item_does_not_fail_the_batch(
    context: ServingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = context.encode

    async def faulty(text: str, **options: object) -> list[int]:
        if text.startswith("poison"):
            raise ZeroDivisionError
        return await encode(text, **options)

    monkeypatch.setattr(context, "encode", faulty)
    items = [ScoreItem(context="poison", continuation="b"), ScoreItem(context="a", continuation="b")]
    poison, good = await run_scores(context, items)
    assert poison.error is not None and poison.error.code == "internal_error" and good.error is None


def test_bentoml_never_sheds_what_was_let_in() -> None:
    """Whatever line it fits to the batches it saw: none was longer than batch_max_seconds."""
    config = ServiceConfig.create(env={}, batch_max_seconds=30, batch_max_calls=100)
    assert max_latency_ms(config, None) >= 1000 * (100 * 30 + 30 + 100 * 30 / 2)
    assert max_latency_ms(config, 45_000) == 45_000
    with pytest.raises(ConfigError, match="score_max_latency_ms"):
        ServiceConfig.create(env={}, batch_max_seconds=30, score_max_latency_ms=29_000)


class _App:
    """Holds every call until it is told."""

    def __init__(self) -> None:
        self.calls = 0
        self.go_on = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        self.calls += 1
        await self.go_on.wait()


async def test_calls_beyond_the_bound_get_429_and_one_caller_cannot_have_all() -> None:
    app = _App()
    gate = BatchGate(app, max_calls=10)
    statuses: list[int] = []

    async def send(message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
            assert any(name == b"retry-after" for name, _ in message["headers"])

    async def call(path: str, name: str) -> None:
        current_caller.set(Caller(name))  # each call is a task, so each has its own
        await gate({"type": "http", "path": path}, None, send)  # type: ignore[arg-type]

    async def calls(number: int, path: str, name: str) -> int:
        """How many of them were let in."""
        before = app.calls
        tasks.extend(asyncio.create_task(call(path, name)) for _ in range(number))
        for _ in range(3):
            await asyncio.sleep(0)
        return app.calls - before

    tasks: list[asyncio.Task[None]] = []
    assert await calls(20, "/score", "greedy") == 8
    assert await calls(20, "/score", "other") == 2
    assert await calls(20, "/generate_batch", "") == 10, "without keys there is one bound for all"
    assert await calls(3, "/v1/models", "greedy") == 3
    assert statuses == [429] * 40
    app.go_on.set()
    await asyncio.gather(*tasks)
    assert not any(gate.open.values())
