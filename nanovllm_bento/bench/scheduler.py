"""What the bookkeeping costs: scheduler and block manager per decode step, and a prefix look-up. No model runs."""

import statistics
import time
from random import Random
from typing import Any

from tqdm import tqdm

from nanovllm_bento.bench.environment import environment
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.block_manager import BlockManager
from nanovllm_bento.engine.messages import pack_tokens, token_array
from nanovllm_bento.engine.scheduler import Batch, Scheduler
from nanovllm_bento.engine.sequence import Sequence
from nanovllm_bento.sampling_params import SamplingParams

VOCAB_SIZE = 32_000
GOAL_US = 150
"""Goal for both figures, in microseconds."""


def bench_scheduler(*, num_seqs: int = 256, num_steps: int = 2000, prompt_len: int = 4096) -> dict[str, Any]:
    """Times in microseconds: one decode step at num_seqs running sequences, and one look-up of a cached prompt."""
    step = _time_steps(num_seqs, num_steps)
    lookup = _time_lookup(prompt_len, num_repeats=max(200, num_steps // 4))
    return {
        "benchmark": "scheduler",
        "environment": environment(),
        "goal_us": GOAL_US,
        "step": {"num_running": num_seqs, "schedule_mode": "two_phase", **step},
        "prefix_lookup": {"prompt_tokens": prompt_len, **lookup},
    }


def _time_steps(num_seqs: int, num_steps: int) -> dict[str, float]:
    """schedule + commit, one step ahead of the tokens as the engine runs; sequences differ in length and cross block
    borders at different steps, and none ends."""
    random = Random(0)
    config = EngineConfig.create(env={}, max_num_seqs=num_seqs, max_num_batched_tokens=max(4096, num_seqs))
    lengths = [random.randint(64, 191) for _ in range(num_seqs)]
    max_tokens = num_steps + 64
    num_blocks = sum((n + max_tokens) // config.block_size + 1 for n in lengths)
    scheduler = Scheduler(config, BlockManager(num_blocks, config.block_size))
    for i, length in enumerate(lengths):
        prompt = [random.randrange(VOCAB_SIZE) for _ in range(length)]
        sampling = SamplingParams(max_tokens=max_tokens, seed=i)
        scheduler.add(Sequence(str(i), token_array(pack_tokens(prompt)), length, sampling))
    pending: Batch | None = scheduler.schedule()
    while scheduler.num_waiting or scheduler.prefilling:  # prefill everything, untimed
        pending = _advance(scheduler, pending, random)
    tokens = [[random.randrange(VOCAB_SIZE) for _ in range(num_seqs)] for _ in range(16)]
    for _ in range(8):
        pending = _advance(scheduler, pending, random)
    samples = []
    for i in tqdm(range(num_steps), desc="steps", leave=False):
        assert pending is not None
        step_tokens = tokens[i % 16][: len(pending.sampled)]
        started = time.perf_counter()
        following = scheduler.schedule()
        scheduler.commit(pending, step_tokens)
        samples.append(time.perf_counter() - started)
        assert following is not None and len(following.decode) == num_seqs
        pending = following
    return _summary(samples)


def _advance(scheduler: Scheduler, pending: Batch | None, random: Random) -> Batch | None:
    following = scheduler.schedule()
    if pending is not None:
        scheduler.commit(pending, [random.randrange(VOCAB_SIZE) for _ in pending.sampled])
    return following


def _time_lookup(prompt_len: int, num_repeats: int) -> dict[str, float]:
    """Hash a new prompt and find all its blocks, as on arrival of a request whose whole prompt is cached."""
    random = Random(0)
    block_size = EngineConfig.create(env={}).block_size
    manager = BlockManager(2 * prompt_len // block_size + 2, block_size)
    prompt = [random.randrange(VOCAB_SIZE) for _ in range(prompt_len)]
    packed = pack_tokens(prompt)  # as a request brings it

    def sequence() -> Sequence:
        sampling = SamplingParams(max_tokens=1, seed=0)
        return Sequence("a", token_array(packed), prompt_len, sampling)

    first = sequence()
    assert manager.allocate(first)
    first.num_computed_tokens = prompt_len
    manager.publish(first)
    manager.release(first)
    samples = []
    for _ in tqdm(range(num_repeats), desc="look-ups", leave=False):
        seq = sequence()
        started = time.perf_counter()
        hits = manager.lookup(seq)
        samples.append(time.perf_counter() - started)
        assert len(hits) == prompt_len // block_size
    return _summary(samples)


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "samples": len(ordered),
        "median_us": round(statistics.median(ordered) * 1e6, 1),
        "mean_us": round(statistics.fmean(ordered) * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
        "min_us": round(ordered[0] * 1e6, 1),
    }
