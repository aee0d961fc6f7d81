"""GPU time of decode steps, what is chosen by their rows changed: python -m benchmarks.decode_rows MODEL OUT.json

For every number of rows from 32 to 256 that has a CUDA graph of its own, or --rows: a step as it is; with its products
left to the library (kernels/split_k.py's ROWS and TUNED say which are not); and with decode attention cut in each way
there is for many rows (MANY_PAIRS in kernels/attention/decode_triton.py), its first keys called into L2 or not. One
engine for each, one after the other, the first once more at the end. MODEL: a folder, with random weights as good as
any.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.steps import step_breakdown
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.cuda_graphs import graph_buckets
from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.attention import decode_triton
from nanovllm_bento.kernels.attention.decode_triton import MANY_PAIRS, DecodeConfig

TIMED_STEPS = 24


@contextmanager
def library_products() -> Iterator[None]:
    with patch.dict(split_k.TUNED, clear=True):
        split_k.choose_config.cache_clear()
        yield
    split_k.choose_config.cache_clear()


@contextmanager
def attention(shape: DecodeConfig, min_pairs: int) -> Iterator[None]:
    """Steps of min_pairs rows times KV heads or more attend by ``shape``."""
    choose = decode_triton.choose_config

    def changed(*case: Any) -> DecodeConfig:
        num_rows, kv_heads = case[3:5]
        config = choose(*case)
        return replace(shape, late=config.late) if num_rows * kv_heads >= min_pairs else config

    with patch.object(decode_triton, "choose_config", changed):
        yield


def variants(min_pairs: int) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Name -> what is in force while the engine is made."""
    found: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "as it is": nullcontext,
        "library products": library_products,
    }
    for shape in (DecodeConfig(), *(config for _, config in MANY_PAIRS)):
        for prefetch in (False, True):
            name = f"attention {shape.block_n} keys, {shape.num_warps} warps, {shape.num_stages} stages"
            label = f"{name}{', prefetch' if prefetch else ''}"
            found[label] = partial(attention, replace(shape, prefetch=prefetch), min_pairs)
    return found | {"as it is, again": nullcontext}


def measure(model: str, rows: list[int]) -> dict[str, float]:
    """µs of a step of each number of rows, by CUDA events."""
    settings = {"model": model, "max_model_len": 4096, "kv_cache_memory_bytes": 24 << 30, "max_num_seqs": max(rows)}
    core = EngineCore.from_model(EngineConfig.create(env={}, **settings))
    try:
        return {str(n): step_breakdown(core, n, TIMED_STEPS)["gpu_us"] for n in rows}
    finally:
        core.close()
        del core
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", help="numbers of rows, with commas between (default: all from 32 to 256)")
    parser.add_argument("--min-pairs", type=int, default=256, help="rows times KV heads whose attention is changed")
    args = parser.parse_args()
    rows = [n for n in graph_buckets(256) if n >= 32] if args.rows is None else [int(n) for n in args.rows.split(",")]
    results: list[dict[str, Any]] = []
    for name, make in variants(args.min_pairs).items():
        with make():
            results.append({"variant": name, "gpu_us": measure(args.model, rows)})
        print(results[-1], flush=True)
        report = {"benchmark": "decode_rows", "environment": environment(), "min_pairs": args.min_pairs}
        write_result(report | {"results": results}, args.output)


if __name__ == "__main__":
    main()
