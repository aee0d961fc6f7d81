"""Many slow streams for a long time: ``python -m benchmarks.soak --minutes 30``.

--concurrency streams (1,000) are held open against ``bentoml serve`` over the fake engine, which gives each of them
--rate tokens a second (20). A stream that ends is followed by another. Measured: the gaps between a stream's chunks as
its client sees them, against the token interval; the time to a stream's first chunk; memory and CPU time of the
service's processes, sampled every few seconds; errors. Clients are processes of their own on raw sockets, on the same
cores as the server, and say what share of a core they took. They read every stream to its end and know what is in it:
a piece of the fake engine's text without a gap, and as many tokens as were asked for.

Passes when the 99th percentile of the gaps is at most --max-gap times the token interval (2), no stream had an error,
was incomplete or fell silent, the service's memory in the last quarter is at most --max-growth times that of the second
quarter (1.05), and nothing of a request is left in it once the clients have gone.

A short form runs in tests/e2e/test_soak.py.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import sys
import time
from array import array
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/soak.py`

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.fake_engine import TEXT

if TYPE_CHECKING:
    from tests.e2e.server import Server

BUCKET = 0.001  # seconds
NUM_BUCKETS = 20_000  # the last one holds all that is longer
SILENT_SECONDS = 5.0  # without a chunk at the end: such a gap has no end, and would be in no histogram
NUM_STORIES = 500  # different prompts; the tokenizer keeps up to 10,000 words that it has seen, which is no leak
LEAVE_SECONDS = 30.0  # for the service to end what the clients have left
_CONTENT = re.compile(rb'"content":"([^"]*)"')
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass
class Histogram:
    """Durations in buckets of a millisecond."""

    counts: "array[int]" = field(default_factory=lambda: array("q", bytes(8 * NUM_BUCKETS)))
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[min(int(seconds / BUCKET), NUM_BUCKETS - 1)] += 1
        if seconds > self.longest:
            self.longest = seconds

    def join(self, other: "Histogram") -> None:
        self.counts = array("q", map(int.__add__, self.counts, other.counts))
        self.longest = max(self.longest, other.longest)

    def summary(self) -> dict[str, float]:
        """Milliseconds; percentiles are the upper end of their bucket."""
        total, seen = sum(self.counts), 0
        wanted = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
        result: dict[str, float] = {"count": total}
        for bucket, count in enumerate(self.counts):
            seen += count
            for name, share in wanted.items():
                if name not in result and total and seen >= share * total:
                    result[name] = (bucket + 1) * BUCKET * 1e3
        return {**result, "max": round(self.longest * 1e3, 1)}


@dataclass
class Seen:
    """What the streams of one client process saw. gaps, first and chunks: while measuring was on.

    tokens, characters: of the streams that finished; the first as the service counts, the second as they came.
    """

    gaps: Histogram = field(default_factory=Histogram)
    first: Histogram = field(default_factory=Histogram)
    chunks: int = 0
    begun: int = 0
    finished: int = 0
    open_at_end: int = 0
    tokens: int = 0
    characters: int = 0
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0
    cpu_seconds: float = 0.0
    measuring: bool = False

    def fail(self, why: str) -> None:
        self.num_errors += 1
        if len(self.errors) < 20:
            self.errors.append(why)


class _Stream(asyncio.Protocol):
    """One streamed answer. Its events are only scanned for what is counted."""

    def __init__(self, request: bytes, max_tokens: int, seen: Seen, ended: asyncio.Future[None]) -> None:
        self.request, self.max_tokens, self.seen, self.ended = request, max_tokens, seen, ended
        self.rest = b""  # of a line
        self.text: list[bytes] = []
        self.num_tokens = 0
        self.begun = False
        self.at = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.at = time.perf_counter()
        self.seen.begun += 1
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now, seen = time.perf_counter(), self.seen
        if not self.begun:
            self.begun = True
            if not data.startswith(b"HTTP/1.1 200"):
                self._end(data[:200].decode("latin-1"))
                return
            if seen.measuring:
                seen.first.add(now - self.at)
        elif seen.measuring:
            seen.gaps.add(now - self.at)
        self.at = now
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                seen.chunks += seen.measuring
                self._take(line)

    def _take(self, line: bytes) -> None:
        if (content := _CONTENT.search(line)) is not None:
            self.text.append(content[1])
        elif (tokens := _TOKENS.search(line)) is not None:
            self.num_tokens = int(tokens[1])
        elif b'"error"' in line:
            self._end(line[:300].decode("latin-1"))
        elif line == b"data: [DONE]":
            self._finish()

    def _finish(self) -> None:
        text = b"".join(self.text).decode()
        if self.num_tokens != self.max_tokens:
            self._end(f"a stream ended after {self.num_tokens} of {self.max_tokens} tokens")
        elif text not in TEXT * (len(text) // len(TEXT) + 2):
            self._end(f"something is missing or wrong in a stream: {text[:300]!r}")
        else:
            self.seen.finished += 1
            self.seen.tokens += self.num_tokens
            self.seen.characters += len(text)
            self._end()

    def _end(self, why: str | None = None) -> None:
        """It is over; ``why``: not as it should be. Only the first time counts."""
        if not self.ended.done():
            self.ended.set_result(None)
            if why is not None:
                self.seen.fail(why)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"a stream broke off: {exc}")


@dataclass(frozen=True)
class Load:
    """``streams`` at a time, the first of them within ``ramp_seconds``; each lasts so long as is drawn from ``seconds``
    (from, to), at ``rate`` tokens a second."""

    streams: int
    rate: float
    ramp_seconds: float
    seconds: tuple[float, float]


def client(url: str, load: Load, seed: int, measure: Event, stop: Event, out: Any) -> None:
    """A client process: its load until ``stop``; what it has seen goes into the queue ``out``."""
    try:
        import uvloop

        seen = uvloop.run(_client(url, load, random.Random(seed), measure, stop))
    except Exception as exc:
        seen = Seen()
        seen.fail(f"the client process failed: {exc!r}")
    out.put(seen)


async def _client(url: str, load: Load, rng: random.Random, measure: Event, stop: Event) -> Seen:
    seen = Seen()
    open_streams: set[_Stream] = set()
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    host, port = parts.hostname, parts.port
    loop = asyncio.get_running_loop()

    async def hold(delay: float) -> None:
        await asyncio.sleep(delay)
        while not stop.is_set():
            max_tokens = max(1, int(load.rate * rng.uniform(*load.seconds)))
            body = {
                "messages": [{"role": "user", "content": f"Tell me story {rng.randrange(NUM_STORIES)}."}],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            data = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(data)}\r\n\r\n"
            stream = _Stream(head.encode() + data, max_tokens, seen, loop.create_future())
            try:
                await loop.create_connection(lambda stream=stream: stream, host, port)  # type: ignore[misc]
                open_streams.add(stream)
                await stream.ended
                open_streams.discard(stream)
            except OSError as exc:
                seen.fail(f"no connection: {exc}")
                await asyncio.sleep(1)

    holders = [asyncio.create_task(hold(rng.uniform(0, load.ramp_seconds))) for _ in range(load.streams)]
    started = 0.0
    while not stop.is_set():
        await asyncio.sleep(0.1)
        if measure.is_set() and not seen.measuring:
            seen.measuring, started = True, time.process_time()
    seen.measuring = False
    seen.cpu_seconds = time.process_time() - started
    seen.open_at_end = len(open_streams)
    for stream in open_streams:
        if (silent := time.perf_counter() - stream.at) > SILENT_SECONDS:
            seen.fail(f"a stream has been silent for {silent:.1f} s")
    for holder in holders:
        holder.cancel()
    for failure in await asyncio.gather(*holders, return_exceptions=True):
        if isinstance(failure, Exception):
            seen.fail(f"a stream's task failed: {failure!r}")
    return seen


def sample(pids: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """By kind of process: resident MiB and CPU seconds of all of that kind."""
    result = {}
    for kind, members in pids.items():
        processes = [psutil.Process(pid) for pid in members]
        times = [p.cpu_times() for p in processes]
        result[kind] = {
            "rss_mib": round(sum(p.memory_info().rss for p in processes) / 2**20, 2),
            "cpu_seconds": round(sum(t.user + t.system for t in times), 2),
        }
    return result


def what_is_left(server: "Server", workers: list[int]) -> dict[str, int]:
    """What the service still holds of the clients' requests, once that is nothing or LEAVE_SECONDS have passed."""
    from tests.e2e.observer import Observer

    until = time.monotonic() + LEAVE_SECONDS
    with Observer(server) as observer:
        while True:
            stats = observer.stats()
            connections = [c for pid in workers for c in psutil.Process(pid).net_connections("tcp") if c.raddr]
            left = {
                "requests": stats.num_requests_running + stats.num_requests_waiting,
                "blocks": stats.num_blocks_used,
                "connections": len(connections),
            }
            if not any(left.values()) or time.monotonic() > until:
                return left


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run it; the result without the environment."""
    from tests.e2e.server import serve

    settings: dict[str, Any] = {
        "engine_module": "nanovllm_bento.bench.fake_engine",
        "fake_tokens_per_second": options.rate,
        "max_num_seqs": options.concurrency,
        "max_waiting_requests": 2 * options.concurrency,
        "workers": options.workers,
    }
    if options.stream_interval is not None:
        settings["stream_interval"] = options.stream_interval
    context = multiprocessing.get_context("spawn")
    with serve(options.model, **settings) as server:
        pids = {"main": [server.process.pid], "workers": server.worker_pids, "engine": [server.engine_pid]}
        measure, stop, out = context.Event(), context.Event(), context.Queue()
        share = [options.concurrency // options.clients] * options.clients
        share[0] += options.concurrency % options.clients
        loads = [Load(streams, options.rate, options.ramp_seconds, tuple(options.stream_seconds)) for streams in share]
        clients = [
            context.Process(target=client, args=(server.url, load, i, measure, stop, out))
            for i, load in enumerate(loads)
        ]
        for process in clients:
            process.start()
        time.sleep(2 * options.ramp_seconds)
        measure.set()
        begun = time.monotonic()
        samples = [sample(pids)]
        times = [0.0]
        while (now := time.monotonic() - begun) < 60 * options.minutes:
            time.sleep(min(options.sample_seconds, 60 * options.minutes - now))
            times.append(round(time.monotonic() - begun, 1))
            samples.append(sample(pids))
            rss = ", ".join(f"{kind} {values['rss_mib']:.0f}" for kind, values in samples[-1].items())
            print(f"{times[-1]:7.0f} s  RSS in MiB: {rss}", file=sys.stderr, flush=True)
        seconds = time.monotonic() - begun
        stop.set()
        total = Seen()
        cpu = []
        for _ in clients:
            seen = out.get(timeout=60)
            total.gaps.join(seen.gaps)
            total.first.join(seen.first)
            total.chunks += seen.chunks
            total.begun += seen.begun
            total.finished += seen.finished
            total.open_at_end += seen.open_at_end
            total.tokens += seen.tokens
            total.characters += seen.characters
            total.errors += seen.errors
            total.num_errors += seen.num_errors
            cpu.append(round(seen.cpu_seconds / seconds, 3))
        for process in clients:
            process.join()
        left = what_is_left(server, pids["workers"])
    gaps = total.gaps.summary()
    return {
        "settings": settings
        | {"minutes": options.minutes, "client_processes": options.clients}
        | {"stream_seconds": list(options.stream_seconds), "ramp_seconds": options.ramp_seconds},
        "token_interval_ms": 1e3 / options.rate,
        "gap_ms": gaps,
        "first_chunk_ms": total.first.summary(),
        "p99_gap_in_token_intervals": round(gaps.get("p99", 0.0) * options.rate / 1e3, 3),
        "chunks": total.chunks,
        "chunks_per_second": round(total.chunks / seconds, 1),
        "tokens_per_second_offered": options.concurrency * options.rate,
        "streams_begun": total.begun,
        "streams_finished": total.finished,
        "streams_open_at_end": total.open_at_end,
        "tokens_of_finished": total.tokens,
        "characters_of_finished": total.characters,
        "left": left,
        "num_errors": total.num_errors,
        "errors": total.errors[:20],
        "cores": {
            kind: round((samples[-1][kind]["cpu_seconds"] - samples[0][kind]["cpu_seconds"]) / seconds, 3)
            for kind in pids
        }
        | {"clients": cpu},
        "growth": {kind: _growth([s[kind]["rss_mib"] for s in samples]) for kind in pids},
        "rss_mib": {"seconds": times} | {kind: [s[kind]["rss_mib"] for s in samples] for kind in pids},
    }


def _growth(rss: list[float]) -> float:
    """Mean of the last quarter over the mean of the second."""
    quarter = max(1, len(rss) // 4)
    second, last = rss[quarter : 2 * quarter] or rss[:1], rss[-quarter:]
    return round((sum(last) / len(last)) / (sum(second) / len(second)), 4)


def why_failed(result: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What is not as it must be, in words."""
    gap = result["p99_gap_in_token_intervals"]
    checks = {
        "no gaps were measured": result["gap_ms"]["count"] > 0,
        f"p99 of the gaps is {gap} token intervals": gap <= options.max_gap,
        f"{result['num_errors']} errors: {result['errors'][:3]}": result["num_errors"] == 0,
        f"the service still holds {result['left']}": not any(result["left"].values()),
    }
    for kind, growth in result["growth"].items():
        checks[f"memory of {kind} grew to {growth} times what it was"] = growth <= options.max_growth
    return [what for what, holds in checks.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=1000, help="streams at a time")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens a second of each stream")
    parser.add_argument(
        "--stream-seconds", type=float, nargs=2, default=(30.0, 90.0), metavar=("FROM", "TO"), help="length of a stream"
    )
    parser.add_argument(
        "--ramp-seconds", type=float, default=10.0, help="the streams begin within these; measured from twice that on"
    )
    parser.add_argument("--workers", type=int, default=1, help="API workers")
    parser.add_argument("--stream-interval", type=int, help="tokens in a chunk; default: the service's, adaptive")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--model", default="demo", help="whose tokenizer and limits the fake engine takes")
    parser.add_argument("--sample-seconds", type=float, default=5.0)
    parser.add_argument("--max-gap", type=float, default=2.0, help="token intervals")
    parser.add_argument("--max-growth", type=float, default=1.05)
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args()
    result = soak(options)
    failures = why_failed(result, options)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    write_result({"environment": environment(), "passed": not failures, "failures": failures, **result}, options.output)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
