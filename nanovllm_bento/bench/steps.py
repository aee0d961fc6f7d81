"""Where a decode step's time goes: the host's parts of it, the GPU's, and on a GPU which kernels.

Drives the parts of EngineCore.step one by one, from outside; nothing in the engine is instrumented.
"""

import gc
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch

from nanovllm_bento.bench.workloads import MAX_TOKEN_ID
from nanovllm_bento.engine.core import EngineCore, InFlight
from nanovllm_bento.engine.messages import Add, pack_tokens
from nanovllm_bento.engine.scheduler import Batch
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.sampling_params import SamplingParams

HOST_PARTS = ("schedule", "launch", "wait", "commit")
CONTEXT_LEN = 512
"""Prompt tokens of each row: a decode step here attends to a little more than that."""
PREFILL_LEN = 512
"""Prompt tokens of each prompt in a full prefill step."""
WARM_UP_STEPS, TIMED_STEPS, GPU_STEPS, PROFILED_STEPS = 8, 64, 16, 4
CYCLES_PER_SECOND = 2e9
"""About a GPU's clock: torch.cuda._sleep takes cycles."""

KERNEL_GROUPS = (
    ("attention", r"attn|attention|flash|fmha|paged|split_?kv|combine"),
    ("norm, rope, activation", r"norm|rope|rotary|silu|swiglu|act_and_mul"),
    ("sampling", r"sample|philox|gumbel|argmax|softmax|sort|topk|top_k|_scan|_choose"),
    (
        "GEMM",
        r"gemm|gemv|nvjet|cutlass|cublas|splitk|linear|xmma|matmul|\bmm\b|vector_kernel|matrix_kernel|tile_kernel",
    ),
)
"""Groups of kernels by name; the first pattern that is found wins, and what none finds is "other"."""


def step_breakdown(core: EngineCore, num_rows: int, timed_steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Medians, in microseconds, over decode steps of ``num_rows`` sequences; one step in flight, as the engine runs.

    wall_us: a pass of the loop. schedule, launch (staging and graph replay), wait (for the step before) and commit are
    the host's parts of it. gpu_us: the same steps by CUDA events, launched behind a kernel that sleeps, so that the
    GPU has all of a step before it starts and the host cannot hold it up. gap_us = wall - gpu: what the GPU idles.
    Raises ConfigError if so many sequences do not fit the engine.
    """
    with decoding(core, num_rows, WARM_UP_STEPS + timed_steps + GPU_STEPS + PROFILED_STEPS) as context_len:
        for _ in range(WARM_UP_STEPS):
            core.step()
        passes = []
        for _ in range(timed_steps):
            started = time.perf_counter()
            parts = _timed_step(core)
            passes.append({"wall": time.perf_counter() - started, **parts})
        row: dict[str, Any] = {"num_rows": num_rows, "context_len": context_len + WARM_UP_STEPS + timed_steps // 2}
        for name in ("wall", *HOST_PARTS):
            row[f"{name}_us"] = round(statistics.median(p[name] for p in passes) * 1e6, 1)
        row["host_us"] = round(sum(row[f"{name}_us"] for name in HOST_PARTS if name != "wait"), 1)
        row["gpu_us"] = row["gap_us"] = None
        if torch.device(core.info.device).type == "cuda":
            row["gpu_us"] = round(_gpu_seconds(core, 2 * row["launch_us"] / 1e6) * 1e6, 1)
            row["gap_us"] = round(row["wall_us"] - row["gpu_us"], 1)
    return row


def kernel_shares(core: EngineCore, num_rows: int) -> dict[str, Any]:
    """GPU time of each kernel per decode step, by torch's profiler: the groups, and the ten that take most.

    Sums of kernel times: kernels that overlap (programmatic dependent launch) count in full, so that the sum may exceed
    the step.
    """
    from torch.profiler import ProfilerActivity, profile

    with decoding(core, num_rows, WARM_UP_STEPS + PROFILED_STEPS):
        for _ in range(WARM_UP_STEPS):
            core.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED_STEPS):
                core.step()
            torch.cuda.synchronize()
    return {"num_rows": num_rows, **_summary_of(profiler, PROFILED_STEPS)}


def prefill_breakdown(core: EngineCore, timed_steps: int = 6, profiled_steps: int = 2) -> dict[str, Any]:
    """Full prefill steps (max_num_batched_tokens tokens of new prompts), back to back as the engine runs them.

    wall_us: a pass of the loop, median. launch_us: the host's share that enqueues the step. On CUDA also the GPU's
    kernels, per step, by torch's profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    info, budget = core.info, core.scheduler.max_num_batched_tokens
    length = min(PREFILL_LEN, budget, info.max_model_len - 2, info.num_cache_tokens // 4)
    per_step = max(1, min(budget // length, info.max_num_seqs // 2, info.num_cache_tokens // (4 * length)))
    random, limit = Random(length), min(MAX_TOKEN_ID, info.vocab_size - 1)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)

    def add(steps: int) -> None:
        for _ in range(steps * per_step):
            prompt = pack_tokens([random.randint(0, limit) for _ in range(length)])
            core.add(Add(f"prefill-{random.random()}", prompt, sampling, cache_salt=str(time.monotonic_ns())))

    walls, launches, launch = [], [], core.runner.launch

    def timed_launch(batch: Batch) -> InFlight:
        started = time.perf_counter()
        in_flight = launch(batch)
        launches.append(time.perf_counter() - started)
        return in_flight

    add(timed_steps + 2)
    core.step()
    core.runner.launch = timed_launch  # type: ignore[method-assign]
    try:
        for _ in range(timed_steps):
            started = time.perf_counter()
            core.step()
            walls.append(time.perf_counter() - started)
    finally:
        core.runner.launch = launch  # type: ignore[method-assign]
    _drain(core)
    row: dict[str, Any] = {"tokens": per_step * length, "prompt_len": length}
    row["wall_us"] = round(statistics.median(walls) * 1e6, 1)
    row["launch_us"] = round(statistics.median(launches) * 1e6, 1)
    if torch.device(info.device).type == "cuda":
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            add(profiled_steps)
            _drain(core)
        row["kernels"] = _summary_of(profiler, profiled_steps)
    return row


def _drain(core: EngineCore) -> None:
    """Run until the engine and its device are idle."""
    while core.has_work:
        core.step()
    if torch.device(core.info.device).type == "cuda":
        torch.cuda.synchronize()


def _summary_of(profiler: Any, num_steps: int) -> dict[str, Any]:
    kernels: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            kernels[event.key] = [event.self_device_time_total / num_steps, event.count / num_steps]
    if not kernels:
        raise RuntimeError("torch's profiler saw no kernel; is CUPTI missing?")
    return summarize_kernels(kernels)


def summarize_kernels(kernels: dict[str, list[float]]) -> dict[str, Any]:
    """kernels: name -> [microseconds a step, launches a step]."""
    total = sum(us for us, _ in kernels.values())
    groups: dict[str, float] = defaultdict(float)
    for name, (us, _) in kernels.items():
        groups[kernel_group(name)] += us
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
    return {
        "kernel_us": round(total, 1),
        "launches": round(sum(count for _, count in kernels.values()), 1),
        "groups": {
            name: {"us": round(us, 1), "share": round(us / total, 4)}
            for name, us in sorted(groups.items(), key=lambda item: -item[1])
        },
        "top": [
            {
                "kernel": name[:120],
                "group": kernel_group(name),
                "us": round(us, 1),
                "launches": count,
                "share": round(us / total, 4),
            }
            for name, (us, count) in top
        ],
    }


def kernel_group(name: str) -> str:
    """The group of KERNEL_GROUPS that a kernel's name falls into."""
    return next((group for group, pattern in KERNEL_GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


@contextmanager
def decoding(core: EngineCore, num_rows: int, num_steps: int) -> Iterator[int]:
    """``num_rows`` random sequences, prefilled and ready for ``num_steps`` decode steps; gone afterwards.

    Gives their prompt length: CONTEXT_LEN, or what max_model_len and the cache leave room for.
    """
    info = core.info
    room = min(info.max_model_len, info.num_cache_tokens // num_rows // info.block_size * info.block_size)
    spare = num_steps + 2 * info.block_size
    length = min(CONTEXT_LEN, room - spare)
    if num_rows > info.max_num_seqs or length < 1:
        raise ConfigError(
            f"{num_rows} rows do not fit an engine with max_num_seqs={info.max_num_seqs} and a KV cache of "
            f"{info.num_cache_tokens} tokens for max_model_len={info.max_model_len}."
        )
    random = Random(num_rows)
    limit = min(MAX_TOKEN_ID, info.vocab_size - 1)
    ids = [f"step-{i}" for i in range(num_rows)]
    for i, request_id in enumerate(ids):
        prompt = pack_tokens([random.randint(0, limit) for _ in range(length)])
        # An own salt: nothing is shared, and nothing of another section's is found.
        sampling = SamplingParams(temperature=0.6, max_tokens=num_steps + 8, ignore_eos=True, seed=i)
        core.add(Add(request_id, prompt, sampling, cache_salt=f"steps-{num_rows}-{i}-{time.monotonic_ns()}"))
    try:
        while core.scheduler.num_waiting or core.scheduler.prefilling:
            core.step()
        gc.collect()
        yield length
    finally:
        for request_id in ids:
            core.abort(request_id)
        while core.has_work:
            core.step()


def _timed_step(core: EngineCore) -> dict[str, float]:
    """EngineCore.step, with its parts timed; every pass launches one step and collects the one before."""
    begun = time.perf_counter()
    batch = core.scheduler.schedule()
    assert batch is not None and not batch.prefill
    scheduled = time.perf_counter()
    in_flight = core.runner.launch(batch)
    launched = time.perf_counter()
    collected, core.in_flight = core.in_flight, in_flight
    assert collected is not None
    tokens = collected.wait()
    waited = time.perf_counter()
    core.scheduler.commit(collected.batch, tokens)
    committed = time.perf_counter()
    return {
        "schedule": scheduled - begun,
        "launch": launched - scheduled,
        "wait": waited - launched,
        "commit": committed - waited,
    }


def _gpu_seconds(core: EngineCore, launch_seconds: float) -> float:
    """Median GPU time of a step that was launched in full before it began."""
    samples = []
    for _ in range(GPU_STEPS):
        batch = core.scheduler.schedule()
        assert batch is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int((launch_seconds + 100e-6) * CYCLES_PER_SECOND))
        start.record()
        in_flight = core.runner.launch(batch)
        end.record()
        collected, core.in_flight = core.in_flight, in_flight
        assert collected is not None
        core.scheduler.commit(collected.batch, collected.wait())
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)
