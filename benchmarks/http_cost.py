"""What a request and a streamed chunk cost the API worker in CPU time: the real ``bentoml serve`` over the fake engine.

    python benchmarks/http_cost.py [--output FILE]

Beside it stands what BentoML costs by itself, measured in the same minutes (benchmarks/plain_service.py; not with
``--alone``).
The worker's own time is read from /proc (all its threads, in nanoseconds), so neither the engine, the clients nor a
busy machine count. Clients are processes of their own on raw sockets with keep-alive, ``--concurrency`` connections
in all. Four workloads:

- whole: chat requests without stream; the engine answers at once, with all tokens in one step.
- stream: the same with stream.
- steps: without stream, and the engine sends one message a token as fast as it can.
- short_chunks / long_chunks: streams of an engine with a fixed rate, where each token is a chunk of its own. The
  difference of the two, over the difference of their chunks, is the cost of a chunk.

A short form runs in tests/e2e/test_soak.py.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

from nanovllm_bento.bench.environment import environment, write_result

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "benchmarks.plain_service:Plain"
AT_ONCE = ("whole", "stream", "steps")
MESSAGES = [{"role": "user", "content": "Tell me in one sentence what a fox does."}]


@dataclass(frozen=True)
class Load:
    """``requests`` chat requests over ``concurrency`` connections."""

    requests: int
    concurrency: int
    stream: bool
    max_tokens: int


class _Connection(asyncio.Protocol):
    """Sends one request after the other; the answers are only scanned for their end and their number of events."""

    def __init__(self, request: bytes, budget: list[int], stream: bool, done: asyncio.Future[None]) -> None:
        self.request, self.budget, self.stream, self.done = request, budget, stream, done
        self.data = b""
        self.num_events = 0
        self.latencies: list[float] = []
        self.sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._next()

    def _next(self) -> None:
        if self.budget[0] <= 0:
            self.done.set_result(None)
            self.transport.close()
            return
        self.budget[0] -= 1
        self.data = b""
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.stream:
            if not self.data.endswith(b"0\r\n\r\n"):
                return
            ok = b"data: [DONE]" in self.data
        else:
            head, _, body = self.data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or -1)
            if len(body) < length:
                return
            ok = head.startswith(b"HTTP/1.1 200")
        if not ok:
            self.done.set_exception(RuntimeError(self.data[:500].decode(errors="replace")))
            self.transport.close()
            return
        self.num_events += self.data.count(b"data: {")
        self.latencies.append(time.perf_counter() - self.sent)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the connection ended early: {exc}"))


def post(path: str, options: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    body = json.dumps(options).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def drive(port: int, request: bytes, *, total: int, concurrency: int, stream: bool) -> list[_Connection]:
    """Send ``request`` ``total`` times over ``concurrency`` connections; returns these once all is answered."""
    loop, budget = asyncio.get_running_loop(), [total]
    connections, ends = [], []
    for _ in range(concurrency):
        done = loop.create_future()
        factory = partial(_Connection, request, budget, stream, done)
        _, connection = await loop.create_connection(factory, "127.0.0.1", port)
        connections.append(connection)
        ends.append(done)
    await asyncio.gather(*ends)
    return connections


async def _drive(port: int, load: Load) -> dict[str, Any]:
    options = {"messages": MESSAGES, "stream": load.stream, "max_tokens": load.max_tokens, "seed": 1}
    request = post("/v1/chat/completions", {**options, "ignore_eos": True})
    before = time.process_time()
    connections = await drive(port, request, total=load.requests, concurrency=load.concurrency, stream=load.stream)
    return {
        "events": sum(c.num_events for c in connections),
        "latencies": [latency for c in connections for latency in c.latencies],
        "cpu_s": time.process_time() - before,
    }


def _client(arguments: tuple[int, Load]) -> dict[str, Any]:
    return uvloop.run(_drive(*arguments))


@contextmanager
def served(service: str, port: int, environ: dict[str, str]) -> Iterator[list[int]]:
    """``bentoml serve`` of a service over the fake engine; yields the pids of its API workers."""
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(port)],
                cwd=ROOT,
                env=os.environ | environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_ready(process, port, log)
            yield _workers(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")


def _workers(parent: int) -> list[int]:
    """The API workers below a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            if b"_bentoml_impl.worker.service" in command and _parent(path) == parent:
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)


def _parent(path: Path) -> int:
    return int((path / "stat").read_text().rpartition(")")[2].split()[1])


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process that still run."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def measure(port: int, workers: list[int], load: Load, num_clients: int) -> dict[str, Any]:
    """One load; its cost to the workers."""
    parts = [
        (port, Load(load.requests // num_clients, load.concurrency // num_clients, load.stream, load.max_tokens))
    ] * num_clients
    with get_context("spawn").Pool(num_clients) as pool:
        pool.map(_client, [(port, Load(1, 1, load.stream, load.max_tokens))] * num_clients)  # imports, connections
        before, started = sum(map(cpu_seconds, workers)), time.perf_counter()
        results = pool.map(_client, parts)
        cpu, wall = sum(map(cpu_seconds, workers)) - before, time.perf_counter() - started
    latencies = sorted(latency for result in results for latency in result["latencies"])
    return {
        "requests": len(latencies),
        "events": sum(r["events"] for r in results),
        "tokens": len(latencies) * load.max_tokens,
        "seconds": round(wall, 2),
        "requests_per_s": round(len(latencies) / wall, 1),
        "worker_cpu_us_per_request": round(cpu / len(latencies) * 1e6, 1),
        "worker_cpu_share": round(cpu / wall, 3),
        "client_cpu_share": round(max(r["cpu_s"] for r in results) / wall, 3),
        "latency_ms": {
            "p50": round(statistics.median(latencies) * 1e3, 2),
            "p99": round(latencies[int(len(latencies) * 0.99)] * 1e3, 2),
        },
    }


def costs(service: str, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """All workloads of one service."""
    results: dict[str, Any] = {}
    size, n = args.max_tokens, args.requests
    at_once = {"NANOVLLM_FAKE_TOKENS_PER_SECOND": "0", "NANOVLLM_FAKE_TOKENS_PER_STEP": str(size)}
    with served(service, port, at_once) as workers:
        for name, stream in (("whole", False), ("stream", True)):
            measure(port, workers, Load(n // 8, args.concurrency, stream, size), args.clients)
            results[name] = measure(port, workers, Load(n, args.concurrency, stream, size), args.clients)
    with served(service, port, {"NANOVLLM_FAKE_TOKENS_PER_SECOND": "0"}) as workers:
        measure(port, workers, Load(n // 8, args.concurrency, False, size), args.clients)
        results["steps"] = measure(port, workers, Load(n, args.concurrency, False, size), args.clients)
    one_by_one = {"NANOVLLM_FAKE_TOKENS_PER_SECOND": str(args.rate), "NANOVLLM_STREAM_INTERVAL": "1"}
    with served(service, port, one_by_one) as workers:
        for name, tokens in (("warm_up", 8), ("short_chunks", 8), ("long_chunks", 8 + int(args.seconds * args.rate))):
            load = Load(args.concurrency * (1 if tokens > 8 else 4), args.concurrency, True, tokens)
            results[name] = measure(port, workers, load, args.clients)
    short, long = results["short_chunks"], results["long_chunks"]
    chunks = long["events"] / long["requests"] - short["events"] / short["requests"]
    cost = (long["worker_cpu_us_per_request"] - short["worker_cpu_us_per_request"]) / chunks
    summary = {f"us_per_request_{name}": results[name]["worker_cpu_us_per_request"] for name in AT_ONCE}
    return {"summary": {**summary, "us_per_chunk": round(cost, 2)}, "workloads": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file (default: print)")
    parser.add_argument("--service", default="benchmarks.fake_service:NanoVLLM")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=16, help="of the whole and stream workloads")
    parser.add_argument("--rate", type=int, default=300, help="tokens a second of each stream in the chunk workloads")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the streams of long_chunks")
    parser.add_argument("--alone", action="store_true", help="do not measure BentoML by itself")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    services = {"ours": args.service} if args.alone else {"ours": args.service, "bentoml": PLAIN}
    results = {name: costs(service, port, args) for name, service in services.items()}
    result = {
        "benchmark": "http_cost",
        "environment": environment(),
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        **{name: result["summary"] for name, result in results.items()},
        "workloads": {name: result["workloads"] for name, result in results.items()},
    }
    write_result(result, args.output)


if __name__ == "__main__":
    main()
