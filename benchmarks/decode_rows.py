"""GPU time of decode steps, what is chosen by their rows changed: python -m benchmarks.decode_rows MODEL OUT.json

For every number of rows that has a CUDA graph of its own, or --rows: a step as it is, with its products left to the
library, and with every pair of a configuration of decode attention (kernels/attention/decode_triton.py) and a division
of a multiprocessor's memory (kernels/shared_memory.py). One engine, whose graph is captured anew for each. MODEL: a
folder, with random weights as good as any. --context: tokens of each row.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nanovllm_bento.bench import steps
from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.cuda_graphs import graph_buckets
from nanovllm_bento.engine.model_runner import ModelRunner
from nanovllm_bento.kernels import shared_memory, split_k
from nanovllm_bento.kernels.attention.decode_triton import DecodeConfig
from nanovllm_bento.kernels.attention.triton_backend import TritonAttention

PERCENTS = (shared_memory.DRIVERS_CHOICE, 28, 43, 57, 71, 100)
SHAPES = [(64, 4, 2), (64, 4, 3), (64, 2, 2), (32, 2, 2), (32, 1, 2), (32, 1, 3), (16, 1, 2), (16, 1, 3), (16, 2, 3)]
SPLITS = [(1, 64), (2, 64), (3, 128)]
"""programs_per_sm and min_chunk, where there are fewer pairs of a row and a KV head than multiprocessors."""
WARM_UP_STEPS, GROUPS, REPLAYS = 4, 5, 6


@contextmanager
def library_products() -> Iterator[None]:
    """From 17 rows on; up to 16 the fused products are no choice by rows."""
    try:
        with patch.dict(split_k.TUNED, clear=True):
            split_k.choose_config.cache_clear()
            yield
    finally:
        split_k.choose_config.cache_clear()


@contextmanager
def in_force(backend: TritonAttention, config: DecodeConfig, percent: int) -> Iterator[None]:
    """A graph that is captured within has this attention and this division of memory."""
    with (
        patch.object(shared_memory, "choose_percent", lambda *case: percent),
        patch.object(backend, "decode_config", config),
    ):
        yield


def configurations(rows: int, kv_heads: int, now: DecodeConfig) -> list[DecodeConfig]:
    splits = SPLITS if rows * kv_heads <= 132 else [(1, 64)]
    shapes = [
        replace(now, block_n=n, num_warps=warps, num_stages=stages, prefetch=True)
        for n, warps, stages in SHAPES
        if rows <= 64 or n < 64
    ]
    return [replace(c, programs_per_sm=programs, min_chunk=chunk) for c in shapes for programs, chunk in splits]


def describe(config: DecodeConfig) -> str:
    splits = f"{config.programs_per_sm} a multiprocessor, {config.min_chunk} keys each"
    flags = "".join(f", {name}" for name in ("prefetch", "late") if getattr(config, name))
    return f"{config.block_n} keys, {config.num_warps} warps, {config.num_stages} stages; {splits}{flags}"


def decode_backend(runner: ModelRunner) -> TritonAttention:
    """That of decode rows. Raises SystemExit if it is not ours."""
    backend = getattr(runner.backend, "_decode", None) if "+" in runner.backend.name else runner.backend
    if not isinstance(backend, TritonAttention):
        raise SystemExit(f"attention backend {runner.backend.name}: its decode steps are not cut by us.")
    return backend


def percent_of(runner: ModelRunner, rows: int) -> int:
    """The division of memory that a step's graph is captured with."""
    if runner.memory_shape is None:
        raise SystemExit(
            "no division of memory is set here: before Hopper, by ranks, mixtures of experts, batch_invariant."
        )
    return shared_memory.choose_percent(rows, runner.memory_shape)


def make_engine(model: str, rows: list[int], **settings: Any) -> EngineCore:
    settings |= {"max_model_len": 4096, "kv_cache_memory_bytes": 24 << 30, "max_num_seqs": max(rows)}
    return EngineCore.from_model(EngineConfig.create(env={}, model=model, **settings))


class Step:
    """One decode step, replayed over the same rows again and again. context_len: tokens of each."""

    def __init__(self, runner: ModelRunner, rows: int, context_len: int) -> None:
        self.runner, self.rows, self.context_len = runner, rows, context_len
        self.backend = decode_backend(runner)
        self.static_rows = runner.static_rows.clone()

    @torch.inference_mode()
    def microseconds(self) -> float:
        """With a graph captured now: forward pass and sampling, several steps on end; median."""
        graphs = self.runner.graphs
        assert graphs is not None
        graphs.capture_one(self.rows)
        graph, times = graphs[self.rows], []
        for _ in range(1 + GROUPS):
            self.runner.static_rows.copy_(self.static_rows)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # so that all is launched before it begins
            begin.record()
            for _ in range(REPLAYS):
                graph.forward.replay()
                graph.sample[True][0].replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
        return round(statistics.median(times[1:]), 1)


@contextmanager
def decoding(core: EngineCore, rows: int) -> Iterator[Step]:
    """A step of so many rows, whose sequences are gone afterwards."""
    assert isinstance(core.runner, ModelRunner)
    with steps.decoding(core, rows, WARM_UP_STEPS + REPLAYS) as context_len:
        for _ in range(WARM_UP_STEPS):
            core.step()
        torch.cuda.synchronize()
        yield Step(core.runner, rows, context_len + WARM_UP_STEPS)


def measure(step: Step, joint: bool) -> Iterator[dict[str, Any]]:
    """A result of each variant."""
    runner, rows = step.runner, step.rows
    now, percent_now = step.backend.config_of(rows), percent_of(runner, rows)

    def timed(config: DecodeConfig, percent: int, products: AbstractContextManager[None] | None = None) -> float:
        with products or nullcontext(), in_force(step.backend, config, percent):
            return step.microseconds()

    described = {"attention": describe(now), "percent": percent_now}
    yield {"variant": "as it is", **described, "us": timed(now, percent_now)}
    if rows >= split_k.MIN_ROWS:
        yield {"variant": "library products", **described, "us": timed(now, percent_now, library_products())}
    configs = configurations(rows, runner.num_kv_heads, now) if joint else [now]
    for config, percent in product(configs, PERCENTS):
        yield {"variant": "pair", "attention": describe(config), "percent": percent, "us": timed(config, percent)}
    yield {"variant": "as it is, again", **described, "us": timed(now, percent_now)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", help="numbers of rows, with commas between (default: all that have a graph)")
    parser.add_argument("--context", type=int, default=steps.CONTEXT_LEN)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy: MODEL needs no weights")
    parser.add_argument("--division-only", action="store_true", help="leave attention as it is")
    args = parser.parse_args()
    rows = graph_buckets(256) if args.rows is None else [int(n) for n in args.rows.split(",")]
    core = make_engine(args.model, rows, kv_cache_dtype=args.kv_cache_dtype, load_format=args.load_format)
    report: dict[str, Any] = {"benchmark": "decode_rows", "environment": environment(), "rows": {}}
    with patch.object(steps, "CONTEXT_LEN", args.context):
        for n in rows:
            with decoding(core, n) as step:
                found = list(measure(step, not args.division_only))
            report["rows"][str(n)] = {"context_len": step.context_len, "steps": found}
            best = min(found, key=lambda step: step["us"])
            print(n, "rows:", *(f"{s['variant']} {s['us']}," for s in found if s["variant"] != "pair"), "best:", best)
            write_result(report, args.output)
    core.close()


if __name__ == "__main__":
    main()
