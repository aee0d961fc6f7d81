"""Sends malformed requests to the service and says what came back: ``python -m benchmarks.fuzz --num-requests 10000``.

A run passes when no answer is a 5xx, every request that is framed as HTTP has one, every connection that the client
ended is closed, and the server is healthy after it. Without --url it starts ``bentoml serve`` of a tiny model itself.
The cases are those of benchmarks/malformed.py, by --seed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also as `python benchmarks/fuzz.py`

from benchmarks.malformed import Case, http, make_case
from nanovllm_bento.bench.environment import environment, write_result

KEPT_FAILURES = 50
CHUNK = 1 << 16


@dataclass
class Report:
    """What a run saw. ``statuses``: by kind of case, how often each status (or "closed") was its first answer."""

    statuses: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[dict[str, Any]] = field(default_factory=list)
    num_failures: int = 0
    num_5xx: int = 0

    def fail(self, index: int, case: Case, why: str) -> None:
        self.num_failures += 1
        if len(self.failures) < KEPT_FAILURES:
            head = case.data[:300].decode("latin-1")
            self.failures.append({"case": index, "kind": case.kind, "why": why, "bytes": len(case.data), "head": head})

    @property
    def totals(self) -> Counter[str]:
        return sum(self.statuses.values(), Counter[str]())


async def fuzz(
    url: str, num_requests: int, *, seed: int = 0, concurrency: int = 16, timeout: float = 60.0, start: int = 0
) -> Report:
    """Send cases ``start`` to ``start + num_requests`` of ``seed``, each on a connection of its own."""
    report = Report()
    indices = iter(range(start, start + num_requests))
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    host, port = parts.hostname, parts.port

    async def work() -> None:
        for index in indices:
            case = make_case(seed, index)
            try:
                async with asyncio.timeout(timeout):
                    answers = await _send(host, port, case)
            except TimeoutError:
                report.fail(index, case, f"nothing happened in {timeout:.0f} s")
                continue
            except OSError as exc:
                report.fail(index, case, f"no connection: {exc}")
                continue
            first = str(answers[0][0]) if answers else "left" if case.ending == "leave" else "closed"
            report.statuses[case.kind][first] += 1
            if not answers and case.ending == "answer":
                report.fail(index, case, "closed without an answer")
            for status, body in answers:
                report.num_5xx += status >= 500
                if why := _wrong(case, status, body):
                    report.fail(index, case, why)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return report


def _wrong(case: Case, status: int, body: bytes) -> str | None:
    """What is wrong with one answer."""
    if status >= 500:
        return f"status {status}: {body[:300].decode('latin-1')}"
    if status >= 400 and body.startswith(b"{") and b" /v1/" in case.data[:16]:
        error = json.loads(body).get("error")
        if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= error.keys():
            return f"not OpenAI's error object: {body[:300].decode('latin-1')}"
    if b"Traceback" in body:
        return f"a traceback: {body[:300].decode('latin-1')}"
    return None


async def _send(host: str, port: int, case: Case) -> list[tuple[int, bytes]]:
    """The (status, body) of each answer to a case; bodies are cut at CHUNK bytes."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    try:
        with contextlib.suppress(ConnectionError):  # it may refuse early, and its answer is still to be read
            writer.write(case.data)
            await writer.drain()
            if case.ending == "leave":
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return []
            if case.ending == "eof":
                writer.write_eof()
        answers = []
        head_request = case.data.startswith(b"HEAD ")
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                answers.append(await _answer(reader, head_request))
                if case.ending == "answer":
                    break
        return answers
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader, head_request: bool) -> tuple[int, bytes]:
    """One answer. Raises IncompleteReadError at the connection's end."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split(" ", 2)[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if status == 100:
        return await _answer(reader, head_request)
    if head_request or status in (101, 204, 304):
        return status, b""
    if "content-length" in headers:
        return status, await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return status, await reader.read(CHUNK)
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return status, body


async def check_healthy(url: str) -> None:
    """Raises RuntimeError unless the server is ready and completes a prompt."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    body = json.dumps({"prompt": "a", "max_tokens": 2, "ignore_eos": True}).encode()
    for data in (http(path="/health", method="GET", headers={"Content-Length": ""}), http(body)):
        async with asyncio.timeout(60):
            answers = await _send(parts.hostname, parts.port, Case("health", data))
        if [status for status, _ in answers] != [200]:
            raise RuntimeError(f"the server is not healthy: {answers}")


@contextlib.contextmanager
def own_server() -> Any:
    """The URL of a ``bentoml serve`` of a tiny model, which lives for the context."""
    from tests.e2e.server import serve
    from tests.e2e.tiny import SETTINGS, make_served_tiny

    with tempfile.TemporaryDirectory() as folder:
        make_served_tiny(Path(folder))
        with serve(folder, **SETTINGS | {"max_model_len": 256}) as server:
            yield server.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running service; default: start one of a tiny model")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(own_server())
        started = time.monotonic()
        total = Report()
        for start in range(0, options.num_requests, 500):
            count = min(500, options.num_requests - start)
            report = asyncio.run(
                fuzz(
                    url, count, seed=options.seed, concurrency=options.concurrency, timeout=options.timeout, start=start
                )
            )
            for kind, statuses in report.statuses.items():
                total.statuses[kind] += statuses
            total.failures += report.failures
            total.num_failures += report.num_failures
            total.num_5xx += report.num_5xx
            asyncio.run(check_healthy(url))
            print(f"{start + count:6d} requests, {total.num_failures} failures", file=sys.stderr, flush=True)
        seconds = time.monotonic() - started
    result = {
        "environment": environment(),
        "num_requests": options.num_requests,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "healthy_after": True,
        "statuses": dict(sorted(total.totals.items())),
        "num_5xx": total.num_5xx,
        "by_kind": {kind: dict(sorted(statuses.items())) for kind, statuses in total.statuses.items()},
        "num_failures": total.num_failures,
        "failures": list(itertools.islice(total.failures, KEPT_FAILURES)),
    }
    write_result(result, options.output)
    return 1 if total.num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
