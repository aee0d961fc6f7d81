"""One client process of the load generator (``python -m`` this), started by serve_processes.

Sends its share of the requests over plain sockets, notes when each chunk of each answer came, and watches what it
costs itself. It imports little and does as little as it can for a chunk: the client must never be what is measured.
"""

import asyncio
import gc
import mmap
import os
import signal
import ssl
import struct
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from nanovllm_bento.bench.serve_http import Answer, AnswerReader, ProtocolError
from nanovllm_bento.bench.serve_messages import (
    Conversation,
    Done,
    FromClient,
    Plan,
    Progress,
    Ready,
    Record,
    Usage,
    decode_plan,
    encode,
)

PROGRESS_INTERVAL = 0.5
LENGTH = struct.Struct("<I")
FAILED_ENDS = ("error", "abort")
"""Reasons for the end of an answer that are none of success."""


class ConnectionLostError(Exception):
    """The server closed the connection before the answer was complete. ``answered``: after some of it came."""

    def __init__(self, answered: bool, reason: str) -> None:
        super().__init__(reason)
        self.answered = answered


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reader: AnswerReader | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.usable = True
        self.used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def request(self, data: bytes, answer: Answer) -> asyncio.Future[None]:
        """Send a request; the future ends with its answer. Raises ConnectionLostError and ProtocolError through it."""
        assert self.transport is not None
        self.waiter = asyncio.get_running_loop().create_future()
        self.reader = AnswerReader(answer)
        self.transport.write(data)
        return self.waiter

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        reader, waiter = self.reader, self.waiter
        if reader is None or waiter is None or waiter.done():
            self.close()  # nobody asked
            return
        try:
            if reader.feed(data, now):
                self.usable, self.used = self.usable and reader.keep_alive, True
                waiter.set_result(None)
        except ProtocolError as error:
            waiter.set_exception(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self.reader is not None and self.waiter is not None and not self.waiter.done():
            if exc is None and self.reader.end():
                self.waiter.set_result(None)
            else:
                reason = str(exc) if exc else "the server closed the connection"
                self.waiter.set_exception(ConnectionLostError(self.reader.started, reason))

    def close(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()


class Connections:
    """Connections to one server, kept for later requests."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tls = ssl.create_default_context() if plan.tls else None
        self.idle: list[Connection] = []
        self.reconnects = 0

    async def exchange(self, data: bytes, answer: Answer) -> None:
        """Send one request, read its answer. A kept connection that the server had closed is replaced once.

        Raises OSError (no connection), ConnectionLostError, ProtocolError.
        """
        while True:
            connection = self._idle() or await self._connect()
            kept = connection.used
            try:
                await connection.request(data, answer)
            except ConnectionLostError as error:
                if kept and not error.answered:
                    self.reconnects += 1
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            if connection.usable:
                self.idle.append(connection)
            else:
                connection.close()
            return

    def close(self) -> None:
        for connection in self.idle:
            connection.close()

    def _idle(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.plan.host, self.plan.port, ssl=self.tls)
        return connection


class Bodies:
    """The spool of a run, mapped: item → (body, max_tokens)."""

    def __init__(self, fd: int, num_items: int) -> None:
        self._data = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        self._index = self._data[len(self._data) - 24 * num_items :].cast("q")

    def __getitem__(self, item: int) -> tuple[bytes, int | None]:
        at, length, max_tokens = self._index[3 * item : 3 * item + 3]
        return bytes(self._data[at : at + length]), None if max_tokens < 0 else max_tokens


def tickets(fd: int) -> Iterator[int]:
    """Items to send, each given out once among all processes: they share the file's position, and a read moves it."""
    while len(data := os.read(fd, LENGTH.size)) == LENGTH.size:
        yield LENGTH.unpack(data)[0]


class Client:
    """Sends what the plan says and keeps a record of each request."""

    def __init__(self, plan: Plan, tell: Callable[[FromClient], None]) -> None:
        self.plan, self.tell = plan, tell
        self.bodies = Bodies(plan.spool_fd, plan.num_items)
        self.connections = Connections(plan)
        self.records: list[Record] = []
        self.open: set[Answer] = set()
        self.progress = Progress(0, 0, 0, 0, [])
        self.not_sent = 0

    async def run(self, start: float, stopped: asyncio.Event) -> None:
        """From ``start`` (monotonic) until all is done, or ``stopped`` is set: then what is open is given up."""
        await _sleep_until(start)
        watch = Watch()
        work = asyncio.create_task(self._scheduled(start) if self.plan.schedule is not None else self._in_slots())
        ticker = asyncio.create_task(self._report(watch))
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
        usage = watch.usage()
        for task in (work, ticker, stop):
            task.cancel()
        results = await asyncio.gather(work, ticker, stop, return_exceptions=True)
        self.connections.close()
        if isinstance(results[0], Exception):
            raise results[0]
        self.tell(self.progress)
        self.tell(Done(self.records, usage, self.not_sent, self.connections.reconnects))

    async def _in_slots(self) -> None:
        async def slot() -> None:
            for item in tickets(self.plan.tickets_fd):
                await self._item(item, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.concurrency or 1):
                group.create_task(slot())

    async def _scheduled(self, start: float) -> None:
        assert self.plan.schedule is not None
        room = asyncio.Semaphore(self.plan.concurrency) if self.plan.concurrency else None

        async def sent(item: int, planned: float) -> None:
            if room is None:
                await self._item(item, planned)
            else:
                async with room:
                    await self._item(item, planned)

        async with asyncio.TaskGroup() as group:
            for after, item in self.plan.schedule:
                await _sleep_until(start + after)
                group.create_task(sent(item, start + after))

    def _item(self, item: int, planned: float | None) -> Awaitable[Any]:
        body, max_tokens = self.bodies[item]
        if self.plan.conversations:
            return self._conversation(item, msgspec.json.decode(body, type=Conversation), planned)
        return self._request(body, Record(item, 0, max_tokens, planned, 0.0))

    async def _conversation(self, item: int, conversation: Conversation, planned: float | None) -> None:
        """Turn by turn, each behind the answers that the server gave. A failure ends it."""
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for number, turn in enumerate(conversation.turns):
            if number and self.plan.think_time:
                await asyncio.sleep(self.plan.think_time)
            messages.append({"role": "user", "content": turn.text})
            prompt: object = messages if self.plan.chat else transcript(messages)
            fields = {"messages" if self.plan.chat else "prompt": prompt, "max_tokens": turn.max_tokens}
            body = msgspec.json.encode({**self.plan.fields, **fields})
            record = Record(item, number, turn.max_tokens, None if number else planned, 0.0)
            answer = await self._request(body, record)
            if record.failure is not None:
                self.not_sent += len(conversation.turns) - number - 1
                return
            messages.append({"role": "assistant", "content": "".join(answer.text)})

    async def _request(self, body: bytes, record: Record) -> Answer:
        answer = Answer(keep_text=self.plan.conversations)
        data = b"%bContent-Length: %d\r\n\r\n%b" % (self.plan.head, len(body), body)
        self.progress.started += 1
        self.open.add(answer)
        record.started = time.monotonic()
        try:
            async with asyncio.timeout(self.plan.timeout):
                await self.connections.exchange(data, answer)
            answer.finished()
        except TimeoutError:
            record.failure, record.detail = "timeout", f"not finished after {self.plan.timeout:g} s"
        except OSError as error:
            record.failure, record.detail = "connect", str(error)
        except ConnectionLostError as error:
            if not answer.done:
                record.failure, record.detail = ("cut" if error.answered else "no_answer"), str(error)
        except ProtocolError as error:
            record.failure, record.detail = "bad_answer", str(error)
        record.ended = time.monotonic()
        settle(record, answer, stream=self.plan.stream)
        self._count(record, answer)
        return answer

    def _count(self, record: Record, answer: Answer) -> None:
        self.open.discard(answer)
        self.records.append(record)
        self.progress.chunks += len(answer.chunks)
        if record.failure is None:
            self.progress.completed += 1
            if record.first is not None:
                self.progress.ttft.append(record.first - record.started)
        else:
            self.progress.failed += 1

    async def _report(self, watch: "Watch") -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            watch.tick()
            so_far = sum(len(answer.chunks) for answer in self.open)
            self.tell(msgspec.structs.replace(self.progress, chunks=self.progress.chunks + so_far))
            self.progress.ttft.clear()


def settle(record: Record, answer: Answer, *, stream: bool) -> None:
    """Enter an answer in its record, and what was wrong with it unless that is known already."""
    record.status, record.finish_reason = answer.status, answer.finish
    if record.failure is None:
        if answer.status != 200:
            record.failure = f"http_{answer.status}"
        elif answer.error is not None:
            record.failure = "error_event" if stream else "error"
        elif answer.finish is None:
            record.failure = "cut"
            record.detail = "the stream ended without a finish_reason"
        elif answer.finish in FAILED_ENDS:
            record.failure = f"finish_{answer.finish}"
    record.detail = record.detail or answer.error or ""
    if answer.status == 200:
        record.last = answer.last
        if stream:
            record.first = answer.chunks[0] if answer.chunks else answer.last
            record.chunks = array("d", [at - record.started for at in answer.chunks]).tobytes()
    if answer.usage is not None:
        record.prompt_tokens, record.output_tokens = answer.usage.prompt_tokens, answer.usage.completion_tokens
        details = answer.usage.prompt_tokens_details
        record.cached_tokens = details.cached_tokens if details is not None else None


def transcript(messages: list[dict[str, str]]) -> str:
    """A conversation as one text, for /v1/completions."""
    said = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*said, "Assistant:"])


class Watch:
    """This process's own cost, from now on."""

    def __init__(self) -> None:
        self.start = self.last = (time.monotonic(), time.process_time())
        self.waited = waited_seconds()
        self.peak = 0.0

    def tick(self) -> None:
        now = (time.monotonic(), time.process_time())
        if now[0] > self.last[0]:
            self.peak = max(self.peak, (now[1] - self.last[1]) / (now[0] - self.last[0]))
        self.last = now

    def usage(self) -> Usage:
        if time.monotonic() - self.last[0] > PROGRESS_INTERVAL / 2 or not self.peak:
            self.tick()
        waited = waited_seconds()
        return Usage(
            time.monotonic() - self.start[0],
            time.process_time() - self.start[1],
            self.peak,
            None if waited is None or self.waited is None else waited - self.waited,
        )


def waited_seconds() -> float | None:
    """How long this process was runnable but had no core, since it began; None where the kernel does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


async def _sleep_until(when: float) -> None:
    delay = when - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)


def read_frame(stream: BinaryIO) -> bytes:
    """One length-prefixed frame. Raises EOFError."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return stream.read(LENGTH.unpack(head)[0])


def frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


async def _main(plan: Plan, start: float, tell: Callable[[FromClient], None]) -> None:
    stopped = asyncio.Event()
    # The parent writes to stdin to stop this process early; if it is gone, stdin is at its end.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stopped.set)
    await Client(plan, tell).run(start, stopped)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops this process
    stdin, out = os.fdopen(0, "rb", buffering=0, closefd=False), sys.stdout.buffer
    plan = decode_plan(read_frame(stdin))

    def tell(message: FromClient) -> None:
        try:
            out.write(frame(encode(message)))
            out.flush()
        except BrokenPipeError:
            os._exit(1)

    try:
        from uvloop import run
    except ImportError:
        from asyncio import run  # type: ignore[assignment]
    gc.collect()
    gc.disable()  # a pause of the collector would look like one of the server
    tell(Ready())
    start: float = struct.unpack("<d", read_frame(stdin))[0]
    run(_main(plan, start, tell))


if __name__ == "__main__":
    main()
