"""What the hot routes do with ASGI and with uvicorn's connection."""

import asyncio
import gc
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from nanovllm_bento.serving.connection import Connection
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.logs import skip_unwritten_lines
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints
from nanovllm_bento.serving.streaming import ClientDisconnectedError, EventSender, send_whole, until_disconnect
from tests.serving.fakes import FakeEngine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
LEFT = {"type": "http.disconnect"}
MORE = {"type": "http.request", "body": b"", "more_body": False}


# -- until the client leaves ------------------------------------------------------------------------------------------


async def at_once() -> dict[str, Any]:
    return LEFT


async def after_other_messages_and_pauses() -> dict[str, Any]:
    await asyncio.sleep(0)
    return await anext_message(after_other_messages_and_pauses)


def anext_message(of: Any) -> Awaitable[dict[str, Any]]:
    of.messages = getattr(of, "messages", None) or [MORE, MORE, LEFT]
    done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(done.set_result, of.messages.pop(0))
    return done


@pytest.mark.parametrize("receive", [at_once, after_other_messages_and_pauses])
async def test_work_is_cancelled_when_the_client_leaves(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(ClientDisconnectedError):
        await until_disconnect(receive, work())
    assert ended


async def test_the_wait_for_a_client_to_leave_ends_with_the_work() -> None:
    closed = []

    async def receive() -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)
        return LEFT

    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    before = asyncio.all_tasks()
    assert await until_disconnect(receive, work()) == 3
    assert closed and asyncio.all_tasks() == before


@pytest.mark.parametrize("pauses", [0, 1])
async def test_a_server_that_cannot_tell_whether_the_client_is_there_is_no_fault(pauses: int) -> None:
    async def receive() -> dict[str, Any]:
        for _ in range(pauses):
            await asyncio.sleep(0)
        raise OSError

    assert await until_disconnect(receive, asyncio.sleep(0, 3)) == 3


async def test_a_client_that_has_left_already_is_no_fault_of_work_that_need_not_wait() -> None:
    async def work() -> int:
        return 3

    assert await until_disconnect(at_once, work()) == 3
    await asyncio.sleep(0)


async def test_a_cancelled_task_is_not_taken_for_a_client_that_left() -> None:
    task = asyncio.create_task(until_disconnect(asyncio.Event().wait, asyncio.Event().wait()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- events -----------------------------------------------------------------------------------------------------------


class Client:
    """Takes messages; while ``reads`` is not set, each makes the sender wait."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.reads = asyncio.Event()
        self.fails: Exception | None = None

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.got.append(message["body"])
            await self.reads.wait()
            await asyncio.sleep(0)
            if self.fails is not None:
                raise self.fails


async def test_what_cannot_be_sent_at_once_is_a_future() -> None:
    client = Client()
    events = EventSender(client.send, [])
    busy = events.push(b"a")
    assert busy is not None and not busy.done() and client.got == [b"a"]
    client.reads.set()
    await busy
    client.fails = OSError("gone")
    failed = events.push(b"b", last=True)
    assert failed is not None and events.finished
    with pytest.raises(OSError, match="gone"):
        await failed


async def test_an_answer_that_cannot_be_sent_ends_its_request(engine: FakeEngine, context: ServingContext) -> None:
    engine.endless = True
    engine.make_room()
    client = Client()
    client.reads.set()
    client.fails = OSError("gone")
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    inbox.put_nowait({**MORE, "body": json.dumps({**BODY, "stream": True}).encode()})
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    with pytest.raises(OSError, match="gone"):  # the server's own: nobody else can be told
        await OpenAIEndpoints(context).chat(scope, inbox.get, client.send)
    assert len(engine.aborted) == 1 and context.num_open == 0


# -- uvicorn's connection ---------------------------------------------------------------------------------------------


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False
        self.wrote = asyncio.Event()

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))
        self.wrote.set()

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


def request(body: Any, *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Served:
    """A connection to uvicorn's own protocol, without a socket."""

    def __init__(self, app: Any) -> None:
        config = Config(app, log_config=None, lifespan="off", interface="asgi3")
        config.load()
        self.state = ServerState()
        self.protocol = HttpToolsProtocol(config, self.state, {}, asyncio.get_running_loop())
        self.transport = Transport()
        self.protocol.connection_made(self.transport)

    async def ask(self, data: bytes) -> bytes:
        """The answer to one request; ``transport.writes`` are those of it."""
        self.transport.writes.clear()
        self.protocol.data_received(data)
        await asyncio.gather(*self.state.tasks)
        return b"".join(self.transport.writes)


def through(send: Any) -> Any:
    """A layer between: the server's connection is out of reach."""

    async def layer(message: Any) -> None:
        await send(message)

    return layer


@pytest.mark.parametrize("body", [BODY, {**BODY, "stream": True}, {"messages": []}])
async def test_what_is_written_past_the_server_is_what_it_would_have_written(
    context: ServingContext, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr("nanovllm_bento.serving.openai.endpoints.random_hex", lambda size: "0")
    monkeypatch.setattr("time.time", lambda: 1e9)
    endpoints = OpenAIEndpoints(context)
    sent = request({**body, "seed": 1}, "X-Request-ID: mine")
    direct, layered = Served(endpoints.chat), Served(lambda s, r, send: endpoints.chat(s, r, through(send)))
    answer = await direct.ask(sent)
    context.engine.requests.clear()  # type: ignore[attr-defined]
    assert answer == await layered.ask(sent)
    assert len(direct.transport.writes) == len(layered.transport.writes) - 1, "the head goes with the first piece"
    head, _, piece = direct.transport.writes[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 ") and piece
    context.engine.requests.clear()  # type: ignore[attr-defined]
    assert (await direct.ask(request(BODY))).startswith(b"HTTP/1.1 200"), "the connection goes on"


async def test_a_connection_that_is_to_be_closed_is_closed_behind_the_answer(context: ServingContext) -> None:
    served = Served(OpenAIEndpoints(context).chat)
    answer = await served.ask(request(BODY, "Connection: close"))
    assert b"connection: close" in answer and b"Hello" in answer and served.transport.closed


async def test_a_client_that_does_not_read_is_waited_for(engine: FakeEngine, context: ServingContext) -> None:
    engine.endless = True
    engine.make_room()
    served = Served(OpenAIEndpoints(context).chat)
    served.protocol.data_received(request({**BODY, "stream": True, "max_tokens": 300}))
    await served.transport.wrote.wait()
    served.protocol.pause_writing()
    held = len(served.transport.writes)
    await engine.until(lambda: not engine.open)
    assert len(served.transport.writes) == held
    served.protocol.resume_writing()
    await asyncio.gather(*served.state.tasks)
    assert len(served.transport.writes) <= held + 2, "all that came meanwhile is one piece"
    assert b"".join(served.transport.writes).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_client_that_has_left_is_written_nothing(engine: FakeEngine, context: ServingContext) -> None:
    engine.endless = True
    engine.make_room()
    served = Served(OpenAIEndpoints(context).chat)
    served.protocol.data_received(request({**BODY, "stream": True}))
    await served.transport.wrote.wait()
    written = len(served.transport.writes)
    served.protocol.connection_lost(None)
    await asyncio.gather(*served.state.tasks)
    assert len(served.transport.writes) == written and not engine.open and len(engine.aborted) == 1


async def test_another_servers_send_has_no_connection() -> None:
    class Other:
        async def send(self, message: Any) -> None:
            pass

    assert Connection.of(Other().send) is None
    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message["type"])

    await send_whole(send, 200, [], b"x")
    assert got == ["http.response.start", "http.response.body"]


# -- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_no_work_for_the_garbage_collector(engine: FakeEngine, stream: bool) -> None:
    from tests.serving.fakes import make_context

    served = Served(OpenAIEndpoints(make_context(engine)).chat)
    await served.ask(request({**BODY, "stream": stream, "n": 2}))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await served.ask(request({**BODY, "stream": stream, "n": 2}))
        gc.collect()
        ours = [found for found in gc.garbage if type(found).__module__.startswith("nanovllm_bento")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours


def test_the_servers_access_lines_are_spared_where_nobody_writes_them() -> None:
    access = logging.getLogger("uvicorn.access")
    before = access.handlers, access.propagate, access.level
    try:
        access.setLevel(logging.INFO)
        skip_unwritten_lines()
        assert access.hasHandlers()
        access.setLevel(logging.WARNING)
        skip_unwritten_lines()
        assert not access.hasHandlers()
    finally:
        access.handlers, access.propagate = before[:2]
        access.setLevel(before[2])
