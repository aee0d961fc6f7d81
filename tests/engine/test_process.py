"""The engine in its own process: same tokens, and what happens when any of the processes ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import zmq

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import OutputBuffer, generate
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import OutputItem, to_engine_decoder
from nanovllm_bento.engine.process_client import ProcessEngineClient, prestart_engine
from nanovllm_bento.engine.processes import process_named_by, start_time, write_whole
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
)
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.fake_runner import add, run, tokens_of
from tests.engine.tiny_models import make_tiny

PROMPTS = [[5, 6, 7], [5, 6, 7, 8] * 10, [9] * 33]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


def engine_config(model: Path | str, **settings: object) -> EngineConfig:
    return EngineConfig.create(
        env={}, model=str(model), dtype="float32", device="cpu", num_gpu_blocks_override=64, max_num_seqs=8, **settings
    )


@asynccontextmanager
async def connected(config: EngineConfig, folder: Path, owner_pid: int | None = None, **service: object):
    settings = ServiceConfig.create(env={}, ipc_dir=str(folder), engine_heartbeat_interval=0.05, **service)
    client = ProcessEngineClient(config, settings, owner_pid=owner_pid)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def ready(config: EngineConfig, client: ProcessEngineClient) -> None:
    await asyncio.wait_for(client.wait_ready(), 60)


def greedy(client: ProcessEngineClient, prompt: list[int], max_tokens: int = 40) -> SamplingParams:
    return resolve_request(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), client.info)


async def collect(client: ProcessEngineClient, request_id: str, prompt: list[int], max_tokens: int = 40) -> list[int]:
    tokens: list[int] = []
    async for item in generate(client, request_id, prompt, greedy(client, prompt, max_tokens)):
        tokens += item.new_token_ids
    return tokens


@pytest.fixture(scope="module")
def in_process(tiny) -> list[list[int]]:
    """The tokens of the same requests from an engine in this process, one at a time."""
    core = EngineCore.from_model(engine_config(tiny))
    result = []
    for i, prompt in enumerate(PROMPTS):
        add(core, str(i), prompt, 40, ignore_eos=True, temperature=0.0)
        result.append(tokens_of(run(core)[str(i)]))
    return result


async def wait_for(condition, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


@contextmanager
def living():
    """A process that lives as long as the context, and is a service's main process for what asks."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_tokens_do_not_depend_on_the_process_boundary(tiny, tmp_path, in_process):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        assert not client.is_ready and not client.is_up
        with pytest.raises(EngineNotReadyError):
            await collect_raw(client)
        await ready(engine_config(tiny), client)
        assert client.is_up
        got = await asyncio.gather(*(collect(client, str(i), p) for i, p in enumerate(PROMPTS)))
        assert got == in_process
        pid = client._engine_pid
    assert start_time(pid) is None, "closing the client that owns the engine ends it"


async def collect_raw(client: ProcessEngineClient) -> None:
    async for _ in generate(client, "early", [1], SamplingParams(seed=0)):
        pass


async def test_leaving_frees_the_request_in_the_engine(tiny, tmp_path):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        task = asyncio.create_task(collect(client, "long", [3] * 20, 200))
        await wait_for(lambda: client.stats.num_requests_running == 1, "the request runs")
        task.cancel()
        await wait_for(lambda: client.stats.num_requests_running == 0, "it ended")
        assert client.stats.num_blocks_used == 0
        stream = generate(client, "closed", [3] * 20, greedy(client, [3] * 20, 200))
        await anext(stream)
        await stream.aclose()
        await wait_for(lambda: client.stats.num_requests_running == 0, "it ended")


async def test_streams_go_on_with_the_same_tokens_after_the_engine_is_killed(tiny, tmp_path, in_process):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        first = asyncio.Event()

        async def stream(i: int) -> list[int]:
            tokens: list[int] = []
            async for item in generate(client, str(i), PROMPTS[i], greedy(client, PROMPTS[i])):
                tokens += item.new_token_ids
                first.set()
            return tokens

        tasks = [asyncio.create_task(stream(i)) for i in range(len(PROMPTS))]
        await first.wait()
        killed = client._engine_pid
        os.kill(killed, signal.SIGKILL)
        await wait_for(lambda: not client.is_ready, "readiness falls")
        assert await asyncio.wait_for(asyncio.gather(*tasks), 60) == in_process
        assert client._engine_pid != killed


async def score(client: ProcessEngineClient, request_id: str, tokens: list[int], num_scored: int) -> list[float]:
    items = [item async for item in generate(client, request_id, tokens, SamplingParams(seed=0), num_scored=num_scored)]
    assert len(items) == 1 and items[0].is_greedy is not None and items[0].logprobs is not None
    return items[0].logprobs


async def test_a_score_goes_on_in_the_next_engine(tiny, tmp_path):
    config = engine_config(tiny, max_num_batched_tokens=8)
    async with connected(config, tmp_path / "ipc") as client:
        await ready(config, client)
        tokens = [3 + i % 50 for i in range(200)]
        expected = await score(client, "whole", tokens, 150)
        os.kill(client._engine_pid, signal.SIGSTOP)  # so that it is surely not done when it is killed
        task = asyncio.create_task(score(client, "again", tokens, 150))
        await wait_for(lambda: bool(client._requests), "the request is open")
        os.kill(client._engine_pid, signal.SIGKILL)
        assert await asyncio.wait_for(task, 60) == pytest.approx(expected, abs=1e-4)


async def test_an_engine_told_to_end_finishes_what_runs_and_the_next_one_takes_the_rest(tiny, tmp_path, in_process):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        first = client._engine_pid
        stream = generate(client, "running", PROMPTS[0], greedy(client, PROMPTS[0]))
        tokens = (await anext(stream)).new_token_ids
        os.kill(first, signal.SIGTERM)
        late = asyncio.create_task(collect(client, "late", PROMPTS[1]))
        async for item in stream:
            tokens += item.new_token_ids
        assert tokens == in_process[0]
        assert await asyncio.wait_for(late, 60) == in_process[1]
        await wait_for(lambda: client._engine_pid != first, "another engine serves")


async def test_a_deadline_ends_a_request_and_frees_it(tiny, tmp_path):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        stream = generate(client, "late", [3] * 20, greedy(client, [3] * 20, 230), deadline=time.time() + 0.05)
        with pytest.raises(DeadlineExceededError):
            async for _ in stream:
                pass
        await wait_for(lambda: client.stats.num_requests_running == client.stats.num_blocks_used == 0, "none is left")


async def test_an_engine_that_could_not_start_before_the_workers_is_not_started_again(tmp_path):
    config, folder = engine_config("./no/such/model"), tmp_path / "ipc"
    prestart_engine(config, ServiceConfig.create(env={}, ipc_dir=str(folder)), os.getpid())
    await wait_for(lambda: (folder / "engine.error").exists(), "it has said why")
    async with connected(config, folder) as client:
        with pytest.raises(EngineDeadError, match="no/such/model"):
            await ready(config, client)
    assert len((folder / "starts").read_text().split()) == 1


async def test_an_engine_that_serves_is_seen_before_it_is_heard(tiny, tmp_path):
    config = engine_config(tiny)
    async with connected(config, tmp_path / "ipc") as first:
        late = ProcessEngineClient(config, first.service_config)
        late._folder = first.folder  # as if its socket had heard nothing yet

        def engine() -> int | None:
            return process_named_by(first.folder / "engine.pid")

        await wait_for(lambda: engine() is not None, "there is an engine")
        assert not late.is_up, "it loads the model"
        await ready(config, first)
        assert late.is_up and not late.is_ready
        killed = first._engine_pid
        os.kill(killed, signal.SIGKILL)
        await wait_for(lambda: engine() not in (None, killed), "another engine starts")
        assert not late.is_up
        await ready(config, first)
        await wait_for(lambda: late.is_up, "it serves")


async def test_a_hung_engine_is_killed_and_replaced(tiny, tmp_path, in_process):
    async with connected(engine_config(tiny), tmp_path / "ipc", engine_heartbeat_timeout=1.0) as client:
        await ready(engine_config(tiny), client)
        hung = client._engine_pid
        os.kill(hung, signal.SIGSTOP)
        await wait_for(lambda: start_time(hung) is None, "the hung engine is gone")
        await wait_for(lambda: client.is_ready and client._engine_pid != hung, "another engine is ready")
        assert await collect(client, "after", PROMPTS[0]) == in_process[0]


async def test_an_engine_that_keeps_dying_ends_requests_with_an_error(tiny, tmp_path):
    async with connected(engine_config(tiny), tmp_path / "ipc", engine_max_restarts=0) as client:
        await ready(engine_config(tiny), client)
        task = asyncio.create_task(collect(client, "a", [1, 2], 200))
        await wait_for(lambda: bool(client._requests), "the request is open")
        os.kill(client._engine_pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="1 times"):
            await asyncio.wait_for(task, 30)
        assert not client.is_ready


async def test_another_worker_adopts_the_engine_and_the_engine_ends_with_its_owner(tiny, tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        config, folder = engine_config(tiny), tmp_path / "ipc"
        async with connected(config, folder, owner.pid) as second_comer:
            async with connected(config, folder, owner.pid) as other:
                await ready(config, second_comer)
                await ready(config, other)
                pid = other._engine_pid or second_comer._engine_pid
                assert await collect(other, "x", [4, 5], 4) == await collect(second_comer, "x", [4, 5], 4)
            await asyncio.sleep(0)
            assert start_time(pid) is not None, "the engine outlives a worker"
            os.kill(pid, signal.SIGKILL)
            await wait_for(lambda: second_comer.is_ready and second_comer._engine_pid != pid, "the other restarts it")
            pid = second_comer._engine_pid
            owner.kill()
            owner.wait()
            await wait_for(lambda: start_time(pid) is None, "the engine ends with the service's main process")
            assert not folder.exists()
    finally:
        owner.kill()


async def test_requests_of_a_killed_worker_are_aborted(tiny, tmp_path):
    script = """
import asyncio, sys
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import generate
from nanovllm_bento.engine.process_client import ProcessEngineClient, prestart_engine
from nanovllm_bento.sampling_params import SamplingParams
async def main():
    client = ProcessEngineClient(EngineConfig.create(model=sys.argv[1]), ServiceConfig.create(ipc_dir=sys.argv[2]),
                                 owner_pid=int(sys.argv[3]))
    await client.start(); await client.wait_ready()
    async for item in generate(client, "w", [1, 2, 3], SamplingParams(seed=0, max_tokens=250, ignore_eos=True)):
        print("token", flush=True)
asyncio.run(main())
"""
    async with connected(engine_config(tiny, max_model_len=256), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        worker = subprocess.Popen(
            [sys.executable, "-c", script, str(tiny), str(tmp_path / "ipc"), str(os.getpid())], stdout=subprocess.PIPE
        )
        assert worker.stdout is not None
        await asyncio.to_thread(worker.stdout.readline)
        worker.kill()
        worker.wait()
        worker.stdout.close()
        await wait_for(lambda: client.stats.generation_tokens > 0, "the worker's request ran")
        await wait_for(lambda: client.stats.num_requests_running == client.stats.num_blocks_used == 0, "it ended")
        assert client.stats.generation_tokens < 250, "it was aborted, not finished"


async def test_a_model_that_is_not_there_is_said_and_not_retried(tmp_path):
    config = engine_config(tmp_path / "nothing-here")
    async with connected(config, tmp_path / "ipc") as client:
        with pytest.raises(EngineDeadError, match="nothing-here"):
            await asyncio.wait_for(client.wait_ready(), 60)
        with pytest.raises(EngineNotReadyError, match="nothing-here"):
            _ = client.info


async def test_a_request_that_the_engine_refuses_ends_with_its_reason(tiny, tmp_path):
    async with connected(engine_config(tiny), tmp_path / "ipc") as client:
        await ready(engine_config(tiny), client)
        with pytest.raises(InvalidRequestError, match="scheduling_policy"):
            async for _ in generate(client, "a", [1], greedy(client, [1]), priority=3):
                pass
        assert len(await collect(client, "b", [1, 2], 3)) == 3


async def test_without_an_engine_the_supervisor_removes_the_folder_when_the_service_ends(tmp_path):
    config, folder = engine_config(tmp_path / "nothing-here"), tmp_path / "ipc"
    with living() as owner:
        async with connected(config, folder, owner.pid, engine_module="nanovllm_bento.bench.fake_engine") as client:
            with pytest.raises(EngineDeadError, match="nothing-here"):
                await ready(config, client)
            assert folder.exists()
            owner.kill()
            await wait_for(lambda: not folder.exists(), "the folder is removed")


async def test_two_services_with_one_folder_do_not_share_an_engine(tmp_path):
    """Where no main process of ours holds it: two programs that serve within themselves."""
    config, folder, module = engine_config("./no/such/model"), tmp_path / "ipc", "nanovllm_bento.bench.fake_engine"
    with living() as owner:
        async with connected(config, folder, owner.pid, engine_module=module):
            with pytest.raises(ConfigError, match=f"in use by another service .pid {owner.pid}"):
                async with connected(config, folder, engine_module=module):
                    pass
            assert (folder / "owner").read_text().split()[0] == str(owner.pid)


@pytest.mark.parametrize("configured", [True, False])
async def test_a_worker_whose_service_has_ended_leaves_no_folder(tmp_path, monkeypatch, configured):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with living() as owner:
        pass
    settings = ServiceConfig.create(env={}, ipc_dir=str(tmp_path / "ipc") if configured else None)
    client = ProcessEngineClient(engine_config("nothing-here"), settings, owner_pid=owner.pid)
    try:
        with pytest.raises(EngineDeadError, match=f"pid {owner.pid}.* has ended"):
            await client.start()
    finally:
        await client.close()
    assert list(tmp_path.iterdir()) == []


def test_what_other_processes_read_is_whole_at_all_times(tmp_path):
    file, texts, seen = tmp_path / "failure", {"a" * 3000, "b" * 5000}, set()
    write_whole(file, "a" * 3000)
    script = "import sys, pathlib; from nanovllm_bento.engine.processes import write_whole as write\n"
    script += "while True:\n  for text in ('a' * 3000, 'b' * 5000): write(pathlib.Path(sys.argv[1]), text)"
    writer = subprocess.Popen([sys.executable, "-c", script, str(file)])
    try:
        until = time.monotonic() + 60
        while len(seen) < 2:  # it has begun
            seen.add(file.read_text())
            assert time.monotonic() < until
        seen |= {file.read_text() for _ in range(3000)}
    finally:
        writer.kill()
        writer.wait()
    assert seen == texts


async def test_workers_learn_why_no_engine_comes_in_the_same_words(tmp_path):
    """Each may read while another one still finds out."""
    config, folder = engine_config(tmp_path / "nothing-here"), tmp_path / "ipc"
    module = "nanovllm_bento.bench.fake_engine"
    async with (
        connected(config, folder, engine_module=module) as one,
        connected(config, folder, engine_module=module) as two,
    ):
        told = []

        async def learn(client: ProcessEngineClient) -> None:
            with pytest.raises(EngineDeadError, match="nothing-here") as caught:
                await asyncio.wait_for(client.wait_ready(), 60)
            told.append(str(caught.value))

        await learn(one)
        await learn(two)
        written = (folder / "failure").stat()
        async with connected(config, folder, engine_module=module) as three:
            await learn(three)
        assert len(set(told)) == 1
        assert (folder / "failure").read_text() == told[0]
        found = (folder / "failure").stat()
        assert (found.st_ino, found.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "it is written once"


class Socket:
    """In place of the one to the engine: keeps what is sent and has nothing to read."""

    def __init__(self) -> None:
        self.messages: list[list[object]] = [[]]

    def send(self, data: bytes, flags: int) -> None:
        self.messages[-1].append(to_engine_decoder.decode(data))
        if not flags & zmq.SNDMORE:
            self.messages.append([])

    def get(self, option: int) -> int:
        return 0


def client_on(socket: Socket) -> ProcessEngineClient:
    client = ProcessEngineClient(EngineConfig.create(env={}, model="none"), ServiceConfig.create(env={}))
    client._socket = socket  # type: ignore[assignment]
    client._ready.set()
    return client


def submit(client: ProcessEngineClient, name: str, on_due=lambda: None) -> OutputBuffer:
    return client.submit(name, [1, 2], SamplingParams(max_tokens=9, seed=0), on_due)


async def test_the_first_of_many_requests_does_not_wait_for_the_others():
    socket = Socket()
    client = client_on(socket)
    for i in range(37):
        submit(client, str(i))
    sizes = [1, 1, 2, 4, 8, 8, 8]  # small as long as the engine has little to do
    assert [len(message) for message in socket.messages if message] == sizes
    await asyncio.sleep(0)
    assert [len(message) for message in socket.messages if message] == [*sizes, 5]
    assert [add.request_id for message in socket.messages for add in message] == [str(i) for i in range(37)]


def ending(names: list[str]) -> list[OutputItem]:
    return [OutputItem(name, [7, 8], "length") for name in names]


async def test_requests_that_end_together_leave_others_their_turn():
    client, turns = client_on(Socket()), []
    num_turns = 0

    def on_due() -> None:
        turns.append(num_turns)
        time.sleep(0.001)

    names = [str(i) for i in range(30)]
    for name in names:
        submit(client, name, on_due)
    await asyncio.sleep(0)
    client._items.extend(ending(names))
    client._receive()
    while len(turns) < 30:
        num_turns += 1
        await asyncio.sleep(0)
    assert turns == list(range(30)), "one request in each turn of the loop"


async def test_what_was_received_is_handed_out_before_another_engine_is_asked():
    client = client_on(Socket())
    outputs = {name: submit(client, name, lambda: time.sleep(0.001)) for name in "abcd"}
    await asyncio.sleep(0)
    client._items.extend(ending(["a", "b", "c"]))
    client._items.append(OutputItem("d", [5]))
    client._receive()
    assert client._items and set(client._requests) == {"b", "c", "d"}
    client._socket = None  # the engine has ended
    client._disconnect(linger=0)
    assert not client._items and set(client._requests) == {"d"}
    assert list(client._requests["d"].token_ids) == [5], "what another engine goes on from"
    assert [outputs[name].take().new_token_ids for name in "abcd"] == [[7, 8]] * 3 + [[5]]


async def test_a_request_whose_end_was_received_does_not_fail_with_the_engine():
    client = client_on(Socket())
    outputs = {name: submit(client, name, lambda: time.sleep(0.001)) for name in "abc"}
    await asyncio.sleep(0)
    client._items.extend(ending(["a", "b"]))
    client._receive()
    assert client._items
    client._give_up("It has ended too often.")
    assert [outputs[name].take().finish_reason for name in "ab"] == ["length", "length"]
    with pytest.raises(EngineDeadError, match="too often"):
        outputs["c"].take()
