"""Engines on tiny real models, and the statement that their tokens depend on the request alone; for CPU and GPU."""

from pathlib import Path

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from tests.engine.fake_runner import add, run, tokens_of

Request = tuple[list[int], int, float]  # prompt, max_tokens, temperature


def make_engine(folder: Path, device: str, **overrides: object) -> EngineCore:
    """A float32 engine with 64 blocks, 8 sequences and 64 tokens a step, unless overridden."""
    keywords = {"num_gpu_blocks_override": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, **overrides}
    return EngineCore.from_model(
        EngineConfig.create(env={}, model=str(folder), device=device, dtype="float32", **keywords)
    )


def run_all(core: EngineCore) -> dict[str, list[int]]:
    return {request_id: tokens_of(items) for request_id, items in run(core).items()}


def roomy_and_tight(folder: Path, device: str) -> tuple[EngineCore, list[EngineCore]]:
    """An engine for one request at a time, without a prefix cache, and engines that must preempt, chunk and share."""
    roomy = make_engine(folder, device, enable_prefix_caching=False, num_gpu_blocks_override=256)
    tight = [
        make_engine(folder, device, num_gpu_blocks_override=8, max_num_batched_tokens=24, schedule_mode=mode)
        for mode in ("two_phase", "mixed")
    ]
    return roomy, tight


def assert_tokens_depend_on_the_request_alone(
    roomy: EngineCore, tight: list[EngineCore], requests: list[Request]
) -> None:
    """Each request alone, then all together in every tight engine (twice: with a cold and a warm prefix cache)."""
    expected: dict[str, list[int]] = {}
    for i, (prompt, max_tokens, temperature) in enumerate(requests):
        add(roomy, str(i), prompt, max_tokens, temperature=temperature, seed=i)
        expected |= run_all(roomy)
    for core in (*tight, *tight):
        for i, (prompt, max_tokens, temperature) in enumerate(requests):
            add(core, str(i), prompt, max_tokens, temperature=temperature, seed=i)
        assert run_all(core) == expected
        assert core.block_manager.num_used_blocks == 0
