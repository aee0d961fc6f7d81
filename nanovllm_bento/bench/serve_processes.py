"""The load generator's client processes, seen from their parent: starts them together and gathers what they saw."""

import asyncio
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import nanovllm_bento
from nanovllm_bento.bench.serve_client import LENGTH, frame
from nanovllm_bento.bench.serve_messages import Done, FromClient, Plan, Progress, Ready, decode_message, encode
from nanovllm_bento.bench.serve_options import LoadOptions, RunShape
from nanovllm_bento.bench.serve_workload import Spool, Work, arrivals, body_fields

START_DELAY = 0.2
"""Seconds between the word to start and the start, so that every process has heard it."""


class ClientError(RuntimeError):
    """A client process failed."""


@dataclass(slots=True)
class Gathered:
    """What the processes of a run saw. ``start``: monotonic; ``interrupted``: stopped before all was sent."""

    start: float
    done: list[Done]
    interrupted: bool


def run_load(
    options: LoadOptions,
    shape: RunShape,
    work: Work,
    model: str,
    *,
    on_progress: Callable[[Sequence[Progress], float], None] = lambda progress, seconds: None,
) -> Gathered:
    """Send the work of one run. ``on_progress`` gets every process's progress and the seconds since the start.

    Raises ClientError if a client process fails.
    """
    raise_open_files()
    return asyncio.run(_run(options, shape, work, model, on_progress))


def raise_open_files() -> None:
    """One stream is one file: let this process and its children have as many as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def request_head(options: LoadOptions) -> bytes:
    """Request line and headers, but for the body's length."""
    url = urlsplit(options.url)
    lines = [f"POST {url.path}{options.path} HTTP/1.1", f"Host: {url.netloc.rpartition('@')[2]}"]
    lines += [f"{name}: {value}" for name, value in options.headers.items()]
    accept = "text/event-stream" if options.stream else "application/json"
    return "\r\n".join([*lines, f"Accept: {accept}", "Content-Type: application/json", ""]).encode()


def plans(
    options: LoadOptions, shape: RunShape, work: Work, model: str, *, spool_fd: int, tickets_fd: int
) -> list[Plan]:
    """One per client process. Times are dealt out in turn, slots evenly."""
    url = urlsplit(options.url)
    count = options.num_processes(work.num_items, shape.max_concurrency)
    times = work.times
    if times is None and shape.request_rate is not None:
        times = arrivals(work.num_items, shape.request_rate, options.burstiness, options.seed)
    if times is None and shape.max_concurrency is None:
        times = [0.0] * work.num_items
    order = sorted(range(work.num_items), key=times.__getitem__) if times is not None else []
    slots = shape.max_concurrency
    return [
        Plan(
            host=url.hostname or "127.0.0.1",
            port=url.port or (443 if url.scheme == "https" else 80),
            tls=url.scheme == "https",
            path=f"{url.path}{options.path}",
            head=request_head(options),
            chat=options.endpoint == "chat",
            stream=options.stream,
            conversations=work.conversations,
            fields=body_fields(options, model),
            think_time=options.think_time,
            timeout=options.timeout,
            concurrency=slots // count + (i < slots % count) if slots else None,
            schedule=[(times[item], item) for item in order[i::count]] if times is not None else None,
            spool_fd=spool_fd,
            tickets_fd=tickets_fd,
            num_items=work.num_items,
        )
        for i in range(count)
    ]


async def _run(
    options: LoadOptions,
    shape: RunShape,
    work: Work,
    model: str,
    on_progress: Callable[[Sequence[Progress], float], None],
) -> Gathered:
    with tempfile.TemporaryFile() as spool, tempfile.TemporaryFile() as tickets:
        Spool(work.items, spool)
        tickets.write(b"".join(LENGTH.pack(i) for i in range(work.num_items)))
        tickets.flush()
        tickets.seek(0)
        fds = spool.fileno(), tickets.fileno()
        clients = [_Client(plan) for plan in plans(options, shape, work, model, spool_fd=fds[0], tickets_fd=fds[1])]
        loop = asyncio.get_running_loop()
        interrupted = False

        def stop() -> None:
            nonlocal interrupted
            interrupted = True
            for client in clients:
                client.stop()

        try:
            await asyncio.gather(*(client.start(fds) for client in clients))
            loop.add_signal_handler(signal.SIGINT, stop)
            start = time.monotonic() + START_DELAY
            for client in clients:
                client.write(struct.pack("<d", start))

            def show() -> None:
                on_progress([client.progress for client in clients], time.monotonic() - start)

            done = await asyncio.gather(*(client.follow(show) for client in clients))
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            await asyncio.gather(*(client.close() for client in clients))
    return Gathered(start, done, interrupted)


class _Client:
    """One client process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.progress = Progress(0, 0, 0, 0, [])
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, fds: tuple[int, ...]) -> None:
        """Return once it waits for the start. Raises ClientError."""
        folder = str(Path(nanovllm_bento.__file__).parents[1])
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nanovllm_bento.bench.serve_client"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.write(encode(self.plan))
        if not isinstance(await self._next(), Ready):
            raise ClientError("a client process did not start as it should")

    async def follow(self, show: Callable[[], None]) -> Done:
        """Its progress as it comes, up to its last word. Raises ClientError."""
        while True:
            message = await self._next()
            if isinstance(message, Done):
                return message
            if isinstance(message, Progress):
                self.progress = message
                show()

    def write(self, data: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(frame(data))

    def stop(self) -> None:
        """Whatever comes on stdin after the start ends it."""
        self.write(b"")

    async def close(self) -> None:
        if self.process is None:
            return
        if self.process.returncode is None and self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    async def _next(self) -> FromClient:
        assert self.process is not None and self.process.stdout is not None
        try:
            (length,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
            return decode_message(await self.process.stdout.readexactly(length))
        except asyncio.IncompleteReadError:
            status = await self.process.wait()
            raise ClientError(f"a client process ended early, with exit status {status}") from None
