"""A tensor-parallel engine gives the tokens of one rank alone, and a rank that fails ends it by name."""

import asyncio
import os
import signal
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.model_runner import rank_executor
from nanovllm_bento.errors import ConfigError, RankError
from nanovllm_bento.llm import LLM
from tests.e2e.tiny import make_served_tiny
from tests.engine.fake_runner import add, add_score, run
from tests.engine.test_process import (
    PROMPTS,
    collect,
    connected,
    engine_config,
    in_process,
    ready,
    wait_for,
)
from tests.engine.test_process import tiny as tiny
from tests.engine.tiny_engines import assert_tokens_depend_on_the_request_alone, make_engine, run_all
from tests.engine.tiny_models import make_tiny

__all__ = ["in_process", "tiny"]  # fixtures

SYSTEM = list(range(40, 75))
REQUESTS = [
    ([*SYSTEM, 5, 6, 7], 30, 0.0),
    ([*SYSTEM, 9], 20, 0.9),
    ([3], 40, 0.0),
    ([*SYSTEM, 5, 6, 7], 14, 0.7),
    ([200 + i % 7 for i in range(60)], 8, 0.0),
    (list(range(300, 333)), 20, 0.0),
]
"""Together they need more blocks than the tight engines have: they preempt, chunk and share."""


@pytest.mark.parametrize("family, size, settings", [
    ("qwen3", 2, {}),
    ("llama_bias", 4, {}),
    ("qwen3_moe", 2, {}),
    ("qwen3_moe", 4, {"enable_expert_parallel": True}),
])  # fmt: skip
def test_tokens_do_not_depend_on_the_number_of_ranks(tmp_path: Path, family: str, size: int, settings: dict) -> None:
    folder = make_tiny(family, tmp_path)
    roomy = make_engine(folder, "cpu", enable_prefix_caching=False, num_gpu_blocks_override=256)
    mode = "mixed" if size == 4 else "two_phase"
    tight = make_engine(
        folder,
        "cpu",
        num_gpu_blocks_override=8,
        max_num_batched_tokens=24,
        schedule_mode=mode,
        tensor_parallel_size=size,
        **settings,
    )
    try:
        assert_tokens_depend_on_the_request_alone(roomy, [tight], REQUESTS)
        assert tight.stats.num_preemptions and tight.stats.prefix_cache_hits
    finally:
        tight.close()


@pytest.fixture(scope="module")
def two_ranks(tiny: Path):
    core = make_engine(tiny, "cpu", tensor_parallel_size=2)
    yield core
    core.close()


def test_all_ranks_sample_alike_with_every_parameter(tiny: Path, two_ranks) -> None:
    one = make_engine(tiny, "cpu")
    results = []
    for core in (one, two_ranks):
        add(core, "a", PROMPTS[0], 30, temperature=1.2, top_k=7, top_p=0.9, min_p=0.01, seed=3, ignore_eos=True)
        add(core, "b", PROMPTS[1], 30, temperature=3.0, seed=4, min_tokens=25, stop_token_ids=list(range(3, 500)))
        add(core, "c", PROMPTS[2], 30, temperature=0.0, ignore_eos=True)
        results.append(run_all(core))
    assert results[0] == results[1]
    assert len(results[0]["b"]) >= 25


def test_scores_do_not_depend_on_the_number_of_ranks(tiny: Path, two_ranks) -> None:
    found = []
    for core in (make_engine(tiny, "cpu"), two_ranks):
        add_score(core, "score", PROMPTS[1], 20)
        (item,) = run(core)["score"]
        found.append(item)
    assert found[0].logprobs == pytest.approx(found[1].logprobs, abs=1e-5)
    assert found[0].is_greedy == found[1].is_greedy


@pytest.mark.parametrize("family, size, named", [
    ("qwen3", 3, "4 attention heads and 2 key-value heads. Possible: 1, 2, 4"),
    ("qwen3_bias", 4, "6 attention heads"),
])  # fmt: skip
def test_a_model_that_cannot_be_split_is_refused_by_name(tmp_path: Path, family: str, size: int, named: str) -> None:
    before = rank_processes(os.getpid())
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={size} does not divide .*{named}"):
        make_engine(make_tiny(family, tmp_path), "cpu", tensor_parallel_size=size)
    assert rank_processes(os.getpid()) == before


def test_experts_are_not_split_where_there_are_none(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel=True, but Qwen3ForCausalLM has no experts"):
        make_engine(tiny, "cpu", enable_expert_parallel=True)


def rank_processes(pid: int) -> list[psutil.Process]:
    """The processes of an engine's other ranks that have not ended."""
    children = [p for p in psutil.Process(pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in children if any("rank_worker" in part for part in p.cmdline())]


def test_a_killed_rank_is_named_and_leaves_nothing(tiny: Path) -> None:
    core = make_engine(tiny, "cpu", tensor_parallel_size=4)
    victim, *others = (psutil.Process(pid) for pid in core.ranks.pids)
    add(core, "a", PROMPTS[0], 200, ignore_eos=True)
    for _ in range(5):
        core.step()
    victim.kill()
    with pytest.raises(RankError, match=rf"rank \d \(pid {victim.pid}\) died of signal 9"):
        for _ in range(500):
            core.step()
    core.close()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in others)


def test_a_stopped_rank_is_named_within_the_timeout(tiny: Path) -> None:
    core = make_engine(tiny, "cpu", tensor_parallel_size=2, tensor_parallel_timeout=1.0)
    victim = psutil.Process(core.ranks.pids[0])
    add(core, "a", PROMPTS[0], 200, ignore_eos=True)
    core.step()
    victim.suspend()
    with pytest.raises(RankError, match=rf"rank 1 \(pid {victim.pid}\)"):
        for _ in range(500):
            core.step()
    core.close()
    assert not victim.is_running()


@pytest.mark.parametrize("when", ["early", "late"])
def test_what_one_rank_finds_wrong_at_start_is_what_the_caller_is_told(tiny: Path, when: str) -> None:
    before = rank_processes(os.getpid())
    with pytest.raises(ConfigError, match="this rank has no room"):
        EngineCore.from_model(
            engine_config(tiny, tensor_parallel_size=2), executor=f"tests.engine.test_tensor_parallel:fails_{when}"
        )
    assert rank_processes(os.getpid()) == before


def fails_early(config: EngineConfig, rank: int, size: int, store: Path) -> NoReturn:
    """A rank_worker.MakeExecutor that fails before it meets the other ranks."""
    raise ConfigError("this rank has no room")


def fails_late(config: EngineConfig, rank: int, size: int, store: Path) -> NoReturn:
    """One that fails when the others wait for its first step."""
    rank_executor(config, rank, size, store)
    raise ConfigError("this rank has no room")


async def test_streams_go_on_with_the_same_tokens_after_a_rank_is_killed(
    tiny: Path, tmp_path: Path, in_process
) -> None:
    config = engine_config(tiny, tensor_parallel_size=2)
    async with connected(config, tmp_path / "ipc") as client:
        await ready(config, client)
        engine = client._engine_pid
        (rank,) = rank_processes(engine)
        tasks = [asyncio.create_task(collect(client, str(i), p)) for i, p in enumerate(PROMPTS)]
        await wait_for(lambda: client.stats.num_requests_running == len(PROMPTS), "all run")
        rank.send_signal(signal.SIGKILL)
        await wait_for(lambda: not client.is_ready, "readiness falls")
        assert await asyncio.wait_for(asyncio.gather(*tasks), 60) == in_process
        assert client._engine_pid != engine
        (again,) = rank_processes(client._engine_pid)
    await wait_for(lambda: not again.is_running(), "the rank ends with its engine")


def test_an_llm_ends_its_ranks(tmp_path: Path) -> None:
    folder = make_served_tiny(tmp_path)
    llm = LLM(str(folder), device="cpu", dtype="float32", num_gpu_blocks_override=64, tensor_parallel_size=2)
    (rank,) = (psutil.Process(pid) for pid in llm.core.ranks.pids)
    assert len(llm.generate([[5, 6, 7]], use_tqdm=False)[0].outputs[0].token_ids) > 0
    del llm
    assert not rank.is_running()
