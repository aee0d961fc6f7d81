"""Times the linears of decode batches of 17 to 256 rows on this GPU: benchmarks/split_k_tune.py OUT.json [--rows 64]

For the shapes of some Qwen3 models: every configuration of kernels/split_k.py alone, then in the chain of a layer stack
in one CUDA graph (norms included, attention left out), where each product that is not faster than cuBLAS is left to it.
Prints the best as entries for TUNED. A configuration that fails or is wrong is named and left out.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.skinny_tune import DEVICE, DTYPE, EPS, L2_BYTES, LAYERS, microseconds
from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.norm import add_rms_norm, sum_add_rms_norm
from nanovllm_bento.kernels.skinny import is_gated
from nanovllm_bento.kernels.split_k import Config

# hidden, qkv out, o in, MLP
MODELS = {
    "0.6B": (1024, 4096, 2048, 3072),
    "1.7B": (2048, 4096, 2048, 6144),
    "4B": (2560, 6144, 4096, 9728),
    "8B": (4096, 6144, 4096, 12288),
}
SHARED_MEMORY = 220 << 10
Product = tuple[str, int, int]  # operation, n, k
Job = tuple[str, int, int, int, Config]  # operation, rows, n, k


def products(model: str) -> list[Product]:
    hidden, qkv, heads, mlp = MODELS[model]
    return [
        ("linear", qkv, hidden),
        ("linear_parts", hidden, heads),
        ("gate_up", mlp, hidden),
        ("linear_parts", hidden, mlp),
    ]


def candidates(product: Product, rows: int) -> Iterator[Config]:
    operation, n, k = product
    matrices = 2 if is_gated(operation) else 1
    few = rows <= 64
    splits = (1, 2, 3, 4, 6, 8, 12, 16) if operation == "linear_parts" else (1,)
    for block_m, block_n, block_k, count, stages, warps, prefetch in itertools.product(
        *((32, 64, 128), (16, 32, 64, 128), (64, 128), splits, (3, 4, 6), (4, 8), (True, False))
    ):
        config = Config(block_m, block_n, block_k, count, stages, warps, prefetch)
        programs = n // block_n * math.ceil(rows / block_m) * count
        if (
            split_k.suits(config, n, k)
            and block_m in ((32, 64) if rows <= 32 else (64,) if few else (64, 128))
            and (block_m + block_n * matrices) * block_k * 2 * stages <= SHARED_MEMORY
            and block_n * matrices <= 128
            and 48 <= programs <= 450
            and k // count >= 2 * block_k
            and (warps == 4 or block_m == 128)
            and (prefetch or not few)
            and (stages == 4 or (stages == 6 and block_k == 64) or stages == 3)
            and (block_n >= 32 or few)
            and (block_m == 128 or few or block_k == 64)
        ):
            yield config


def inputs(product: Product, rows: int, count: int) -> tuple[Tensor, list[Tensor]]:
    operation, n, k = product
    shape = (2 * n if is_gated(operation) else n, k)
    weights = [torch.empty(*shape, device=DEVICE, dtype=DTYPE).normal_(std=k**-0.5) for _ in range(count)]
    return torch.randn(rows, k, device=DEVICE).to(DTYPE), weights


def run(operation: str, x: Tensor, weight: Tensor, config: Config | None) -> Tensor:
    if config is None:
        y = F.linear(x, weight)
        return silu_and_mul(y) if is_gated(operation) else y
    if operation == "linear_parts" and config.splits > 1:
        return split_k.linear_parts(x, weight, None, config=config)
    if operation == "gate_up":
        return split_k.gate_up(x, weight, config=config)
    return split_k.linear(x, weight, None, config=config)


def compile_job(job: Job) -> str:
    """Fill Triton's cache, and compare with float32; what failed, or nothing."""
    operation, rows, n, k, config = job
    try:
        x, (weight,) = inputs((operation, n, k), rows, 1)
        found = run(operation, x, weight, config).float()
        wanted = F.linear(x.float(), weight.float())
        if is_gated(operation):
            gate, up = wanted.chunk(2, -1)
            wanted = F.silu(gate) * up
        found = found.sum(0) if found.dim() == 3 else found
        error = float((found - wanted).norm() / wanted.norm())
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:200]
    return "" if error < 1e-2 else f"wrong by {error}"


def compile_all(jobs: list[Job], seconds: float, compile_job: Callable[[Job], str] = compile_job) -> dict[Job, str]:
    """What does not work, and why."""
    failed = dict.fromkeys(jobs, "not compiled in time")
    executor = ProcessPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 2)), multiprocessing.get_context("spawn"))
    futures = {executor.submit(compile_job, job): job for job in jobs}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()  # a worker that died
            if problem := repr(error) if error else future.result():
                failed[futures[future]] = problem
                print("FAILED", futures[future], problem, flush=True)
            else:
                del failed[futures[future]]
    except TimeoutError:
        print("compiling was cut short", flush=True)
    executor.shutdown(wait=False, cancel_futures=True)
    return failed


class Stack:
    """Layers of one model; attention is stood in for by the first columns of qkv."""

    def __init__(self, model: str) -> None:
        self.hidden, _, self.heads, _ = MODELS[model]
        self.products = products(model)
        self.norm = torch.rand(self.hidden, device=DEVICE).to(DTYPE) + 0.5
        self.layers = [[inputs(product, 1, 1)[1][0] for product in self.products] for _ in range(LAYERS)]

    def microseconds(self, rows: int, configs: list[Config | None]) -> float:
        start, residual = (torch.randn(rows, self.hidden, device=DEVICE).to(DTYPE) for _ in range(2))
        operations = [operation for operation, _, _ in self.products]

        def norm(x: Tensor) -> Tensor:
            join = sum_add_rms_norm if x.dim() == 3 else add_rms_norm
            return join(x, residual, self.norm, EPS)[0]

        def body() -> None:
            x = start
            for layer in self.layers:
                q, o, gate_up, down = zip(operations, layer, configs, strict=True)
                x = run(q[0], norm(x), *q[1:])
                x = run(o[0], x[:, : self.heads], *o[1:])
                x = run(gate_up[0], norm(x), *gate_up[1:])
                x = run(down[0], x, *down[1:])

        return microseconds(body, 5)

    def tune(self, rows: int, alone: list[list[tuple[float, Config]]]) -> dict[str, Any]:
        """One product at a time, twice, the best alone of each number of splits in the chain; from two starts."""
        nothing: list[Config | None] = [None] * len(self.products)
        cublas = self.microseconds(rows, nothing)
        best, chosen = cublas, nothing
        for start in nothing, [found[0][1] if found else None for found in alone]:
            current, trial = self._descend(rows, start, alone)
            if current < best:
                best, chosen = current, trial
        return {"rows": rows, "us": best, "us_cublas": cublas, "configs": chosen}

    def _descend(
        self, rows: int, chosen: list[Config | None], alone: list[list[tuple[float, Config]]]
    ) -> tuple[float, list[Config | None]]:
        best = self.microseconds(rows, chosen)
        for i in [*range(len(chosen))] * 2:
            tries: list[Config | None] = [config for _, config in alone[i][:4]]
            for splits in {config.splits for _, config in alone[i]}:
                tries += [config for _, config in alone[i] if config.splits == splits][:3]
            for config in dict.fromkeys([*tries, None]):
                trial = [*chosen[:i], config, *chosen[i + 1 :]]
                took = self.microseconds(rows, trial)
                if took < best:
                    best, chosen = took, trial
        return best, chosen


def time_alone(product: Product, rows: int, failed: dict[Job, str]) -> tuple[float, list[tuple[float, Config]]]:
    """µs of cuBLAS, and of each configuration, best first."""
    operation, n, k = product
    size = 2 * n * k * (2 if is_gated(operation) else 1)
    count = max(4, min(LAYERS, math.ceil(3 * L2_BYTES / size)))
    x, weights = inputs(product, rows, count)

    def took(config: Config | None) -> float:
        def body() -> None:
            for weight in weights:
                run(operation, x, weight, config)

        return microseconds(body, 5) / count

    timed = [
        (took(config), config) for config in candidates(product, rows) if (operation, rows, n, k, config) not in failed
    ]
    return took(None), sorted(timed)


def main(out: str, seconds: float, all_rows: list[int], models: list[str]) -> None:
    began = time.monotonic()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "models": {}}
    plan = [(model, rows) for model in models for rows in all_rows]
    jobs = [
        (product[0], rows, *product[1:], config)
        for model, rows in plan
        for product in products(model)
        for config in candidates(product, rows)
    ]
    failed = compile_all(jobs, seconds)
    print(f"compiled {len(jobs) - len(failed)} of {len(jobs)} in {time.monotonic() - began:.0f} s", flush=True)
    for model in models:
        stack = Stack(model)
        report["models"][model] = []
        for rows in all_rows:
            timed = [time_alone(product, rows, failed) for product in stack.products]
            row = stack.tune(rows, [found for _, found in timed])
            for (operation, n, k), (cublas, found), config in zip(stack.products, timed, row["configs"], strict=True):
                line = "  ".join(f"{took:.2f} {tuple(map(int, config))}" for took, config in found[:3])
                print(f"{model} {rows} {operation} {n} {k}: cuBLAS {cublas:.2f} us  {line}", flush=True)
                if config is not None:
                    print(f'    ("{operation}", {rows}, {n}, {k}): {config!r},', flush=True)
            print(f"{model} {rows}: {row['us']:.0f} us, cuBLAS {row['us_cublas']:.0f}", flush=True)
            alone = [[cublas, found[:12]] for cublas, found in timed]
            report["models"][model].append(row | {"alone": alone})
            Path(out).write_text(json.dumps(report, indent=1))
        del stack
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("out", help="JSON report")
    parser.add_argument("--seconds", type=float, default=120, help="when to stop compiling (default 120)")
    parser.add_argument("--rows", default="32,64,128,256", help="batch sizes, with commas between")
    parser.add_argument("--model", default="0.6B", help=f"some of {','.join(MODELS)}")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seconds, [int(m) for m in arguments.rows.split(",")], arguments.model.split(","))
