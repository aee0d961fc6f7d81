"""HTTP/1.1 answers and server-sent events, read as cheaply as the load generator needs. Nothing here does any I/O.

Not a general client: what an OpenAI-compatible server sends (a status line, headers, a body with a length, in chunks or
up to the end of the connection), and nothing else. Bytes go in with the time at which they came.
"""

from typing import Any, Protocol

import msgspec

MAX_HEAD = 65_536


class ProtocolError(Exception):
    """The server sent what is not HTTP/1.1, or no answer of OpenAI's shape."""


class BodySink(Protocol):
    """Takes an answer as it comes."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def body(self, data: bytes, now: float) -> None: ...


class AnswerReader:
    """One HTTP answer. ``feed`` returns True once it is complete; ``keep_alive`` then says if the connection is."""

    __slots__ = ("_buffer", "_left", "_mode", "_sink", "keep_alive", "started")

    def __init__(self, sink: BodySink) -> None:
        self._sink = sink
        self._buffer = b""
        self._mode = "head"  # head | chunks | trailer | length | close | done
        self._left = 0  # bytes of the chunk or the body that are still to come, with a chunk's line break
        self.keep_alive = True
        self.started = False

    def feed(self, data: bytes, now: float) -> bool:
        """Raises ProtocolError."""
        self.started = True
        if self._mode == "head":
            data = self._head(self._buffer + data)
            if self._mode == "head":
                return False
        if self._mode in ("chunks", "trailer"):
            self._chunks(data, now)
        elif self._mode == "length":
            if data:
                self._sink.body(data[: self._left], now)
            self._left -= len(data)
            if self._left < 0:
                raise ProtocolError("more came than Content-Length said")
            if not self._left:
                self._mode = "done"
        elif data:
            self._sink.body(data, now)
        return self._mode == "done"

    def end(self) -> bool:
        """The connection ended: whether the answer is complete."""
        self.keep_alive = False
        return self._mode in ("done", "close")

    def _head(self, data: bytes) -> bytes:
        """Parse the head if it is all there; returns what follows it."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise ProtocolError("the headers do not end")
            self._buffer = data
            return b""
        lines = data[:end].split(b"\r\n")
        parts = lines[0].split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise ProtocolError(f"no HTTP/1.1 status line: {lines[0][:80]!r}")
        status = int(parts[1])
        rest, self._buffer = data[end + 4 :], b""
        if 100 <= status < 200:  # an interim answer: the real one follows
            return self._head(rest)
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        self.keep_alive = headers.get(b"connection", b"").lower() != b"close" and parts[0] != b"HTTP/1.0"
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            self._mode = "chunks"
        elif b"content-length" in headers:
            self._mode, self._left = "length", int(headers[b"content-length"])
        elif status in (204, 304):
            self._mode = "length"
        else:
            self._mode, self.keep_alive = "close", False
        self._sink.head(status, headers)
        return rest

    def _chunks(self, data: bytes, now: float) -> None:
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        at, size = 0, len(data)
        while at < size:
            if self._left:  # inside a chunk that is longer than what came so far; its line break counts as two of it
                take = min(self._left, size - at)
                text = min(take, self._left - 2)
                if text > 0:
                    self._sink.body(data[at : at + text], now)
                self._left -= take
                at += take
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            if self._mode == "trailer":  # headers after the last chunk, up to an empty line
                if end == at:
                    self._mode = "done"
                    return
                at = end + 2
                continue
            try:
                length = int(data[at:end].partition(b";")[0], 16)
            except ValueError:
                raise ProtocolError(f"no chunk size: {data[at:end][:40]!r}") from None
            at = end + 2
            if not length:
                self._mode = "trailer"
                continue
            if at + length + 2 <= size:  # the usual case: a whole chunk
                self._sink.body(data[at : at + length], now)
                at += length + 2
            else:
                self._left = length + 2
        self._buffer = data[at:]
        if len(self._buffer) > MAX_HEAD:
            raise ProtocolError("a chunk size does not end")


class EventReader:
    """Server-sent events: ``feed`` returns the data of every event that is complete."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, body: bytes) -> list[bytes]:
        if self._buffer:
            body = self._buffer + body
        if b"\r" in body:
            if body.endswith(b"\r"):  # its line feed may still come
                self._buffer = body
                return []
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, self._buffer = body.split(b"\n\n")
        found = []
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            elif event:
                lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
                if lines:
                    found.append(b"\n".join(lines))
        return found

    @property
    def rest(self) -> bytes:
        """What came of an event that is not complete."""
        return self._buffer


class Delta(msgspec.Struct):
    """What a chat chunk adds. Reasoning is named differently by different servers."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class TokenUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """An event of a stream, or a whole answer; fields that nothing is measured by are passed over."""

    choices: list[Choice] = []
    usage: TokenUsage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


class Answer:
    """What is known of one answer: collects chunks and their times. A BodySink.

    A chunk that only gives the role, or only the reason for the end, carries no token: it does not count as a chunk,
    and the first does not end the time to the first token.
    """

    __slots__ = (
        "_body",
        "_events",
        "_keep_text",
        "chunks",
        "done",
        "error",
        "finish",
        "last",
        "status",
        "text",
        "usage",
    )

    def __init__(self, *, keep_text: bool = False) -> None:
        self.status: int | None = None
        self.chunks: list[float] = []  # when each chunk with tokens came
        self.last: float | None = None  # when the last chunk of a choice came
        self.finish: str | None = None
        self.usage: TokenUsage | None = None
        self.error: str | None = None
        self.done = False  # [DONE] came
        self.text: list[str] = []
        self._keep_text = keep_text
        self._events: EventReader | None = None
        self._body: list[bytes] = []

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        if status == 200 and headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            self._events = EventReader()

    def body(self, data: bytes, now: float) -> None:
        """Raises ProtocolError."""
        if self._events is None:
            self._body.append(data)
            self.last = now
            return
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self.done = True
            else:
                self._take(event, now)

    def finished(self) -> None:
        """The body is complete. Raises ProtocolError."""
        if self._events is not None:
            return
        body = b"".join(self._body)
        if self.status == 200:
            self._whole(body)
        else:
            self.error = _error_text(body)

    def _take(self, event: bytes, now: float) -> None:
        try:
            chunk = _decode(event)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"an event that is no chunk ({error}): {event[:120]!r}") from None
        if chunk.error is not None:
            self.error = _error_text(event)
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            delta = choice.delta
            if delta is None:
                text, bare = choice.text, True
            else:
                text = delta.content or delta.reasoning_content or delta.reasoning or delta.refusal
                bare = delta.role is None and delta.tool_calls is None
            if choice.finish_reason is not None:
                self.finish = choice.finish_reason
                if text or (delta is not None and delta.tool_calls is not None):
                    self.chunks.append(now)
            elif text or bare or (delta is not None and delta.tool_calls is not None):
                self.chunks.append(now)  # without text: a token whose characters are not complete yet
            self.last = now
            if self._keep_text and text:
                self.text.append(text)

    def _whole(self, body: bytes) -> None:
        try:
            answer = _decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"no answer of OpenAI's shape ({error}): {body[:120]!r}") from None
        if answer.error is not None:
            self.error = _error_text(body)
        self.usage = answer.usage
        for choice in answer.choices:
            self.finish = choice.finish_reason
            text = choice.text if choice.message is None else choice.message.content
            if self._keep_text and text:
                self.text.append(text)


def _error_text(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the beginning of what came."""
    try:
        found = msgspec.json.decode(body)
        error = found.get("error", found) if isinstance(found, dict) else found
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace")
