"""How long an engine whose requests all end in one step waits for their clients' next ones: the real ``bentoml serve``.

    python -m benchmarks.turnaround [--output FILE]

Clients stream short completions of 512 token ids, one after the other on each connection, to one worker over the fake
engine, which begins a round when all of them are there: so all end in the same step. The engine notes when each
request of the next round reaches it, counted from that step. On a GPU this is time without work.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.http_cost import drive, post, served
from nanovllm_bento.bench import fake_engine
from nanovllm_bento.bench.environment import environment, write_result

_LOG, _SIZE = "TURNAROUND_LOG", "TURNAROUND_SIZE"
_WARM_UP = 3  # rounds
BODY = {"prompt": list(range(100, 612)), "stream": True, "max_tokens": 4, "seed": 1, "ignore_eos": True}


class RoundEngine(fake_engine.FakeEngine):
    """Runs its sequences in rounds of a fixed size; writes a line of arrivals, in seconds, for each but the first."""

    ended: float | None = None
    arrivals: list[float]

    def add(self, *args: Any) -> None:
        super().add(*args)
        if self.ended is not None:
            self.arrivals.append(time.perf_counter() - self.ended)

    def due(self, now: float) -> float | None:
        is_whole = self.running or len(self.waiting) == int(os.environ[_SIZE])
        return super().due(now) if is_whole else None

    def run_step(self, now: float) -> dict[bytes, list[Any]]:
        if not self.running and self.ended is not None:
            with open(os.environ[_LOG], "a") as log:
                log.write(json.dumps(self.arrivals) + "\n")
        items = super().run_step(now)
        if not self.running:
            self.ended, self.arrivals = time.perf_counter(), []
        return items


def measure(num_connections: int, num_rounds: int) -> dict[str, float]:
    """Milliseconds, medians over the rounds, until the first, half and all requests of a round have come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "arrivals"
        settings = {
            "NANOVLLM_ENGINE_MODULE": "benchmarks.turnaround",
            "NANOVLLM_WORKERS": "1",
            "NANOVLLM_FAKE_TOKENS_PER_SECOND": "100",
            _LOG: str(log),
            _SIZE: str(num_connections),
        }
        with served("service:NanoVLLM", port, {"NANOVLLM_MODEL": "demo"} | settings):
            request, total = post("/v1/completions", BODY), num_connections * num_rounds
            uvloop.run(drive(port, request, total=total, concurrency=num_connections, stream=True))
        rounds = [sorted(json.loads(line)) for line in log.read_text().splitlines()][_WARM_UP:]
    places = {"first": 0, "half": num_connections // 2, "last": num_connections - 1}
    return {
        "connections": num_connections,
        "rounds": len(rounds),
        **{f"{k}_ms": round(statistics.median(r[i] for r in rounds) * 1e3, 2) for k, i in places.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file (default: print)")
    parser.add_argument("--connections", default="1,16,64", help="of the worker, with commas")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    rows = [measure(int(n), args.rounds) for n in args.connections.split(",")]
    write_result({"benchmark": "turnaround", "environment": environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    if _LOG in os.environ:
        fake_engine.FakeEngine = RoundEngine  # type: ignore[misc]
        fake_engine.main()
    else:
        main()
