"""Processes are killed and stopped under a real service: what its clients see, and what is left afterwards."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from nanovllm_bento.bench.fake_engine import TEXT
from tests.e2e.observer import Observer, supervisor
from tests.e2e.server import Server, kill, serve, start_time, wait_ended
from tests.e2e.streams import Stream, until
from tests.e2e.tiny import SETTINGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FAKE: dict[str, Any] = SETTINGS | {"engine_module": "nanovllm_bento.bench.fake_engine"}
"""A service whose engine has no model: it starts in half the time, and its speed is set."""
BODIES: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0},
    {"prompt": "Once upon a midnight dreary", "temperature": 0},
    {"prompt": "It was", "temperature": 1.0, "seed": 11},
    {"prompt": "Call me", "temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 12},
]


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[Server]:
    """Two workers and one engine, which may be restarted as often as the tests of this module need."""
    with serve(tiny_model, workers=2, engine_max_restarts=50, engine_heartbeat_timeout=3, **SETTINGS) as server:
        yield server
        with Observer(server) as observer:
            observer.until_idle()


@pytest.fixture(scope="module")
def expected(server: Server) -> list[str]:
    """What an undisturbed engine says to BODIES."""
    return [complete(server, **body) for body in BODIES]


def complete(server: Server, **body: Any) -> str:
    answer = httpx.post(server.url + "/v1/completions", json=long(body), timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def long(body: dict[str, Any], max_tokens: int = 300) -> dict[str, Any]:
    return {**body, "max_tokens": max_tokens, "ignore_eos": True}


@contextlib.asynccontextmanager
async def streaming(server: Server, bodies: list[dict[str, Any]]) -> AsyncIterator[list[asyncio.Task[Stream]]]:
    """A stream of each, all with text already; what still runs at the context's end is cancelled."""
    streams = [Stream(body) for body in bodies]
    runs = [asyncio.create_task(stream.run(server.url)) for stream in streams]
    try:
        for stream in streams:
            await stream.until_events(2)
        yield runs
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


def connections(server: Server) -> dict[int, list[Any]]:
    """The connections that each worker holds."""
    return {
        pid: [
            connection
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == "ESTABLISHED" and connection.laddr.port == server.port
        ]
        for pid in server.worker_pids
    }


async def both_answer(server: Server) -> list[int]:
    """The pids of its two workers, once each of them has taken a connection: the first may be ready long before."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(60):
        while not (len(held := connections(server)) == 2 and all(held.values())):
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=60))
            await client.get("/livez")
            await asyncio.sleep(0.05)
    return list(held)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_streams_go_on_with_the_same_tokens_when_the_engine_is_lost(
    server: Server, expected: list[str], signum: int
) -> None:
    whole = asyncio.create_task(asyncio.to_thread(complete, server, **BODIES[2]))
    async with streaming(server, [long(body) for body in BODIES]) as runs:
        with Observer(server) as observer:
            await asyncio.to_thread(observer.until, lambda s: s.num_requests_running == 5, "all run")
        lost = server.engine_pid
        os.kill(lost, signum)  # a stopped one is hung: missing heartbeats tell
        await until(lambda: not server.is_ready, "readiness falls")
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            answer = await client.post("/v1/completions", json=BODIES[0])
            if answer.status_code != 200:  # a silent engine may still come back, so requests wait for it
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_not_ready"
                assert int(answer.headers["retry-after"]) >= 1
        for stream, text in zip(await asyncio.gather(*runs), expected, strict=True):
            assert (stream.error, stream.broken, stream.done, stream.finish_reason) == (None, False, True, "length")
            assert stream.text == text
    assert await whole == expected[2]
    await until(lambda: server.is_ready, "ready again")
    assert server.engine_pid != lost and start_time(lost) is None
    with Observer(server) as observer:
        await asyncio.to_thread(observer.until_idle)


async def test_a_killed_worker_costs_its_own_requests_only(tiny_model: str) -> None:
    """The supervisor is killed: its streams break and are cancelled in the engine, which the other worker adopts."""
    with serve(tiny_model, workers=2, fake_tokens_per_second=100, **FAKE) as server, Observer(server) as observer:
        await both_answer(server)
        victim, engine = supervisor(server), server.engine_pid
        assert victim is not None
        streams: list[Stream] = []
        runs: list[asyncio.Task[Stream]] = []
        while min(map(len, connections(server).values())) < 2:  # until both serve some
            assert len(streams) < 40, "all connections went to one worker"
            streams.append(Stream(long({"prompt": "a"}, 600)))
            runs.append(asyncio.create_task(streams[-1].run(server.url)))
            await streams[-1].until_events(1)
        lost = len(connections(server)[victim])
        os.kill(victim, signal.SIGKILL)
        await until(lambda: sum(stream.broken for stream in streams) == lost, "its streams break")
        await asyncio.to_thread(
            observer.until, lambda s: s.num_requests_running == len(streams) - lost, "its requests are cancelled"
        )
        assert server.engine_pid == engine and start_time(engine) is not None
        await until(lambda: supervisor(server) not in (victim, None), "another worker supervises")
        os.kill(engine, signal.SIGKILL)  # and starts it again
        for stream in await asyncio.gather(*runs):
            if not stream.broken:
                assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
                assert len(stream.text) == 600 and stream.text in TEXT * 10
        assert sum(stream.broken for stream in streams) == lost
        await until(lambda: len(server.worker_pids) == 2, "the worker is replaced")
        await until(lambda: server.is_ready, "ready")
        await asyncio.to_thread(observer.until_idle)


async def test_a_request_waits_for_a_worker_that_has_not_heard_from_the_engine_yet(tiny_model: str) -> None:
    """A worker is replaced while the engine serves, but is slow to answer the new one."""
    with serve(tiny_model, workers=2, fake_tokens_per_second=1000, **FAKE) as server:
        engine, before = server.engine_pid, await both_answer(server)
        os.kill(engine, signal.SIGSTOP)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: before[0] not in server.worker_pids, "it is gone")
        asked: list[asyncio.Task[httpx.Response]] = []
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)
        ) as client:
            async with asyncio.timeout(60):
                while not any(held for pid, held in connections(server).items() if pid not in before):
                    assert not any(request.done() for request in asked), "answered without an engine"
                    asked.append(asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"})))
                    await asyncio.sleep(0.2)
            await asyncio.sleep(1)
            os.kill(engine, signal.SIGCONT)
            for answer in await asyncio.gather(*asked):
                assert answer.status_code == 200, answer.text
        assert server.engine_pid == engine


async def test_an_engine_that_dies_again_and_again_ends_streams_with_an_error(tiny_model: str) -> None:
    settings = FAKE | {"fake_tokens_per_second": 100, "fake_dies_after": 40, "engine_max_restarts": 2, "workers": 2}
    with serve(tiny_model, **settings) as server:
        await both_answer(server)
        streams = [Stream(long({"prompt": "a" * i})) for i in range(1, 13)]
        await asyncio.wait_for(asyncio.gather(*(stream.run(server.url) for stream in streams)), 60)
        started = [stream for stream in streams if stream.status == 200]
        assert started, "at least one came before the first death"
        for stream in started:
            assert stream.error is not None and not stream.done and not stream.broken, stream
            assert stream.error["code"] == "engine_dead" and "ended 3 times" in stream.error["message"]
        assert int((Path(server.ipc_dir) / "epoch").read_text()) == 2, "started three times"
        await until(
            lambda: all(httpx.get(server.url + "/livez").status_code == 503 for _ in range(8)), "both workers know"
        )
        for _ in range(8):  # by either worker
            assert httpx.get(server.url + "/readyz").status_code == 503
            assert httpx.get(server.url + "/livez").status_code == 503
            answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503 and "ended 3 times" in answer.json()["error"]["message"]
        assert "ended 3 times" in server.log


async def test_killing_bentoml_serve_leaves_nothing(tiny_model: str) -> None:
    with serve(tiny_model, **FAKE, workers=2, fake_tokens_per_second=20) as server:
        processes = server.processes()
        assert len(processes) >= 4  # bentoml serve, its workers, the engine
        server.note_shared_memory()
        async with streaming(server, [long({"prompt": "a"})] * 4) as runs:
            server.process.kill()
            server.process.wait()
            for stream in await asyncio.wait_for(asyncio.gather(*runs), 30):
                assert not stream.done and stream.num_events < 300
        assert await asyncio.to_thread(wait_ended, processes) == []
        assert not Path(server.ipc_dir).exists()
        assert [path for path in server.leftovers() if "bentoml" not in path] == []  # its own it leaves where it may


async def test_a_worker_that_is_late_ends_with_bentoml_serve(tiny_model: str) -> None:
    """It learns of the end when it has loaded: the parent is another by then, engine and folder are gone."""
    with serve(tiny_model, wait=False, **FAKE, workers=2) as server:
        await until(lambda: len(server.worker_pids) == 2, "both workers are there")
        processes, late = server.processes(), server.worker_pids[0]
        os.kill(late, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        others = {pid: started for pid, started in processes.items() if pid != late}
        assert await asyncio.to_thread(wait_ended, others) == []
        assert not Path(server.ipc_dir).exists()
        os.kill(late, signal.SIGCONT)
        assert await asyncio.to_thread(wait_ended, processes) == []
        assert not Path(server.ipc_dir).exists()


async def test_sigterm_drains_within_the_grace_time(tiny_model: str) -> None:
    """Also where the engine is the child of a worker, because that has started it again."""
    settings = FAKE | {"fake_tokens_per_second": 50, "shutdown_grace_seconds": 4, "workers": 2}
    with serve(tiny_model, **settings) as server:
        server.note_shared_memory()
        bodies = [long({"prompt": "a"}, 60)] * 3 + [long({"prompt": "a"}, 3000)] * 3
        async with streaming(server, bodies) as runs:
            os.kill(server.engine_pid, signal.SIGKILL)
            await until(lambda: not server.is_ready, "readiness falls")
            await until(lambda: server.is_ready, "ready again")
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: refuses(server), "new requests are refused")
            *brief, first, second, third = await asyncio.wait_for(asyncio.gather(*runs), 60)
            assert [(s.done, s.error, s.broken) for s in brief] == [(True, None, False)] * 3
            for stream in (first, second, third):
                assert stream.error is not None and not stream.broken and not stream.done
                assert stream.error["code"] in ("engine_dead", "shutting_down"), stream.error
        processes = server.processes()
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        assert await asyncio.to_thread(wait_ended, processes) == []
        assert not Path(server.ipc_dir).exists() and server.leftovers() == []


def refuses(server: Server) -> bool:
    """Whether a new request finds a closed door: 503, or no connection."""
    try:
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=10)
    except httpx.TransportError:
        return True
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 503


async def test_two_services_on_one_machine_do_not_meet(tiny_model: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as runtime_dir:
        common = FAKE | {"fake_tokens_per_second": 50, "wait": False}
        with (
            serve(tiny_model, runtime_dir=runtime_dir, **common) as one,
            serve(tiny_model, runtime_dir=runtime_dir, **common) as other,
        ):
            one.wait_ready()
            other.wait_ready()
            assert one.engine_pid != other.engine_pid and one.ipc_dir != other.ipc_dir
            body = long({"prompt": "a"}, 100)
            async with streaming(one, [body] * 3), streaming(other, [body] * 3) as others:
                processes = one.processes()
                one.process.kill()
                one.process.wait()
                assert await asyncio.to_thread(wait_ended, processes) == []
                assert not Path(one.ipc_dir).exists() and Path(other.ipc_dir).exists()
                assert all(stream.done and stream.error is None for stream in await asyncio.gather(*others))
            assert other.is_ready
            with Observer(other) as observer:
                await asyncio.to_thread(observer.until_idle)


async def test_a_service_removes_what_dead_ones_have_left_and_nothing_else(tiny_model: str) -> None:
    """The folder of one whose processes were all killed is gone when the next one starts."""
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as runtime_dir:
        common = FAKE | {"runtime_dir": runtime_dir, "fake_tokens_per_second": 50}
        with serve(tiny_model, **common, wait=False) as dead, serve(tiny_model, **common) as other:
            dead.wait_ready()
            kill(dead.processes())  # none has time to clear away, or to start another engine, which would
            assert await asyncio.to_thread(wait_ended, dead.processes()) == []
            assert Path(dead.ipc_dir).exists()
            async with streaming(other, [long({"prompt": "a"}, 200)] * 3) as runs:
                with serve(tiny_model, **common):
                    assert not Path(dead.ipc_dir).exists() and Path(other.ipc_dir).exists()
                assert all(stream.done and stream.error is None for stream in await asyncio.gather(*runs))
            assert other.is_ready and Path(other.ipc_dir).exists()


async def test_a_folder_in_use_is_refused_to_another_service(tiny_model: str) -> None:
    """That one ends, and the first goes on with all that it has there."""
    with serve(tiny_model, **FAKE, fake_tokens_per_second=20) as one:
        engine, files = one.engine_pid, set(os.listdir(one.ipc_dir))
        async with streaming(one, [long({"prompt": "a"}, 100)] * 3) as runs:
            with serve(tiny_model, **FAKE, wait=False, ipc_dir=one.ipc_dir) as another:
                assert await asyncio.to_thread(another.process.wait, 60) == 1
                why = f"ipc_dir {one.ipc_dir} is in use by another service (pid {one.process.pid})."
                assert why in another.log and "NANOVLLM_IPC_DIR" in another.log
                assert "Traceback" not in another.log
            for stream in await asyncio.gather(*runs):
                assert stream.done and stream.error is None and stream.num_events > 10
        assert one.is_ready and one.engine_pid == engine
        assert files <= set(os.listdir(one.ipc_dir))


async def test_an_engine_killed_while_it_loads_is_started_again(tiny_model: str) -> None:
    with serve(tiny_model, wait=False, **FAKE, fake_start_seconds=1.5) as server:
        await until(lambda: (Path(server.ipc_dir) / "engine.pid").exists(), "the engine starts")
        killed = server.engine_pid
        os.kill(killed, signal.SIGKILL)
        await asyncio.to_thread(server.wait_ready)
        assert server.engine_pid != killed
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
