"""Past ASGI to uvicorn's connection, for what ASGI makes dear: an answer's head and its first piece are two messages
and so two system calls, and each further chunk is a coroutine, a dictionary and a dozen checks.

What is written is what uvicorn's ``send`` would have written. Where a layer stands in between, or the server is another
one or has changed, ``of`` finds no connection, and callers do with ``send``.
"""

from asyncio import Transport
from typing import Any

from starlette.types import Send

_CYCLE = ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle")
_USED = ("transport", "flow", "disconnected", "chunked_encoding", "response_complete")
_is_known: dict[type, bool] = {}


def _is_cycle(owner: Any) -> bool:
    kind = type(owner)
    has_all = all(hasattr(owner, name) for name in _USED) and hasattr(owner.flow, "write_paused")
    return (kind.__module__, kind.__qualname__) == _CYCLE and has_all


class Connection:
    """That of one answer."""

    __slots__ = ("_cycle", "_transport")

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._transport: Transport = cycle.transport

    @classmethod
    def of(cls, send: Send) -> "Connection | None":
        """The connection that uvicorn's ``send`` belongs to."""
        owner = getattr(send, "__self__", None)
        kind = type(owner)
        if kind not in _is_known:
            _is_known[kind] = _is_cycle(owner)
        return cls(owner) if _is_known[kind] else None

    def hold(self) -> None:
        """Keep what ``send`` writes from here on until ``release``, which must be called."""
        self._cycle.transport = _Held(self._transport)

    def release(self) -> None:
        """Write what is kept, in one piece."""
        held, self._cycle.transport = self._cycle.transport, self._transport
        held.flush()

    def write_chunk(self, data: bytes) -> bool:
        """Write a chunk, not the last one, of an answer that has begun. False if only ``send`` can: the client does not
        read, or has left."""
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


class _Held:
    """Stands for a transport; keeps what is written."""

    __slots__ = ("_parts", "_transport")

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
