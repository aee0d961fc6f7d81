"""What BentoML's adaptive batching gains for ``score`` and ``generate_batch``, and why chat does not go through it.

Against a real server (``bentoml serve``), of both methods:

- one item a call, one call after the other: what they reach without batching;
- one item a call from many callers at once, which the dispatcher gathers, and one call with all items;

and of generation alone:

- short requests that come while a long one runs: behind it in a batch, or beside it at /v1/completions;
- short and long items from many callers at once: every answer's status, and what a call alone takes right after.

``python -m nanovllm_bento.bench.batching --output benchmarks/results/batching_cpu.json``
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

import nanovllm_bento
from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.offline import model_name
from nanovllm_bento.bench.startup import free_port

TOKEN_IDS = range(300, 1300)
"""Ids that every vocabulary holds."""
START_TIMEOUT = 600.0  # seconds


def run(
    *,
    model: str = "demo",
    num_items: int = 64,
    num_callers: int = 32,
    context_len: int = 48,
    continuation_len: int = 4,
    max_tokens: int = 8,
    long_tokens: int = 64,
    seed: int = 0,
    **settings: object,
) -> dict[str, Any]:
    """All measurements; ``settings`` are NANOVLLM_* settings of the server. Lengths in tokens, times in seconds."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return draw.choices(TOKEN_IDS, k=length)

    scores: list[dict[str, Any]] = [
        {"context_token_ids": ids(context_len), "continuation_token_ids": ids(continuation_len)}
        for _ in range(num_items)
    ]
    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    prompts = [{"prompt_token_ids": ids(context_len), "sampling": sampling} for _ in range(num_items)]
    work: dict[str, list[dict[str, Any]]] = {"score": scores, "generate_batch": prompts}
    shared = {"model": model, "enable_prefix_caching": False, **settings}
    result: dict[str, Any] = {
        "benchmark": "batching",
        "environment": environment(),
        "model": model_name(model),
        "workload": {
            "num_items": num_items,
            "num_callers": num_callers,
            "context_len": context_len,
            "continuation_len": continuation_len,
            "max_tokens": max_tokens,
            "long_tokens": long_tokens,
            "seed": seed,
            "prefix_caching": False,
        },
    }
    result |= asyncio.run(_measure(work, num_callers, long_tokens, shared))
    for name in work:
        alone, together = (result[name][how]["items_per_s"] for how in ("one_item_at_a_time", "many_callers"))
        result[name]["gain"] = round(together / alone, 2)
    return result


async def _measure(
    work: dict[str, list[dict[str, Any]]], num_callers: int, long_tokens: int, settings: dict[str, object]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    async with _server(settings) as client:
        for name, items in work.items():
            _say(f"{name}: one item at a time")
            # The dispatcher also learns from these what a batch costs; its first calls are always batches of one.
            result[name] = {"one_item_at_a_time": await _calls(client, name, items[:24], 1)}
            _say(f"{name}: many callers")
            result[name]["many_callers"] = await _calls(client, name, items, num_callers)
            _say(f"{name}: one call")
            started = time.perf_counter()
            answer = await client.post(f"/{name}", json={"requests": items})
            seconds = time.perf_counter() - started
            assert all(r["error"] is None for r in answer.raise_for_status().json())
            result[name]["one_call_with_all"] = {"items_per_s": round(len(items) / seconds, 2)}
        _say("short behind long")
        result["short_behind_long"] = await _short_behind_long(client, long_tokens)
        _say("short and long from many callers")
        result["mixed"] = await _mixed(client, work["generate_batch"], num_callers, long_tokens)
    return result


async def _calls(client: httpx.AsyncClient, name: str, items: Sequence[dict[str, Any]], callers: int) -> dict[str, Any]:
    """One item a call, ``callers`` at a time."""
    free = asyncio.Semaphore(callers)

    async def call(item: dict[str, Any]) -> float:
        async with free:
            started = time.perf_counter()
            answer = await client.post(f"/{name}", json={"requests": [item]})
            assert answer.raise_for_status().json()[0]["error"] is None, answer.text
            return time.perf_counter() - started

    started = time.perf_counter()
    seconds = await asyncio.gather(*map(call, items))
    return {"items_per_s": round(len(items) / (time.perf_counter() - started), 2), **_latency(seconds)}


async def _short_behind_long(client: httpx.AsyncClient, long_tokens: int, repeat: int = 3) -> dict[str, Any]:
    """A request of 4 tokens that comes while one of ``long_tokens`` runs: in a batch, and as a stream of its own."""

    async def batched(tokens: int) -> float:
        item = {"prompt_token_ids": [300], "sampling": {"max_tokens": tokens, "ignore_eos": True}}
        return await _timed(client, "/generate_batch", {"requests": [item]})

    async def continuous(tokens: int) -> float:
        return await _timed(client, "/v1/completions", {"prompt": [300], "max_tokens": tokens, "ignore_eos": True})

    result: dict[str, Any] = {"short_tokens": 4, "long_tokens": long_tokens}
    for name, request in (("generate_batch", batched), ("continuous", continuous)):
        short, long = [], []
        for _ in range(repeat):
            first = asyncio.create_task(request(long_tokens))
            await asyncio.sleep(0.1)
            short.append(await request(4))
            long.append(await first)
        result[name] = {
            "short_s": round(statistics.median(short), 3),
            "long_s": round(statistics.median(long), 3),
        }
    return result


async def _mixed(
    client: httpx.AsyncClient, items: Sequence[dict[str, Any]], callers: int, long_tokens: int
) -> dict[str, Any]:
    """Every eighth item is long; then one short call alone, which waits for companions that do not come."""
    free, statuses = asyncio.Semaphore(2 * callers), Counter[int]()

    async def call(i: int, item: dict[str, Any]) -> float:
        tokens = long_tokens if i % 8 == 0 else 4
        async with free:
            started = time.perf_counter()
            body = {"requests": [{**item, "sampling": {**item["sampling"], "max_tokens": tokens}}]}
            answer = await client.post("/generate_batch", json=body)
            statuses[answer.status_code] += 1
            return time.perf_counter() - started

    seconds = await asyncio.gather(*(call(i, item) for i, item in enumerate([*items, *items])))
    alone = [await call(1, items[0]) for _ in range(10)]
    return {
        "callers": 2 * callers,
        "calls": len(seconds),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        **_latency(seconds),
        "alone_after_it": _latency(alone),
    }


async def _timed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> float:
    started = time.perf_counter()
    (await client.post(path, json=body)).raise_for_status()
    return time.perf_counter() - started


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
    }


@asynccontextmanager
async def _server(settings: dict[str, object]) -> AsyncIterator[httpx.AsyncClient]:
    """A ready server, and a client of it. Raises RuntimeError with its last lines if it does not come up."""
    port = free_port()
    env = os.environ | {f"NANOVLLM_{name.upper()}": str(value) for name, value in settings.items()}
    folder = str(Path(nanovllm_bento.__file__).parents[1])
    command = [sys.executable, "-m", "bentoml", "serve", "service:NanoVLLM", "--working-dir", folder]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=1800, trust_env=False, limits=limits
            ) as client:
                deadline = time.monotonic() + START_TIMEOUT
                while not await _is_ready(client):
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        tail = log.read().decode(errors="replace").splitlines()[-15:]
                        raise RuntimeError("the server did not start:\n" + "\n".join(tail))
                    await asyncio.sleep(0.05)
                yield client
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-items", type=int, default=64)
    parser.add_argument("--num-callers", type=int, default=32)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end the server on the way
    result = run(model=given.model, num_items=given.num_items, num_callers=given.num_callers)
    result["environment"]["command"] = f"python -m nanovllm_bento.bench.batching --num-items {given.num_items}"
    write_result(result, given.output)


if __name__ == "__main__":
    main()
