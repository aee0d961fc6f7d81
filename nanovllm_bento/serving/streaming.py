"""What the OpenAI routes need of ASGI: the body in, an answer or server-sent events out, and the end of work whose
client has left. Plain functions over ``receive`` and ``send``: a request object, a response object and a task for each
would cost as much as all the rest of a short answer.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive, Send

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientDisconnectedError(Exception):
    """The client left before its answer was ready."""


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


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end in this task, or cancel it as soon as the client leaves.

    ``receive`` is ASGI's, with the request's body read already. Raises ClientDisconnectedError, or what work raises.
    """
    task = asyncio.current_task()
    assert task is not None
    left = done = False

    def on_message(watcher: "asyncio.Task[None]") -> None:
        nonlocal left
        if not done and not watcher.cancelled() and watcher.exception() is None:
            left = True
            task.cancel()

    watcher = asyncio.create_task(_disconnected(receive))
    watcher.add_done_callback(on_message)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientDisconnectedError from None
        raise
    finally:
        done = True
        watcher.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """An answer in one piece. ``headers`` without its length."""
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class EventSender:
    """Server-sent events, encoded already. The answer starts with the first of them: a failure before it still has an
    HTTP status of its own.

    ``send`` waits while the client does not read; what comes meanwhile is joined by the reader of the engine's client.
    """

    __slots__ = ("_headers", "_send", "finished", "started")

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.started = self.finished = False

    async def send(self, event: bytes, *, last: bool = False) -> None:
        """Send one or several events; ``last`` ends the answer."""
        if not self.started:
            self.started = True
            headers = [*EVENT_STREAM, *self._headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if last:
            self.finished = True
        await self._send({"type": "http.response.body", "body": event, "more_body": not last})
