#!/usr/bin/env python3
"""benchmarks/cpu_profile.py RESULT.json: where a decode step on a CPU goes, and how fast its parts can be.

Random weights in SmolLM2-135M's shapes (speed does not depend on values). For each dtype and batch size: seconds of a
decode step (best and median of 20) and, from torch's profiler, the operations that take most of it. Beside it the
ceilings of the same run: reading memory, and each weight matrix's product through the plain and the packed layout."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm_bento.bench.environment import environment
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import Add, pack_tokens
from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.sampling_params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
MATRICES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576)}
BATCHES = (1, 8, 32)


def timed(run: Callable[[], object], repeat: int = 9) -> float:
    """Median seconds after two warm-up runs."""
    seconds = []
    for i in range(repeat + 2):
        started = time.perf_counter()
        run()
        if i >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def profile_steps(folder: str, dtype: str) -> list[dict[str, Any]]:
    random = Random(0)
    core = EngineCore.from_model(
        EngineConfig.create(
            env={},
            model=folder,
            device="cpu",
            dtype=dtype,
            load_format="dummy",
            enable_prefix_caching=False,
            max_model_len=256,
        )
    )
    rows = []
    for batch in BATCHES:
        sampling = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, seed=0)
        for i in range(batch):
            prompt = [random.randrange(9000) for _ in range(64)]
            core.add(Add(f"{batch}-{i}", pack_tokens(prompt), sampling))
        while core.scheduler.prefilling or core.scheduler.num_waiting:
            core.step()
        core.step()
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            core.step()
            seconds.append(time.perf_counter() - started)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(5):
                core.step()
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        rows.append(
            {
                "dtype": dtype,
                "batch": batch,
                "step_ms_best": round(min(seconds) * 1e3, 2),
                "step_ms_median": round(statistics.median(seconds) * 1e3, 2),
                "profiled_ms": round(sum(e.self_cpu_time_total for e in events) / 5e3, 2),
                "profiled_calls": sum(e.count for e in events) // 5,
                "top_ops_ms": {e.key: [round(e.self_cpu_time_total / 5e3, 2), e.count // 5] for e in events[:15]},
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "top_ops_ms"}, flush=True)
        while core.has_work:
            core.step()
    return rows


def products(x: torch.Tensor, pairs: list[tuple[torch.Tensor, Any]]) -> None:
    for weight, packed in pairs:
        linear(x, weight, None, packed)


def time_products(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microseconds of each matrix product, cycling through 100 MB of weights or more, so that none stays in a cache."""
    rows = []
    for name, (out_features, in_features) in MATRICES.items():
        num_bytes = out_features * in_features * dtype.itemsize
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(max(2, 200_000_000 // num_bytes))]
        packed = [pack_weight(w) for w in weights]
        for batch in (*BATCHES, 512):
            x = torch.randn(batch, in_features).to(dtype)
            row: dict[str, Any] = {"matrix": name, "dtype": str(dtype).removeprefix("torch."), "rows": batch}
            layouts: dict[str, list[tuple[torch.Tensor, Any]]] = {"plain": [(w, None) for w in weights]}
            if packed[0] is not None:
                layouts["packed"] = list(zip(weights, packed, strict=True))
            for layout, pairs in layouts.items():
                seconds = timed(partial(products, x, pairs), 5) / len(pairs)
                row[layout] = {
                    "us": round(seconds * 1e6, 1),
                    "gb_s": round(num_bytes / seconds / 1e9, 1),
                    "gflop_s": round(2 * batch * out_features * in_features / seconds / 1e9, 1),
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    numbers = torch.randn(64 << 20)
    read = numbers.numel() * 4 / timed(numbers.sum) / 1e9
    print(f"reads {read:.1f} GB/s", flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        steps = [row for dtype in ("float32", "bfloat16") for row in profile_steps(folder, dtype)]
        products = [row for dtype in (torch.float32, torch.bfloat16) for row in time_products(dtype)]
    result = {
        "benchmark": "cpu-profile",
        "environment": environment(),
        "weights": "random, SmolLM2-135M shapes",
        "read_gb_s": round(read, 1),
        "steps": steps,
        "products": products,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
