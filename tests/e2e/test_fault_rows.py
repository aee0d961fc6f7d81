"""Rows of the tables in docs/operations.md that no other file of this folder has: what clients see, and that nothing is
left of their requests."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from nanovllm_bento.bench.fake_engine import TEXT
from tests.e2e.observer import Observer
from tests.e2e.scarce_engine import run_out
from tests.e2e.server import Server, serve, wait_ended
from tests.e2e.streams import Stream, until
from tests.e2e.test_faults import BODIES, FAKE, both_answer, complete, long, streaming
from tests.e2e.test_load import GAUGES, gauges
from tests.e2e.tiny import MAX_MODEL_LEN, SETTINGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KEYS: list[dict[str, Any]] = [
    {"name": "alice", "requests_per_minute": 2},
    {"name": "bob", "max_concurrency": 2},
    {"name": "carol", "tokens_per_minute": 60},
    {"name": "dave"},
]
BATCH_MAX_SECONDS = 2.0
NUM_BLOCKS = 48
"""Of the small device, of 16 tokens each: what two of BODIES need, but not all four."""


async def nothing_is_left(server: Server) -> None:
    """Nothing runs or waits and no block is in use, as the engine says and as /metrics says, ten seconds on at most."""
    with Observer(server) as observer:
        await asyncio.to_thread(observer.until_idle, 10.0)
    await until(lambda: gauges(server) == dict.fromkeys(GAUGES, 0.0), "the gauges are zero")


def complete_all(server: Server) -> list[str]:
    """What it says to BODIES, all at once."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda body: complete(server, **body), BODIES))


async def all_run(server: Server, count: int) -> None:
    with Observer(server) as observer:
        await asyncio.to_thread(observer.until, lambda s: s.num_requests_running == count, f"{count} run")


# -- over the fake engine: limits, and a request that sees too many engines die ---------------------------------------


@pytest.fixture(scope="module")
def limited(tiny_model: str) -> Iterator[Server]:
    """Two workers, four callers, 50 tokens a second."""
    settings = FAKE | {
        "workers": 2,
        "fake_tokens_per_second": 50,
        "engine_max_restarts": 50,
        "engine_max_resumes": 1,
        "api_keys": json.dumps([{**key, "key": f"{key['name']}-secret"} for key in KEYS]),
        "api_key_open_paths": "/health,/readyz,/metrics",
        "max_messages": 2,
        "max_stop_strings": 1,
        "max_stop_chars": 8,
        "max_prompt_chars": 300,
        "batch_max_seconds": BATCH_MAX_SECONDS,
    }
    with serve(tiny_model, **settings) as server:
        yield server


def headers(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-secret"}


def ask(server: Server, name: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    """An answer on a connection of its own, of whichever worker takes it."""
    body = body if "messages" in body or "requests" in body else {"prompt": "Hi", "max_tokens": 2} | body
    return httpx.post(server.url + path, json=body, headers=headers(name), timeout=60)


async def test_a_request_that_sees_too_many_engines_die_is_not_added_again(limited: Server) -> None:
    """Another one, which has seen one death less, goes on."""

    async def kill_engine(num_running: int) -> None:
        await all_run(limited, num_running)
        lost = limited.engine_pid
        os.kill(lost, signal.SIGKILL)
        await until(lambda: limited.engine_pid != lost, "another engine is started")

    body = long({"prompt": "a"}, 3000)
    old, young = (Stream(body | {"max_tokens": n}, request_headers=headers("dave")) for n in (3000, 150))
    whole = asyncio.create_task(asyncio.to_thread(ask, limited, "dave", **body))
    old_run = asyncio.create_task(old.run(limited.url))
    await old.until_events(2)
    await kill_engine(2)
    await all_run(limited, 2)
    young_run = asyncio.create_task(young.run(limited.url))
    await young.until_events(2)
    await kill_engine(3)
    await asyncio.wait_for(asyncio.gather(old_run, young_run), 60)
    assert old.status == 200 and not old.done and not old.broken and old.text in TEXT * 40
    assert old.error is not None and old.error["code"] == "engine_dead"
    assert "ended 2 times while this request ran" in old.error["message"]
    answer = await whole
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_dead"
    assert (young.error, young.done, young.finish_reason) == (None, True, "length")
    assert len(young.text) == 150 and young.text in TEXT * 4
    await nothing_is_left(limited)


async def test_a_key_that_asks_for_too_much_gets_429_and_others_do_not(limited: Server) -> None:
    """Over both workers together."""

    def refused(answer: httpx.Response) -> bool:
        if answer.status_code == 200:
            return False
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded", answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        return True

    def requests_a_minute() -> Counter[bool]:
        return Counter(refused(ask(limited, "alice")) for _ in range(6))

    assert await asyncio.to_thread(requests_a_minute) == {False: 2, True: 4}

    streams = [Stream(long({"prompt": "a"}, 3000), request_headers=headers("bob")) for _ in range(2)]
    runs = [asyncio.create_task(stream.run(limited.url)) for stream in streams]
    for stream in streams:
        await stream.until_events(1)
    for _ in range(4):
        assert refused(await asyncio.to_thread(ask, limited, "bob"))
    assert not refused(await asyncio.to_thread(ask, limited, "dave"))
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    await until(lambda: not refused(ask(limited, "bob")), "those that have left do not count")

    assert not refused(await asyncio.to_thread(ask, limited, "carol", max_tokens=100, ignore_eos=True))
    for _ in range(4):
        assert refused(await asyncio.to_thread(ask, limited, "carol"))
    assert not refused(await asyncio.to_thread(ask, limited, "dave"))
    assert httpx.post(limited.url + "/v1/completions", json={"prompt": "a"}).status_code == 401
    await nothing_is_left(limited)


async def test_a_request_beyond_the_limits_of_one_request_is_400_and_never_reaches_the_engine(limited: Server) -> None:
    with Observer(limited) as observer:
        before = await asyncio.to_thread(observer.stats)
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}] * 3}
        for path, body, param, bound in (
            ("/v1/chat/completions", chat, "messages", "at most 2 messages"),
            ("/v1/completions", {"stop": ["a", "b"]}, "stop", "most 1 "),
            ("/v1/completions", {"stop": "123456789"}, "stop", "most 8 "),
            ("/v1/completions", {"prompt": "x" * 301}, "prompt", "300 at most"),
            ("/v1/completions", {"n": 129}, "n", "128"),
        ):
            for more in ({}, {"stream": True}):
                answer = await asyncio.to_thread(ask, limited, "dave", path, **body, **more)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
                assert bound in answer.json()["error"]["message"]
        within = {"messages": chat["messages"][:2], "stop": ["12345678"], "max_tokens": 1}
        assert (await asyncio.to_thread(ask, limited, "dave", "/v1/chat/completions", **within)).status_code == 200
        after = await asyncio.to_thread(observer.until_idle)
    assert after.generation_tokens == before.generation_tokens + 1
    await nothing_is_left(limited)


async def test_what_a_batch_has_not_done_in_its_time_has_an_error_and_the_rest_has_none(limited: Server) -> None:
    requests = [{"prompt": "a", "sampling": {"max_tokens": n, "ignore_eos": True}} for n in (3, 1000, 5)]
    async with asyncio.timeout(4 * BATCH_MAX_SECONDS):  # by itself the second item would take twenty seconds
        answer = await asyncio.to_thread(ask, limited, "dave", "/generate_batch", requests=requests)
    assert answer.status_code == 200, answer.text
    first, late, third = answer.json()
    assert [(r["error"], r["finish_reason"], len(r["text"])) for r in (first, third)] == [
        (None, "length", 3),
        (None, "length", 5),
    ]
    assert late["error"]["code"] == "deadline_exceeded" and f"{BATCH_MAX_SECONDS:g} s" in late["error"]["message"]
    await nothing_is_left(limited)


# -- over the real engine, on a device with little memory -------------------------------------------------------------


@pytest.fixture(scope="module")
def no_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file by which a test takes the devices' memory (``run_out``)."""
    return tmp_path_factory.mktemp("memory") / "none"


@pytest.fixture(scope="module")
def small(tiny_model: str, no_memory: Path) -> Iterator[Server]:
    """One worker and one engine, which is never replaced."""
    settings = SETTINGS | {"engine_module": "tests.e2e.scarce_engine", "no_memory_file": no_memory, "workers": 1}
    settings |= {"num_gpu_blocks_override": NUM_BLOCKS, "batch_max_seconds": BATCH_MAX_SECONDS, "max_model_len": 700}
    with serve(tiny_model, **settings) as server:
        engine = server.engine_pid
        yield server
        assert server.engine_pid == engine and "the engine (pid" not in server.log


@pytest.fixture(scope="module")
def texts(small: Server) -> list[str]:
    """One after the other, so that all have the room they need."""
    return [complete(small, **body) for body in BODIES]


async def test_a_step_without_memory_ends_its_requests_and_no_others(
    small: Server, no_memory: Path, texts: list[str]
) -> None:
    """First a prompt that is too long for it, while others are in the middle of their texts; then the texts."""
    async with streaming(small, [long(body) for body in BODIES[:2]]) as runs:
        run_out(no_memory, tries=2, num_tokens=150)
        prompt = {"prompt": "x" * 200, "max_tokens": 3}
        answer = await asyncio.to_thread(httpx.post, small.url + "/v1/completions", json=prompt, timeout=60)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"
        assert "no memory left for a step of 200 tokens" in answer.json()["error"]["message"]
        for stream, text in zip(await asyncio.gather(*runs), texts[:2], strict=True):
            assert (stream.error, stream.done, stream.text) == (None, True, text)
    assert no_memory.read_text() == "0 150", "it was tried twice"
    await nothing_is_left(small)

    async with streaming(small, [long(body) for body in BODIES[:2]]) as runs:
        run_out(no_memory, tries=2)
        for stream in await asyncio.wait_for(asyncio.gather(*runs), 60):
            assert stream.status == 200 and not stream.done and not stream.broken
            assert stream.error is not None and "no memory left" in stream.error["message"]
            assert 0 < len(stream.text) < 300
    await nothing_is_left(small)
    again = await asyncio.to_thread(httpx.post, small.url + "/v1/completions", json=prompt, timeout=60)
    assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] == 3
    assert await asyncio.to_thread(complete, small, **BODIES[0]) == texts[0]
    await nothing_is_left(small)


async def test_a_step_that_has_memory_at_its_second_try_costs_nothing(
    small: Server, no_memory: Path, texts: list[str]
) -> None:
    async with streaming(small, [long(BODIES[0])]) as (run,):
        run_out(no_memory, tries=1)
        stream = await run
    assert (stream.error, stream.done, stream.text) == (None, True, texts[0])
    assert no_memory.read_text().startswith("0 ")
    await nothing_is_left(small)


async def test_more_than_the_cache_holds_is_preempted_and_comes_whole(small: Server, texts: list[str]) -> None:
    with Observer(small) as observer:
        before = await asyncio.to_thread(observer.until_idle)
        assert await asyncio.to_thread(complete_all, small) == texts
        after = await asyncio.to_thread(observer.until_idle)
    assert after.num_preemptions > before.num_preemptions
    await nothing_is_left(small)


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("/generate_batch", {"prompt": "a", "sampling": {"max_tokens": 2}}),
        ("/score", {"context": "Once upon", "continuation": " a time"}),
    ],
)
async def test_a_batch_whose_step_takes_too_long_ends_in_its_time(small: Server, path: str, item: dict) -> None:
    """The engine stands still meanwhile, and goes on later with what else there is."""

    def call() -> httpx.Response:
        return httpx.post(small.url + path, json={"requests": [item] * 3}, timeout=60)

    engine = small.engine_pid
    os.kill(engine, signal.SIGSTOP)
    try:
        answer = await asyncio.to_thread(call)
    finally:
        os.kill(engine, signal.SIGCONT)
    assert answer.status_code == 200, answer.text
    assert [result["error"]["code"] for result in answer.json()] == ["deadline_exceeded"] * 3
    await nothing_is_left(small)
    assert [result["error"] for result in (await asyncio.to_thread(call)).json()] == [None] * 3
    await nothing_is_left(small)


# -- over two ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranked(tiny_model: str, no_memory: Path) -> Iterator[Server]:
    """An engine of two ranks, which may be restarted as often as the tests of this module need."""
    settings = SETTINGS | {"engine_module": "tests.e2e.scarce_engine", "no_memory_file": no_memory, "workers": 1}
    settings |= {"tensor_parallel_size": 2, "tensor_parallel_timeout": 3, "engine_max_restarts": 50}
    with serve(tiny_model, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def expected(ranked: Server) -> list[str]:
    """What ranks that nothing happens to say to BODIES."""
    return complete_all(ranked)


def other_rank(server: Server) -> psutil.Process:
    (rank,) = (p for p in psutil.Process(server.engine_pid).children() if any("rank_worker" in w for w in p.cmdline()))
    return rank


@pytest.mark.parametrize("fault", ["killed", "stopped", "no memory"])
async def test_streams_go_on_with_the_same_tokens_when_a_rank_is_lost(
    ranked: Server, no_memory: Path, expected: list[str], fault: str
) -> None:
    """Or when one cannot compute a step, which the others are in the middle of."""
    whole = asyncio.create_task(asyncio.to_thread(complete, ranked, **BODIES[2]))
    async with streaming(ranked, [long(body) for body in BODIES]) as runs:
        await all_run(ranked, 5)
        engine, rank = ranked.engine_pid, other_rank(ranked)
        lost = {pid: started for pid, started in ranked.processes().items() if pid in (engine, rank.pid)}
        if fault == "no memory":
            run_out(no_memory, tries=1)
        else:
            rank.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        await until(lambda: not ranked.is_ready, "readiness falls")
        for stream, text in zip(await asyncio.gather(*runs), expected, strict=True):
            assert (stream.error, stream.broken, stream.done, stream.finish_reason) == (None, False, True, "length")
            assert stream.text == text
    assert await whole == expected[2]
    assert ranked.engine_pid != engine and other_rank(ranked).pid != rank.pid
    assert await asyncio.to_thread(wait_ended, lost) == []
    named = "no memory for" if fault == "no memory" else f"tensor-parallel rank 1 (pid {rank.pid})"
    assert named in ranked.log and "5 open requests go on" in ranked.log
    await until(lambda: ranked.is_ready, "ready again")
    await nothing_is_left(ranked)


# -- starts and ends --------------------------------------------------------------------------------------------------


async def test_a_model_that_has_no_room_is_told_and_not_tried_again(tiny_model: str) -> None:
    settings = SETTINGS | {"max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": 8}
    with serve(tiny_model, wait=False, **settings) as server:
        await asyncio.to_thread(server.wait_for_failure)
        why = f"max_model_len={MAX_MODEL_LEN} does not fit the KV cache"
        health = httpx.get(server.url + "/health")
        assert health.status_code == 503 and why in health.text and why in server.log
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and why in answer.json()["error"]["message"]
        assert (Path(server.ipc_dir) / "epoch").read_text() == "0", "started once"


async def test_ctrl_c_drains_as_sigterm_does(tiny_model: str) -> None:
    """A terminal sends it to every process of the group, workers too."""
    with serve(tiny_model, **FAKE, fake_tokens_per_second=50, workers=2) as server:
        await both_answer(server)
        processes = server.processes()
        async with streaming(server, [long({"prompt": "a"}, 100)] * 4) as runs:
            os.killpg(server.process.pid, signal.SIGINT)
            for stream in await asyncio.wait_for(asyncio.gather(*runs), 30):
                assert (stream.error, stream.done, len(stream.text)) == (None, True, 100)
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        assert await asyncio.to_thread(wait_ended, processes) == []
        assert not Path(server.ipc_dir).exists()
