"""What the middlewares before every route, and admission, cost a request in CPU time.

    python benchmarks/guard_cost.py [--output FILE]

Each is called on raw ASGI around an application that does nothing, with the headers that a usual client sends; the
cost of that application alone is taken off. Medians of ``--repeat`` rounds, in microseconds of this process's CPU.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.serving.admission import Admission
from nanovllm_bento.serving.auth import ANONYMOUS, Caller
from nanovllm_bento.serving.middleware import protect

HEADERS = [
    (b"host", b"127.0.0.1:3000"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"user-agent", b"OpenAI/Python 2.0"),
    (b"content-type", b"application/json"),
    (b"content-length", b"145"),
    (b"authorization", b"Bearer key-number-0-of-many"),
]
ROUNDS = 20_000


async def application(scope: Any, receive: Any, send: Any) -> None:
    await receive()


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Any) -> None:
    pass


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": HEADERS,
    }


def keys(number: int) -> str:
    return ",".join(f"caller{i}:key-number-{i}-of-many" for i in range(number))


async def requests(app: Callable[..., Awaitable[None]]) -> None:
    for _ in range(ROUNDS):
        await app(scope(), receive, send)


async def admissions(admission: Admission, caller: Caller) -> None:
    for _ in range(ROUNDS):
        admission.check(caller, 1)
        with admission.admit(caller, 1, 100) as ticket:
            await ticket.turn()
            ticket.charge(100)


def microseconds(work: Callable[[], Coroutine[Any, Any, None]], repeat: int) -> float:
    """CPU time of one of ROUNDS, median."""
    found = []
    for _ in range(repeat):
        began = time.process_time()
        asyncio.run(work())
        found.append((time.process_time() - began) / ROUNDS * 1e6)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    def config(**settings: Any) -> ServiceConfig:
        return ServiceConfig.create(env={}, **settings)

    apps = {
        "guard (always there)": config(),
        "guard, 1 key": config(api_keys=keys(1)),
        "guard, 10 keys": config(api_keys=keys(10)),
        "guard, 100 keys": config(api_keys=keys(100)),
        "guard, 10 keys, CORS": config(api_keys=keys(10), cors_allow_origins="https://app.example"),
    }
    nothing = microseconds(lambda: requests(application), options.repeat)
    result = {
        name: microseconds(partial(requests, protect(application, settings)), options.repeat) - nothing
        for name, settings in apps.items()
    }
    alice = Caller("alice")
    rates = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12}
    with tempfile.TemporaryDirectory() as folder:
        admissions_of = {
            "admission, no keys": (Admission(config(), max_num_seqs=256), ANONYMOUS),
            "admission, keys": (Admission(config(), max_num_seqs=256), alice),
            "admission, rates in one process": (Admission(config(**rates), max_num_seqs=256), alice),
            "admission, rates shared by workers": (
                Admission(config(**rates, max_concurrency_per_key=10), folder=Path(folder), max_num_seqs=256),
                alice,
            ),
        }
        for name, (admission, caller) in admissions_of.items():
            result[name] = microseconds(lambda a=admission, c=caller: admissions(a, c), options.repeat)  # type: ignore[misc]
            admission.close()
    rounded = {name: round(cost, 2) for name, cost in result.items()}
    write_result({"environment": environment(), "microseconds_per_request": rounded}, options.output)
    for name, cost in rounded.items():
        print(f"{name:40} {cost:8.2f} µs")


if __name__ == "__main__":
    main()
