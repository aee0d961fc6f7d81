"""The client over the engine without a model: what it does when engines end, and what becomes of each request."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import Pace, generate
from nanovllm_bento.engine.process_client import ProcessEngineClient
from nanovllm_bento.engine.processes import start_time
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import DeadlineExceededError, EngineDeadError
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.test_process import wait_for
from tests.engine.tiny_models import make_tiny

FAKE = "nanovllm_bento.bench.fake_engine"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def connected(model: Path, folder: Path, **service: object):
    settings = ServiceConfig.create(env={}, ipc_dir=str(folder), engine_heartbeat_interval=0.05, **service)
    config = EngineConfig.create(env={}, model=str(model), max_model_len=100_000)
    client = ProcessEngineClient(config, settings, engine_module=FAKE)
    await client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), 60)
        yield client
    finally:
        await client.close()


async def collect(client: ProcessEngineClient, request_id: str, num_tokens: int, **options: object) -> list[int]:
    prompt = [ord(c) for c in request_id]
    sampling = resolve_request(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True), client.info)
    tokens: list[int] = []
    async for item in generate(client, request_id, prompt, sampling, **options):  # type: ignore[arg-type]
        tokens += item.new_token_ids
    return tokens


async def kill_engine(client: ProcessEngineClient) -> None:
    pid = client._engine_pid
    os.kill(pid, signal.SIGKILL)
    await wait_for(lambda: client.is_ready and client._engine_pid != pid, "another engine is ready")


async def test_streams_go_on_through_a_bounded_number_of_restarts(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOVLLM_FAKE_TOKENS_PER_SECOND", "100")
    async with connected(tiny, tmp_path / "ipc", engine_max_resumes=1, engine_max_restarts=9) as client:
        short, long = (asyncio.create_task(collect(client, name, n)) for name, n in (("a", 60), ("b", 90_000)))
        await wait_for(lambda: len(client._requests) == 2, "both run")
        request = client._requests["b"]
        await wait_for(lambda: len(request.token_ids) > 5, "tokens have come")
        await kill_engine(client)
        whole = await asyncio.wait_for(short, 30)
        assert len(whole) == 60 and whole == await collect(client, "a", 60)
        assert not long.done() and request.num_resumes == 1
        await kill_engine(client)
        with pytest.raises(EngineDeadError, match="2 times"):
            await asyncio.wait_for(long, 30)
        await wait_for(lambda: client.stats.num_requests_running == client.stats.num_blocks_used == 0, "none is left")


async def test_a_silent_engine_is_unresponsive_then_killed(tiny, tmp_path) -> None:
    async with connected(tiny, tmp_path / "ipc", engine_heartbeat_timeout=1.0) as client:
        hung = client._engine_pid
        assert client.is_responsive
        os.kill(hung, signal.SIGSTOP)
        await wait_for(lambda: not client.is_responsive, "readiness falls")
        assert start_time(hung) is not None, "before it is given up"
        await wait_for(lambda: client.is_responsive and client._engine_pid != hung, "another engine is ready")
        assert len(await collect(client, "after", 5)) == 5


async def test_an_abort_is_sent_in_the_iteration_in_which_its_task_is_cancelled(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOVLLM_FAKE_TOKENS_PER_SECOND", "20")
    async with connected(tiny, tmp_path / "ipc") as client:
        tasks = [asyncio.create_task(collect(client, str(i), 90_000)) for i in range(4)]
        await wait_for(lambda: client.stats.num_requests_running == 4, "all run")
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        assert not client._requests
        await wait_for(lambda: client.stats.num_requests_running == client.stats.num_blocks_used == 0, "none is left")


async def test_abort_all_ends_what_is_open_and_nothing_else(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOVLLM_FAKE_TOKENS_PER_SECOND", "20")
    async with connected(tiny, tmp_path / "ipc") as client:
        task = asyncio.create_task(collect(client, "a", 90_000))
        await wait_for(lambda: client.stats.num_requests_running == 1, "it runs")
        client.abort_all("The service is shutting down.")
        with pytest.raises(EngineDeadError, match="shutting down"):
            await task
        await wait_for(lambda: client.stats.num_requests_running == 0, "none is left")
        assert len(await collect(client, "b", 3)) == 3


async def test_tokens_that_pile_up_are_read_in_one_piece(tiny, tmp_path) -> None:
    async with connected(tiny, tmp_path / "ipc") as client:
        sampling = resolve_request([1], SamplingParams(max_tokens=500, ignore_eos=True), client.info)
        sizes = []
        async for item in generate(client, "a", [1], sampling, pace=Pace(100)):
            sizes.append(len(item.new_token_ids))
        assert sum(sizes) == 500 and all(size >= 100 for size in sizes[1:-1])
        slow = generate(client, "b", [1], sampling)
        first = await anext(slow)
        await wait_for(lambda: "b" not in client._requests, "the engine is done with it")
        rest = [item async for item in slow]
        assert len(rest) <= 1  # none where all had come before the reader had its turn
        assert sum(len(item.new_token_ids) for item in (first, *rest)) == 500


async def test_a_deadline_ends_a_request_with_its_own_error(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOVLLM_FAKE_TOKENS_PER_SECOND", "50")
    async with connected(tiny, tmp_path / "ipc") as client:
        with pytest.raises(DeadlineExceededError):
            await collect(client, "a", 90_000, deadline=1.0)
