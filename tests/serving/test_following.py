"""A worker that starts beside an engine which serves already: requests wait for it, within bounds, instead of a 503."""

import asyncio
import json
import time

import pytest

from nanovllm_bento.serving import context as context_module
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.batch import BatchItem, run_batch
from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import FakeEngine, Visit

TEXT = "/v1/completions"


@pytest.fixture
def starting(engine: FakeEngine) -> FakeEngine:
    """An engine that serves, of which this worker has not heard."""
    engine.is_ready, engine.serves_others = False, True
    return engine


def visit(context: ServingContext, **body: object) -> Visit:
    return Visit(create_app(context), TEXT, {"prompt": "a", **body})


async def ended(visit: Visit) -> tuple[int | None, str | None]:
    """The status and, of an error, the code."""
    async with asyncio.timeout(5):
        await visit.task
    return visit.status, json.loads(visit.body)["error"]["code"] if visit.status != 200 else None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_until_its_worker_is_ready(
    context: ServingContext, starting: FakeEngine, stream: bool
) -> None:
    request = visit(context, stream=stream)
    await asyncio.sleep(0.1)
    assert not request.task.done() and request.status is None
    starting.is_ready = True
    assert await ended(request) == (200, None) and b"H" in request.body


async def test_it_does_not_wait_for_an_engine_that_starts(context: ServingContext, starting: FakeEngine) -> None:
    starting.serves_others = False
    began = time.monotonic()
    assert await ended(visit(context)) == (503, "engine_not_ready")
    assert time.monotonic() - began < 0.5


async def test_it_waits_so_long_and_no_longer(
    context: ServingContext, starting: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "_FOLLOW_SECONDS", 0.2)
    began = time.monotonic()
    assert await ended(visit(context)) == (503, "engine_not_ready")
    assert 0.2 <= time.monotonic() - began < 2


async def test_a_deadline_holds_while_it_waits(context: ServingContext, starting: FakeEngine) -> None:
    began = time.monotonic()
    assert await ended(visit(context, deadline_ms=200)) == (504, "deadline_exceeded")
    assert 0.2 <= time.monotonic() - began < 2


async def test_only_so_many_wait(
    context: ServingContext, starting: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "_MAX_FOLLOWING", 2)
    waiting = [visit(context) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert await ended(visit(context)) == (503, "engine_not_ready")
    await waiting[0].leave()  # makes room
    another = visit(context)
    await asyncio.sleep(0.05)
    starting.is_ready = True
    assert [await ended(request) for request in (waiting[1], another)] == [(200, None)] * 2


async def test_a_client_that_leaves_is_not_waited_for(context: ServingContext, starting: FakeEngine) -> None:
    request = visit(context)
    await asyncio.sleep(0.05)
    await request.leave()
    assert request.status == 499 and not starting.requests and context.num_open == 0


async def test_what_ends_the_start_ends_the_wait(context: ServingContext, starting: FakeEngine) -> None:
    request = visit(context)
    await asyncio.sleep(0.05)
    starting.failure = "It died too often."
    assert await ended(request) == (503, "engine_not_ready") and b"It died too often" in request.body
    starting.failure = None
    request = visit(context)
    await asyncio.sleep(0.05)
    context.admission.drain()
    assert await ended(request) == (503, "shutting_down")


async def test_a_malformed_request_is_told_at_once(context: ServingContext, starting: FakeEngine) -> None:
    status, _ = await ended(visit(context, temperature="hot"))
    assert status == 400


async def test_items_of_batches_wait_too(context: ServingContext, starting: FakeEngine) -> None:
    batch = asyncio.create_task(run_batch(context, [BatchItem(prompt="a"), BatchItem(prompt="b")]))
    await asyncio.sleep(0.1)
    assert not batch.done()
    starting.is_ready = True
    assert [result.text for result in await batch] == ["Hello, world!"] * 2
