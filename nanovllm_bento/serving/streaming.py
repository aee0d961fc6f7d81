"""What the OpenAI routes need of ASGI: the body in, an answer or server-sent events out, and the end of work whose
client has left. Plain functions over ``receive`` and ``send``: a request object, a response object and a task for each
would cost as much as all the rest of a short answer.

Where a task would only be needed if something has to be waited for, the coroutine is begun by hand (``_begin``).
"""

import asyncio
import types
from collections.abc import Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from typing import Any, TypeVar

from starlette.types import Receive, Send

from nanovllm_bento.serving.connection import Connection
from nanovllm_bento.serving.errors import ClientDisconnectedError

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises ClientDisconnectedError."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        body = message.get("body", b"")
        if not message.get("more_body", False):
            return body if not parts else b"".join([*parts, body])
        parts.append(body)


def _begin(work: Coroutine[Any, Any, None], context: Context) -> object:
    """Run ``work`` to where it has to wait, without a task; returns what it waits for, _NOTHING if it is done."""
    try:
        return context.run(work.send, None)
    except StopIteration:
        return _NOTHING


_NOTHING = object()


@types.coroutine
def _rest(work: Coroutine[Any, Any, None], waits_for: object) -> Generator[Any, Any, None]:
    """What is left of a coroutine that was begun by hand, for a task."""
    try:
        while True:
            try:
                yield waits_for
            except BaseException as exc:
                waits_for = work.throw(exc)
            else:
                waits_for = work.send(None)
    except StopIteration:
        return


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end in this task, or cancel it as soon as the client leaves.

    ``receive`` is ASGI's, with the request's body read already. Raises ClientDisconnectedError, or what work raises.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = _Departure(receive, task)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.has_left and not task.uncancel():
            raise ClientDisconnectedError from None
        raise
    finally:
        watch.stop()


class _Departure:
    """Cancels a task when its client leaves. Waits for that without a task of its own until a message comes."""

    __slots__ = ("_context", "_is_over", "_message", "_task", "_watcher", "has_left")

    def __init__(self, receive: Receive, task: "asyncio.Task[Any]") -> None:
        self._task, self._context = task, copy_context()
        self._watcher: asyncio.Task[None] | None = None
        self.has_left = self._is_over = False
        self._message: Coroutine[Any, Any, Any] = _disconnected(receive)
        try:
            waits_for: Any = _begin(self._message, self._context)
        except Exception:
            return  # a server that cannot tell, as in ``_on_end``
        if waits_for is _NOTHING:
            asyncio.get_running_loop().call_soon(self._on_left)
        elif asyncio.isfuture(waits_for):
            waits_for._asyncio_future_blocking = False  # as a task does with what a coroutine waits for
            waits_for.add_done_callback(self._on_message, context=self._context)
        else:
            self._on_message()

    def _on_message(self, _: object = None) -> None:
        if not self._is_over:
            self._watcher = asyncio.create_task(self._message, context=self._context)
            self._watcher.add_done_callback(self._on_end)

    def _on_end(self, watcher: "asyncio.Task[None]") -> None:
        if not watcher.cancelled() and watcher.exception() is None:
            self._on_left()

    def _on_left(self) -> None:
        if not self._is_over:
            self.has_left = True
            self._task.cancel()

    def stop(self) -> None:
        self._is_over = True
        if self._watcher is not None:
            self._watcher.cancel()
        else:
            self._context.run(self._message.close)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """An answer in one piece. ``headers`` without its length."""
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await _begin_answer(send, Connection.of(send), status, headers, body)


async def _begin_answer(
    send: Send, connection: Connection | None, status: int, headers: Headers, body: bytes, *, more_body: bool = False
) -> None:
    if connection is not None:
        connection.hold()
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more_body})
    finally:
        if connection is not None:
            connection.release()


class EventSender:
    """Server-sent events, encoded already. The answer starts with the first of them: a failure before it still has an
    HTTP status of its own.

    While the client does not read, what comes is joined by the engine's client, as nobody takes it (generation.py).
    """

    __slots__ = ("_connection", "_context", "_headers", "_send", "finished", "started")

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._context = copy_context()
        self._connection = Connection.of(send)
        self.started = self.finished = False

    def push(self, event: bytes, *, last: bool = False) -> asyncio.Future[None] | None:
        """Send one or several events; ``last`` ends the answer.

        Returns a future where the client does not read: until that is done nothing more may be sent.
        """
        connection = self._connection
        if self.started and not last and connection is not None and connection.write_chunk(event):
            return None  # as nearly always
        sending = self.send(event, last=last)
        waits_for = _begin(sending, self._context)
        if waits_for is _NOTHING:
            return None
        return asyncio.create_task(_rest(sending, waits_for), context=self._context)

    async def send(self, event: bytes, *, last: bool = False) -> None:
        """As ``push``; waits while the client does not read."""
        self.finished = last
        if self.started:
            await self._send({"type": "http.response.body", "body": event, "more_body": not last})
            return
        self.started = True
        headers = [*EVENT_STREAM, *self._headers]
        await _begin_answer(self._send, self._connection, 200, headers, event, more_body=not last)
