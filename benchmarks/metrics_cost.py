"""What observing costs an API worker: a chunk, a request, a scrape, and a line of the access log.

    python benchmarks/metrics_cost.py [--output FILE]

CPU time of this one process, the least of several rounds, because everything else on a machine only adds to it.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.engine.messages import EngineStats
from nanovllm_bento.log_format import set_up
from nanovllm_bento.serving.logs import AccessLog, request_id_of
from nanovllm_bento.serving.metrics import Metrics

ROUNDS = 60
NUM_WORKERS = 4


def cost(function: Callable[[], None], number: int) -> float:
    """CPU microseconds of one call."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(number):
            function()
        best = min(best, time.process_time() - started)
    return best / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the result; without it, it is printed")
    arguments = parser.parse_args()
    config = ServiceConfig.create(env={}, access_log=True)
    with tempfile.TemporaryDirectory() as folder:
        workers = [Metrics(config, "model", Path(folder)) for _ in range(NUM_WORKERS)]
        metrics = workers[0]
        running = metrics.request(512, 0.0, max_tokens=128)
        running.first(1.0, 0.5, 1, 0)
        now = 1.0

        def chunk() -> None:
            nonlocal now
            now += 0.002
            running.tokens(now, 1)

        def joined_chunk() -> None:
            nonlocal now
            now += 0.008
            running.tokens(now, 4)

        def empty() -> None:
            nonlocal now
            now += 0.002

        def request() -> None:
            one = metrics.request(512, 0.0, max_tokens=128)
            one.first(1.0, 0.5, 1, 0)
            one.finish(2.0, "length")

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"x-request-id", b"0123456789ab")]
        set_up("json", "worker", stream=io.StringIO())
        log, one = AccessLog.create(config), metrics.request(512, 0.0)
        one.first(1.0, 0.5, 1, 0)
        one.finish(2.0, "length")
        assert log is not None
        write, arrived = log.write, time.monotonic()
        overhead = cost(empty, 20_000)
        microseconds = {
            "chunk of 1 token": cost(chunk, 20_000) - overhead,
            "chunk of 4 tokens": cost(joined_chunk, 20_000) - overhead,
            "request: begin, first token, end": cost(request, 5_000),
            "request id of a client": cost(lambda: _ignore(request_id_of(headers)), 20_000),
            "line of the access log (off by default)": cost(
                lambda: write("0123456789ab", "/v1/completions", 200, arrived, [one]), 2_000
            ),
            f"scrape of {NUM_WORKERS} workers": cost(lambda: _ignore(metrics.render(EngineStats())), 20),
        }
        for worker in workers:
            worker.close()
    result = {"environment": environment(), "cpu_microseconds": {k: round(v, 3) for k, v in microseconds.items()}}
    write_result(result, arguments.output)


def _ignore(value: object) -> None:
    pass


if __name__ == "__main__":
    main()
