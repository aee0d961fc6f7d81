"""Times the linears of steps of prompts on this GPU: benchmarks/many_rows_tune.py OUT.json [--rows 8192] [--model 4B]

For the shapes of some Qwen3 models: the gated product alone, by the library with an activation kernel and by every
configuration of kernels/gate_up_triton.py, beside the library's product alone (which is what the fused one could save
towards); then the chain of a layer stack in one CUDA graph (attention left out) in three forms: residual adds in the
norms, residual adds in the products, and that with the fused gated product. A configuration that fails or is wrong is
named and left out.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.skinny_tune import DEVICE, DTYPE, EPS, microseconds
from benchmarks.split_k_tune import MODELS
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.gate_up_triton import launch
from nanovllm_bento.kernels.many_rows import Config, linear_add
from nanovllm_bento.kernels.norm import add_rms_norm, rms_norm

LAYERS = 8
SHARED_MEMORY = 227 << 10


def candidates() -> list[Config]:
    """Tiles of both halves that fill the registers of a multiprocessor, as deep as shared memory allows."""
    found = []
    for (block_m, block_n), block_k, stages, pieces, band in itertools.product(
        ((128, 128), (256, 64), (128, 64)), (64, 128), (2, 3, 4, 5), (1, 2), (8, 16)
    ):
        stage, stored = (block_m + 2 * block_n) * block_k * 2, block_m * block_n // pieces * 2
        if stages == min(4 if block_k == 64 else 3, (SHARED_MEMORY - 512 - stored) // stage):
            found += [Config(block_m, block_n, block_k, stages, pieces, band)]
    return found


def wrong(config: Config) -> str:
    """Compile, and compare with float32; what failed, or nothing."""
    try:
        x = torch.randn(300, 1024, device=DEVICE).to(DTYPE)
        weight = torch.empty(2048, 1024, device=DEVICE, dtype=DTYPE).normal_(std=1024**-0.5)
        found = launch(x, weight, x.new_full((300, 1024), float("nan")), config)
        gate, up = F.linear(x.float(), weight.float()).chunk(2, -1)
        wanted = F.silu(gate) * up
        error = float((found.float() - wanted).norm() / wanted.norm())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:200]
    return "" if error < 1e-2 else f"wrong by {error}"


class Stack:
    """Layers of one model; attention is stood in for by the first columns of qkv."""

    def __init__(self, model: str) -> None:
        hidden, qkv, heads, mlp = MODELS[model]
        self.hidden, self.heads, self.mlp = hidden, heads, mlp
        shapes = ((qkv, hidden), (hidden, heads), (2 * mlp, hidden), (hidden, mlp))
        self.norm = torch.rand(hidden, device=DEVICE).to(DTYPE) + 0.5
        self.layers = [
            [torch.empty(*shape, device=DEVICE, dtype=DTYPE).normal_(std=shape[1] ** -0.5) for shape in shapes]
            for _ in range(LAYERS)
        ]

    def gate_up_microseconds(self, rows: int, config: Config | None, activation: bool = True) -> float:
        """Of one gated product, its input norm-ed just before; the norm's own time is not taken off."""
        x, out = (
            torch.randn(rows, self.hidden, device=DEVICE).to(DTYPE),
            torch.empty(rows, self.mlp, device=DEVICE, dtype=DTYPE),
        )

        def body() -> None:
            for _, _, weight, _ in self.layers:
                normed = rms_norm(x, self.norm, EPS)
                if config is not None:
                    launch(normed, weight, out, config)
                else:
                    y = F.linear(normed, weight)
                    if activation:
                        silu_and_mul(y)

        return microseconds(body, 3) / LAYERS

    def microseconds(self, rows: int, adds_in_products: bool, config: Config | None) -> float:
        """Of a layer."""
        start = torch.randn(rows, self.hidden, device=DEVICE).to(DTYPE)
        residual = start.clone()

        def gate_up(x: Tensor, weight: Tensor) -> Tensor:
            if config is None:
                return silu_and_mul(F.linear(x, weight))
            return launch(x, weight, x.new_empty(rows, self.mlp), config)

        def apart() -> None:
            x = start.clone()
            for qkv, out, both, down in self.layers:
                x = F.linear(add_rms_norm(x, residual, self.norm, EPS)[0], qkv)
                x = F.linear(x[:, : self.heads].contiguous(), out)
                x = F.linear(gate_up(add_rms_norm(x, residual, self.norm, EPS)[0], both), down)

        def together() -> None:
            hidden = start.clone()
            for qkv, out, both, down in self.layers:
                x = F.linear(rms_norm(hidden, self.norm, EPS), qkv)
                linear_add(x[:, : self.heads].contiguous(), out, None, hidden)
                linear_add(gate_up(rms_norm(hidden, self.norm, EPS), both), down, None, hidden)

        return microseconds(together if adds_in_products else apart, 3) / LAYERS


def main(path: Path, all_rows: list[int], models: list[str]) -> None:
    began = time.monotonic()
    configs = candidates()
    with ProcessPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 2)), multiprocessing.get_context("spawn")) as pool:
        problems = list(pool.map(wrong, configs))
    for config, problem in zip(configs, problems, strict=True):
        if problem:
            print("FAILED", tuple(config), problem)
    configs = [config for config, problem in zip(configs, problems, strict=True) if not problem]
    print(f"{len(configs)} configurations after {time.monotonic() - began:.0f} s", flush=True)
    report: list[dict[str, Any]] = []
    for model in models:
        stack = Stack(model)
        for rows in all_rows:
            timed = sorted((stack.gate_up_microseconds(rows, config), config) for config in configs)
            best = timed[0][1]
            row: dict[str, Any] = {
                "model": model,
                "rows": rows,
                "gate_up_us": {
                    "library": stack.gate_up_microseconds(rows, None),
                    "library_without_activation": stack.gate_up_microseconds(rows, None, activation=False),
                    "fused": timed[0][0],
                },
                "config": best,
            }
            runs = [
                (
                    stack.microseconds(rows, False, None),
                    stack.microseconds(rows, True, None),
                    stack.microseconds(rows, True, best),
                )
                for _ in range(3)
            ]
            names = ("adds_in_norms", "adds_in_products", "and_gate_up_fused")
            row["layer_us"] = dict(zip(names, map(statistics.median, zip(*runs, strict=True)), strict=True))
            report.append(row | {"timed": timed[:12]})
            print({name: row[name] for name in ("model", "rows", "gate_up_us", "layer_us")}, flush=True)
            for took, config in timed[:4]:
                print(f"    {took:.1f} {tuple(config)}", flush=True)
        del stack
        torch.cuda.empty_cache()
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": report}
    path.write_text(json.dumps(result, indent=1))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("out", type=Path, help="JSON report")
    parser.add_argument("--rows", default="512,1024,2048,4096,8192", help="tokens of a step, with commas between")
    parser.add_argument("--model", default="0.6B", help=f"some of {','.join(MODELS)}")
    arguments = parser.parse_args()
    main(arguments.out, [int(rows) for rows in arguments.rows.split(",")], arguments.model.split(","))
