"""What stands between the server and the engine on the hot routes: layers, encodings, joined tokens, the end."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.engine.client import OutputBuffer, Pace
from nanovllm_bento.engine.messages import OutputItem
from nanovllm_bento.errors import DeadlineExceededError
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.front import Front
from nanovllm_bento.serving.middleware import middlewares
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints
from nanovllm_bento.serving.openai.protocol import ChatCompletion, TextCompletion
from nanovllm_bento.serving.pacing import INTERVAL, SHORTEST, AdaptivePace
from tests.serving.fakes import FakeEngine, Visit, events

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [(CHAT, {**BODY, "n": 2}, ChatCompletion), ("/v1/completions", {"prompt": ["a", "b"]}, TextCompletion)],
)
async def test_whole_answers_have_the_documented_shape(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], shape: type[BaseModel]
) -> None:
    answer = (await http.post(path, json=body)).json()
    assert shape.model_validate(answer, strict=True, extra="forbid").model_dump() == answer


# -- request ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_request_id_is_given_back(http: httpx.AsyncClient, stream: bool) -> None:
    answer = await http.post(CHAT, json={**BODY, "stream": stream}, headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    refused = await http.post(CHAT, json={"messages": []}, headers={"X-Request-ID": "mine-2"})
    assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine-2"


async def test_an_id_that_could_forge_a_log_line_is_replaced(http: httpx.AsyncClient) -> None:
    ids = set()
    for sent in ("a b", "x" * 500, None):
        answer = await http.post(CHAT, json=BODY, headers={"X-Request-ID": sent} if sent else {})
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 3 and all(name.isalnum() for name in ids)


# -- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_deadline_reaches_the_engine_as_a_time(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    before = time.time()
    await http.post(CHAT, json={**BODY, "deadline_ms": 60_000})
    await http.post(CHAT, json=BODY)
    first, second = engine.deadlines.values()
    assert first is not None and before + 59 < first < time.time() + 61
    assert second is None


async def test_an_expired_deadline_is_504(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fails_with = DeadlineExceededError("The request's deadline passed while it waited.")
    answer = await http.post(CHAT, json={**BODY, "deadline_ms": 1})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    for no_time in (0, 2**53 + 1, 10**400):
        assert (await http.post(CHAT, json={**BODY, "deadline_ms": no_time})).status_code == 400


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_draining_refuses_new_requests_and_lets_open_ones_finish(
    app: FastAPI, http: httpx.AsyncClient, engine: FakeEngine, context: ServingContext
) -> None:
    engine.hold = asyncio.Event()
    visit = Visit(app, CHAT, {**BODY, "stream": True})
    await engine.until(lambda: engine.open)
    drain = asyncio.create_task(context.drain(30))
    await asyncio.sleep(0)
    refused = await http.post(CHAT, json=BODY)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert refused.json()["error"]["code"] == "shutting_down"
    assert not context.is_ready and (await http.get("/health")).status_code == 503
    engine.hold.set()
    await asyncio.gather(visit.task, drain)
    assert events(visit.body.decode()) and engine.all_aborted is None


@pytest.mark.parametrize("stream", [False, True])
async def test_what_has_not_finished_in_the_grace_time_ends_with_an_error(
    app: FastAPI, engine: FakeEngine, context: ServingContext, stream: bool
) -> None:
    engine.endless = True
    engine.make_room()
    visit = Visit(app, CHAT, {**BODY, "stream": stream})
    if stream:
        await visit.until_text(b'"content":"w"')
    else:
        await engine.until(lambda: engine.open)
    await context.drain(0)
    await visit.task
    assert b"shutting down" in visit.body and b"[DONE]" not in visit.body
    assert visit.status == (200 if stream else 503)
    assert context.num_open == 0


# -- layers -----------------------------------------------------------------------------------------------------------


class _Counting:
    """A layer of a service's own application."""

    def __init__(self, app: Any, seen: list[str]) -> None:
        self.app, self.seen = app, seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.seen.append(scope["path"])
        await self.app(scope, receive, send)


async def service_like(context: ServingContext, *, in_front: bool, **settings: Any) -> tuple[Starlette, list[str]]:
    """An application built as BentoML builds its own: layers of its own, then added middlewares, then mounted apps."""
    seen: list[str] = []
    endpoints = OpenAIEndpoints(context)
    config = ServiceConfig.create(env={}, **settings)
    front = Middleware(Front, endpoints=endpoints, guards=middlewares(config), in_front=in_front)

    async def livez(request: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/livez", livez), Mount("/", app=create_app(context, endpoints))]
    outer = Starlette(routes=routes, middleware=[Middleware(_Counting, seen=seen), front])
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    started = asyncio.Event()

    async def send(message: Any) -> None:
        started.set()

    inbox.put_nowait({"type": "lifespan.startup"})
    task = asyncio.create_task(outer({"type": "lifespan"}, inbox.get, send))
    await started.wait()
    inbox.put_nowait({"type": "lifespan.shutdown"})
    await task
    return outer, seen


@pytest.mark.parametrize("in_front", [True, False])
async def test_only_hot_routes_pass_by_the_services_own_layers(context: ServingContext, in_front: bool) -> None:
    outer, seen = await service_like(context, in_front=in_front, api_keys="me:secret-key")
    key = {"Authorization": "Bearer secret-key"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://test") as http:
        refused = await http.post(CHAT, json=BODY)
        assert refused.status_code == 401
        answer = await http.post(CHAT, json=BODY, headers=key)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        assert (await http.post(CHAT, content=b"{", headers=key)).status_code in (400, 415)
        assert seen.count(CHAT) == (0 if in_front else 3)
        models = await http.get("/v1/models", headers={**key, "X-Request-ID": "abc"})
        assert models.status_code == 200 and models.headers["x-request-id"] == "abc"
        assert (await http.get("/livez")).text == "ok"
        assert (await http.get(CHAT, headers=key)).status_code == 405
        assert seen[-3:] == ["/v1/models", "/livez", CHAT]


async def test_metrics_follow_requests_and_return_to_nothing(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json=BODY)
    await http.post(CHAT, json={"messages": []})
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    assert 'nanovllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 1.0' in text
    assert 'nanovllm:generation_tokens_total{engine="0",model_name="tiny"} 14.0' in text
    assert 'status="400"} 1.0' in text


# -- joined tokens ----------------------------------------------------------------------------------------------------


def item(*tokens: int, end: str | None = None) -> OutputItem:
    return OutputItem("a", list(tokens), end)


class Reader:
    """Takes what is due at once, unless it is busy."""

    def __init__(self, pace: Pace) -> None:
        self.output = OutputBuffer(pace, self._look, lambda: None)
        self.is_busy = False
        self.taken: list[list[int]] = []

    def _look(self) -> None:
        if not self.is_busy:
            assert self.output.is_due
            self.taken.append(self.output.take().new_token_ids)


def test_what_a_reader_has_not_taken_is_one_item_of_token_ids() -> None:
    reader = Reader(Pace())
    reader.is_busy = True
    for token in range(1000):
        reader.output.put(item(token))
    reader.output.put(item(7, end="length"))
    unread = reader.output.take()
    assert unread.new_token_ids == [*range(1000), 7] and unread.finish_reason == "length"
    assert not reader.output.is_due


def test_a_reader_is_told_of_the_first_token_then_of_as_many_as_the_pace_says_and_of_the_last() -> None:
    reader = Reader(Pace(4))
    for new in [item(0), item(1), item(2), item(3), item(4), item(5, end="stop")]:
        reader.output.put(new)
    assert reader.taken == [[0], [1, 2, 3, 4], [5]]


def test_a_failure_comes_after_what_came_before_it() -> None:
    reader = Reader(Pace(8))
    reader.output.put(item(0))
    reader.is_busy = True
    reader.output.put(item(1))
    assert not reader.output.is_due
    reader.output.fail(RuntimeError())
    assert reader.output.is_due and reader.output.take().new_token_ids == [1]
    with pytest.raises(RuntimeError):
        reader.output.take()


async def test_a_reader_that_waits_gets_all_that_came_meanwhile_and_closes_the_request() -> None:
    closed: list[bool] = []
    output = OutputBuffer(Pace(), lambda: None, lambda: closed.append(True))

    async def read() -> list[list[int]]:
        return [new.new_token_ids async for new in output.read()]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    for new in (item(1), item(2), item(3)):  # one wake-up
        output.put(new)
    await asyncio.sleep(0)
    output.put(item(4, end="stop"))
    assert await task == [[1, 2, 3], [4]] and closed


class _Slow:
    """A client that reads nothing until it is let go, as behind a full socket buffer."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.sent: list[bytes] = []
        self.go = asyncio.Event()
        self.first = asyncio.Event()
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
        self.task = asyncio.create_task(app(scope, inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])
            self.first.set()
            await self.go.wait()


async def test_while_a_client_does_not_read_nothing_is_encoded_for_it(context: ServingContext) -> None:
    slow = _Slow(OpenAIEndpoints(context).chat, {**BODY, "stream": True})
    await slow.first.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(slow.sent) == 1
    slow.go.set()
    await slow.task
    assert slow.sent[-1].endswith(b"[DONE]\n\n")


def test_the_pace_slows_when_the_worker_is_busy_or_late_and_recovers() -> None:
    pace = AdaptivePace(0.04)
    pace.adapt(INTERVAL, 0.5 * INTERVAL)
    assert pace.seconds == 0
    pace.adapt(INTERVAL, 0.95 * INTERVAL)
    assert pace.seconds == SHORTEST
    for _ in range(5):
        pace.adapt(INTERVAL, 0.95 * INTERVAL)
    assert pace.seconds == 0.04
    pace.adapt(INTERVAL, 0.5 * INTERVAL)
    assert pace.seconds == 0.04, "half busy: with half the moment it would be fully so"
    for _ in range(6):
        pace.adapt(INTERVAL, 0.1 * INTERVAL)
    assert pace.seconds == 0
    pace.adapt(3 * INTERVAL, 0.1 * INTERVAL)
    assert pace.seconds == SHORTEST, "late: others have the processor"


def test_tokens_of_a_moment_are_joined_and_slower_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for interval, sizes in ((0.05, [1] * 6), (0.01, [1, 4])):
        output = OutputBuffer(Pace(seconds=0.04), lambda: None, lambda: None)
        found = []
        for _ in range(6):
            output.put(item(1))
            if output.is_due:
                now[0] += 0.02  # the reader comes late, which is no reason to hold the next token back
                found.append(len(output.take().new_token_ids))
                now[0] -= 0.02
            now[0] += interval
        assert found == sizes
