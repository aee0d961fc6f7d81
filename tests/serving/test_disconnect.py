"""A request ends in the engine when its client leaves, at whatever moment that is."""

import asyncio

import pytest
from fastapi import FastAPI

from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import FakeEngine, Visit

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(
    app: FastAPI, engine: FakeEngine, context: ServingContext, stream: bool, n: int
) -> None:
    engine.hold = asyncio.Event()
    visit = Visit(app, CHAT, {**BODY, "stream": stream, "n": n})
    await engine.until(lambda: len(engine.open) == n)
    await visit.leave()
    assert not engine.open and len(engine.aborted) == n
    assert context.num_open == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(app: FastAPI, engine: FakeEngine, context: ServingContext, n: int) -> None:
    engine.endless = True
    engine.make_room()
    visit = Visit(app, CHAT, {**BODY, "stream": True, "n": n})
    await visit.until_text(b'"content":"w"')
    await visit.leave()
    assert not engine.open and len(engine.aborted) == n
    assert context.num_open == 0


async def test_in_the_middle_of_a_whole_answer(app: FastAPI, engine: FakeEngine, context: ServingContext) -> None:
    engine.endless = True
    engine.make_room()
    visit = Visit(app, CHAT, BODY)
    await engine.until(lambda: engine.open)
    await visit.leave()
    assert not engine.open and len(engine.aborted) == 1
    assert context.num_open == 0


async def test_the_server_cancels_the_handler(app: FastAPI, engine: FakeEngine, context: ServingContext) -> None:
    engine.hold = asyncio.Event()
    for stream in (False, True):
        visit = Visit(app, CHAT, {**BODY, "stream": stream})
        await engine.until(lambda: engine.open)
        visit.task.cancel()
        await asyncio.gather(visit.task, return_exceptions=True)
        assert not engine.open and context.num_open == 0


async def test_others_go_on(app: FastAPI, engine: FakeEngine) -> None:
    engine.hold = asyncio.Event()
    leaving, staying = (Visit(app, CHAT, {**BODY, "stream": True}) for _ in range(2))
    await engine.until(lambda: len(engine.open) == 2)
    await leaving.leave()
    engine.hold.set()
    await staying.task
    assert staying.body.endswith(b"data: [DONE]\n\n") and len(engine.aborted) == 1
