"""What happens to the engine when a client leaves, and to all processes when the service ends."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.messages import EngineStats
from nanovllm_bento.engine.process_client import ProcessEngineClient
from nanovllm_bento.hub import ModelFiles
from tests.e2e.server import Server, kill, serve, wait_ended

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}


class Observer:
    """Reads the engine's own state, as one more client of it."""

    def __init__(self, server: Server) -> None:
        config = EngineConfig.create(env={}, model="demo")
        service = ServiceConfig.create(env={}, ipc_dir=server.ipc_dir)
        self.client = ProcessEngineClient(config, service, owner_pid=server.process.pid)

    async def until(self, condition: Callable[[EngineStats], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition(self.client.stats):
                await asyncio.sleep(0.05)


@pytest.fixture
async def observer(server: Server) -> AsyncIterator[Observer]:
    observer = Observer(server)
    await observer.client.start()
    await observer.client.wait_ready()
    await observer.until(lambda stats: stats.num_blocks > 0)
    yield observer
    await observer.client.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_blocks_return_when_a_client_leaves(server: Server, observer: Observer, stream: bool) -> None:
    await observer.until(lambda stats: stats.num_requests_running == 0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        request = asyncio.create_task(_read(client, {**LONG, "stream": stream}))
        await observer.until(lambda stats: stats.num_requests_running == 1 and stats.num_blocks_used > 0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await observer.until(lambda stats: stats.num_requests_running == stats.num_blocks_used == 0)


async def _read(client: httpx.AsyncClient, body: dict) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            pass


def test_sigterm_ends_every_process(demo_model: ModelFiles) -> None:
    with serve() as server:
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        processes = server.processes()
        assert len(processes) >= 3  # bentoml serve, its worker, the engine
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        assert wait_ended(processes) == []


def test_killing_bentoml_serve_leaves_no_process(demo_model: ModelFiles) -> None:
    with serve() as server:
        processes = server.processes()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(timeout=60)
        left = wait_ended(processes)
        kill(processes)
        assert left == []


def test_a_model_that_does_not_exist_is_told_and_never_ready() -> None:
    with serve("./no/such/model", wait=False) as server:
        server.wait_for_failure()
        assert httpx.get(server.url + "/readyz").status_code == 503
        error = httpx.post(server.url + "/v1/completions", json={"prompt": "a"}).json()["error"]
        assert error["code"] == "engine_not_ready" and "./no/such/model" in error["message"]
        assert "./no/such/model" in server.log
