"""Workers that end, and what the main process makes of it: exit codes that whoever restarts containers can believe."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.observer import Observer
from tests.e2e.server import Server, serve
from tests.e2e.streams import Stream, until
from tests.e2e.test_faults import both_answer
from tests.e2e.tiny import SETTINGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FAKE: dict[str, Any] = SETTINGS | {
    "engine_module": "nanovllm_bento.bench.fake_engine",
    "fake_tokens_per_second": 100,
    "workers": 2,
}


@pytest.fixture
def in_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """What BentoML goes by; its images set it."""
    monkeypatch.setenv("BENTOML_CONTAINERIZED", "true")


async def start_stream(server: Server, max_tokens: int = 200) -> tuple[Stream, "asyncio.Task[Stream]"]:
    """A stream that has its first text."""
    stream = Stream({"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True})
    run = asyncio.create_task(stream.run(server.url))
    await stream.until_events(1)
    return stream, run


def exit_code(server: Server) -> int:
    return server.process.wait(timeout=60)


@pytest.mark.usefixtures("in_container")
async def test_a_container_replaces_a_worker_that_dies_and_still_ends_with_0_when_told_to(tiny_model: str) -> None:
    with serve(tiny_model, **FAKE) as server:
        victim, other = await both_answer(server)
        engine = server.engine_pid
        streams = [await start_stream(server) for _ in range(4)]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in server.worker_pids and len(server.worker_pids) == 2, "it is replaced")
        assert other in server.worker_pids and server.engine_pid == engine
        await until(lambda: "has ended; 1 of 3" in server.log, "it is counted")
        await until(lambda: server.is_ready, "ready")
        ended = await asyncio.gather(*(run for _, run in streams))
        assert all(stream.broken or stream.finish_reason == "length" for stream in ended)
        with Observer(server) as observer:
            await asyncio.to_thread(observer.until_idle)
        _, run = await start_stream(server)
        os.kill(server.process.pid, signal.SIGTERM)
        stream = await run
        assert (stream.done, stream.finish_reason) == (True, "length")
        assert await asyncio.to_thread(exit_code, server) == 0


async def test_one_worker_too_many_ends_the_service_with_1_after_what_was_running(tiny_model: str) -> None:
    with serve(tiny_model, worker_max_restarts=0, **FAKE) as server:
        workers = await both_answer(server)
        streams = [await start_stream(server) for _ in range(4)]
        os.kill(workers[0], signal.SIGKILL)
        ended = await asyncio.gather(*(run for _, run in streams))
        assert all(stream.broken or stream.finish_reason == "length" for stream in ended)
        assert await asyncio.to_thread(exit_code, server) == 1
        assert "1 workers have ended in ten minutes, worker_max_restarts=0" in server.log


@pytest.mark.usefixtures("in_container")
async def test_a_container_whose_only_worker_dies_may_end_instead(tiny_model: str) -> None:
    with serve(tiny_model, worker_max_restarts=0, **FAKE | {"workers": 1}) as server:
        os.kill(server.worker_pids[0], signal.SIGKILL)
        assert await asyncio.to_thread(exit_code, server) == 1


@pytest.mark.usefixtures("in_container")
def test_a_container_that_cannot_start_ends() -> None:
    with serve("./no/such/model", wait=False) as server:
        assert exit_code(server) == 1
        assert "./no/such/model" in server.log


async def test_an_engine_that_dies_too_often_ends_the_service_if_asked_to(tiny_model: str) -> None:
    with serve(tiny_model, end_on_failure=True, engine_max_restarts=0, **FAKE) as server:
        os.kill(server.engine_pid, signal.SIGKILL)
        assert await asyncio.to_thread(exit_code, server) == 1
        assert "The engine ended 1 times" in server.log


async def test_what_a_dead_service_wrote_into_its_folder_is_not_believed(tiny_model: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as base:
        folder = Path(base) / "ipc"
        folder.mkdir(mode=0o700)
        for name, text in {"owner": "4194305 1 1", "failure": "No engine comes.", "epoch": "7"}.items():
            (folder / name).write_text(text)
        with serve(tiny_model, end_on_failure=True, ipc_dir=folder, **FAKE) as server:
            assert server.is_ready and (folder / "epoch").read_text() == "0"
            assert not (folder / "failure").exists()
        assert not folder.exists()


async def test_a_worker_that_hangs_does_not_hold_up_the_end(tiny_model: str) -> None:
    with serve(tiny_model, shutdown_grace_seconds=0, **FAKE | {"workers": 1}) as server:
        (worker,) = server.worker_pids
        os.kill(worker, signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGTERM)
        assert await asyncio.to_thread(exit_code, server) == 1
        assert f"The worker {worker} has not ended. It is killed." in server.log
