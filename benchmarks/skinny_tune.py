"""Times the fused linears of decode batches on this GPU: benchmarks/skinny_tune.py OUT.json [--rows 32,64] [--model 8B]

For the shapes of Qwen3-0.6B and 8B and 1 to 256 rows: every kernel alone over a bounded sweep of configurations, then
the chain of a layer stack in one CUDA graph, with programmatic dependent launch and without, against what runs instead
(cuBLAS with this package's norm and activation kernels) and against the bytes that have to be read; and 0.6B's LM head
with the last norm inside. Prints the best as entries for TUNED in nanovllm_bento/kernels/skinny.py. A
configuration that fails or is wrong is named and left out; sweeps end when the time is up.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.norm import add_rms_norm, rms_norm
from nanovllm_bento.kernels.skinny import Config

ROWS = [1, 2, 4, 8, 16]
HEAD_ROWS = [1, 2, 4, 16]
HEAD = ("norm_linear", 151936, 1024)
LAYERS = 28
L2_BYTES = 50 << 20
EPS = 1e-6
# hidden, qkv out, o in, MLP
MODELS = {"0.6B": (1024, 4096, 2048, 3072), "8B": (4096, 6144, 4096, 12288)}
RANK_OF_TWO = "8B/2"
"""One of two tensor-parallel ranks of the 8B: the norms come after a sum over the ranks, in a kernel of its own."""
DEVICE, DTYPE = "cuda", torch.bfloat16
Job = tuple[str, int, int, int, Config]  # operation, rows, n, k


def shapes(model: str) -> list[tuple[str, int, int]]:
    if model == RANK_OF_TWO:
        hidden, qkv, heads, mlp = MODELS["8B"]
        return [
            ("linear", qkv // 2, hidden),
            ("linear", hidden, heads // 2),
            ("gate_up", mlp // 2, hidden),
            ("linear", hidden, mlp // 2),
        ]
    hidden, qkv, heads, mlp = MODELS[model]
    return [
        ("norm_linear", qkv, hidden),
        ("linear_add", hidden, heads),
        ("norm_gate_up", mlp, hidden),
        ("linear_add", hidden, mlp),
    ]


def choose_config(operation: str, m: int, n: int, k: int) -> Config:
    return skinny.choose_config(operation, m, n, k, 2)


def all_shapes(model: str) -> list[tuple[str, int, int]]:
    return [*shapes(model), *([HEAD] if model == "0.6B" else [])]


def rows_of(n: int, all_rows: list[int]) -> list[int]:
    return [m for m in all_rows if n != HEAD[1] or m in HEAD_ROWS]


def candidates(operation: str, m: int, n: int, k: int) -> list[Config]:
    """The heuristic's choice first, then its neighbours."""
    matrices = 2 if skinny.is_gated(operation) else 1
    found = [choose_config(operation, m, n, k)]
    if m <= 4:
        for num_warps, block_k in [(1, 256), (4, 256), (4, 1024), (2, 512)]:
            tiles = math.ceil(k / block_k)
            if tiles > 24:
                continue
            for block_n in [1, 2, 4, 8, 16, 32]:
                registers = block_n * matrices * block_k * tiles / (64 * num_warps)  # of a lane, for all weights
                sums = block_n * matrices * block_k * m / (32 * num_warps)
                prefetch = max(1, int(tiles * min(1, 128 / registers)))
                if registers >= 16 and registers * prefetch / tiles + sums <= 210 and n / block_n >= 100:
                    found.append(Config(block_n, block_k, prefetch, num_warps))
    block_m = max(m, 4)
    for split, block_k in [(8, 128), (8, 64), (4, 128), (4, 64)]:
        tiles = math.ceil(k / (split * block_k))
        if tiles > 12:
            continue
        for block_n in [8, 16, 32]:
            registers = block_n * matrices * block_k / 64
            if registers <= 96 and n / block_n >= 60:
                prefetch = min(tiles, max(1, int(96 // registers)))
                found.append(Config(block_n, block_k, prefetch, split, split, block_m))
    return list(dict.fromkeys(found))


def compile_key(job: Job) -> tuple[Any, ...]:
    """Jobs that share a binary share a key: n is no part of one, nor the rows where tensor cores compute."""
    operation, m, n, k, config = job
    return operation, 0 if config.split else m, k, n % config.block_n == 0, config


def compile_job(job: Job) -> str:
    """Fill Triton's cache by a launch on one block of columns, in a process of its own; what failed, or nothing."""
    operation, m, n, k, config = job
    try:
        if isinstance(config, Config):
            n = config.block_n if n % config.block_n == 0 else config.block_n + 1
        x, weight, norm, out = inputs(operation, m, n, k, count=1)
        run(operation, x, weight[0], norm, out, config, pdl=True)
        if config == choose_config(operation, m, job[2], k):
            run(operation, x, weight[0], norm, out, config, pdl=False)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def inputs(operation: str, m: int, n: int, k: int, count: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    rows = 2 * n if skinny.is_gated(operation) else n
    weights = torch.empty(count, rows, k, device=DEVICE, dtype=DTYPE).normal_(std=k**-0.5)
    norm = torch.rand(k, device=DEVICE).to(DTYPE) + 0.5
    x = torch.randn(m, k, device=DEVICE).to(DTYPE)
    return x, list(weights), norm, torch.randn(m, n, device=DEVICE).to(DTYPE)


def run(operation: str, x: Tensor, weight: Tensor, norm: Tensor, out: Tensor, config: Config | None, pdl: bool) -> None:
    from nanovllm_bento.kernels.skinny_triton import launch

    norm_weight = norm if operation.startswith("norm") else None
    launch(operation, x, weight, out, config, norm_weight, EPS, pdl=pdl)


def unfused(operation: str, x: Tensor, weight: Tensor, norm: Tensor, out: Tensor) -> Tensor:
    """cuBLAS and torch's own operations; returns what ``run`` writes into out."""
    if operation.startswith("norm"):
        x = F.rms_norm(x, norm.shape, norm, EPS)
    y = F.linear(x, weight)
    if skinny.is_gated(operation):
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return out.add_(y) if operation == "linear_add" else y


def instead(operation: str, x: Tensor, weight: Tensor, norm: Tensor, residual: Tensor | None) -> Tensor:
    """What the model runs without these kernels; the add to the residual stream is in the norm that follows."""
    if operation.startswith("norm"):
        x = rms_norm(x, norm, EPS) if residual is None else add_rms_norm(x, residual, norm, EPS)[0]
    y = F.linear(x, weight)
    return silu_and_mul(y) if skinny.is_gated(operation) else y


def microseconds(body: Callable[[], None], replays: int) -> float:
    """Of one replay of body's graph: the median of 5 groups of replays."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / replays)
    return statistics.median(times)


def per_weight(weights: list[Tensor], product: Callable[[Tensor], object]) -> float:
    """µs of one product, with one weight after the other."""

    def body() -> None:
        for weight in weights:
            product(weight)

    return microseconds(body, 5) / len(weights)


def is_right(job: Job, x: Tensor, weight: Tensor, norm: Tensor, out: Tensor) -> bool:
    operation, _, _, _, config = job
    before = out.clone()
    wanted = unfused(operation, x, weight, norm, before.clone()).double()
    found = before.clone()
    run(operation, x, weight, norm, found, config, pdl=True)
    return bool((found.double() - wanted).norm() < 2e-2 * wanted.norm())


def tune(
    model: str, all_rows: list[int], failed: dict[tuple[Any, ...], str], deadline: float
) -> dict[tuple[str, int, int, int], list[Any]]:
    """(operation, rows, n, k) -> [µs instead, (µs, config), ...], best first; prints a line each."""
    results: dict[tuple[str, int, int, int], list[Any]] = {}
    for operation, n, k in all_shapes(model):
        head = (operation, n, k) == HEAD
        size = 2 * n * k * (2 if skinny.is_gated(operation) else 1)
        count = 1 if head else max(4, min(LAYERS, math.ceil(3 * L2_BYTES / size)))
        for m in rows_of(n, all_rows):
            x, weights, norm, out = inputs(operation, m, n, k, count)
            residual = None if head else x.clone()
            scratch = x.clone()  # add_rms_norm writes into both

            cublas = per_weight(weights, partial(instead, operation, scratch, norm=norm, residual=residual))
            timed = []
            for config in candidates(operation, m, n, k):
                job = (operation, m, n, k, config)
                if time.monotonic() > deadline or compile_key(job) in failed:
                    continue
                try:
                    if not is_right(job, x, weights[0], norm, out):
                        print("WRONG", *job, flush=True)
                        continue
                    fused = partial(run, operation, x, norm=norm, out=out, config=config, pdl=True)
                    timed.append((per_weight(weights, fused), config))
                except Exception as error:
                    print("FAILED", *job, f"{type(error).__name__}: {error}"[:200], flush=True)
            if timed:
                heuristic = next((us for us, c in timed if c == choose_config(operation, m, n, k)), math.nan)
                timed.sort(key=lambda pair: pair[0])
                us, best = timed[0]
                print(
                    f"{model} {operation:13} m {m:3} n {n:5} k {k:5}: {us:7.2f} us {size / us / 1e6:5.2f} TB/s"
                    f"  as chosen {heuristic:7.2f}  instead {cublas:7.2f}"
                    f"  {'fused' if us < cublas else 'INSTEAD'} is faster  {tuple(best)} of {len(timed)}",
                    flush=True,
                )
                results[operation, m, n, k] = [cublas, *timed]
    return results


class Stack:
    """28 layers of one model; attention is stood in for by the first columns of qkv."""

    def __init__(self, model: str) -> None:
        self.hidden, self.qkv, self.heads, self.mlp = MODELS[model]
        self.shapes = shapes(model)
        self.norm = torch.rand(self.hidden, device=DEVICE).to(DTYPE) + 0.5
        self.layers = [[inputs(operation, 1, n, k, 1)[1][0] for operation, n, k in self.shapes] for _ in range(LAYERS)]
        self.bytes = sum(weight.nbytes for layer in self.layers for weight in layer)

    def milliseconds(self, m: int, configs: list[Config | None], pdl: bool) -> float:
        residual = torch.randn(m, self.hidden, device=DEVICE).to(DTYPE)
        a, b = residual.new_empty(m, self.qkv), residual.new_empty(m, self.mlp)
        arguments = [(residual, a), (a[:, : self.heads], residual), (residual, b), (b, residual)]

        def body() -> None:
            for layer in self.layers:
                for (operation, _, _), weight, (x, out), config in zip(
                    self.shapes, layer, arguments, configs, strict=True
                ):
                    run(operation, x, weight, self.norm, out, config, pdl)

        return microseconds(body, 5) / 1000

    def milliseconds_instead(self, m: int) -> float:
        residual = torch.randn(m, self.hidden, device=DEVICE).to(DTYPE)
        start = torch.randn(m, self.hidden, device=DEVICE).to(DTYPE)

        def body() -> None:
            x = start
            for w_qkv, w_o, w_gate_up, w_down in self.layers:
                x = instead("norm_linear", x, w_qkv, self.norm, residual)
                x = instead("linear_add", x[:, : self.heads], w_o, self.norm, None)
                x = instead("norm_gate_up", x, w_gate_up, self.norm, residual)
                x = instead("linear_add", x, w_down, self.norm, None)

        return microseconds(body, 5) / 1000


def tune_stack(model: str, all_rows: list[int], alone: dict[Any, list[Any]], deadline: float) -> list[dict[str, Any]]:
    """Start from each kernel's best alone; then, one operation at a time, try its next best in the chain."""
    stack = Stack(model)
    rows = []
    for m in all_rows:
        keys = [(operation, m, n, k) for operation, n, k in stack.shapes]
        if any(key not in alone for key in keys):
            continue
        as_chosen: list[Config | None] = [choose_config(*key) for key in keys]
        chosen = as_chosen
        heuristic = best = stack.milliseconds(m, chosen, pdl=True)
        start: list[Config | None] = [alone[key][1][1] for key in keys]
        took = stack.milliseconds(m, start, pdl=True)
        if took < best:
            best, chosen = took, start
        for i, key in enumerate(keys):
            for _, config in alone[key][1:6]:
                if time.monotonic() < deadline and config != chosen[i]:
                    trial = [*chosen[:i], config, *chosen[i + 1 :]]
                    took = stack.milliseconds(m, trial, pdl=True)
                    if took < best:
                        best, chosen = took, trial
        row = {
            "model": model,
            "rows": m,
            "ms": best,
            "ms_as_chosen": heuristic,
            "ms_as_chosen_without_pdl": stack.milliseconds(m, as_chosen, pdl=False),
            "ms_instead": stack.milliseconds_instead(m),
            "us_of_a_layer": best * 1000 / LAYERS,
            "ms_of_bytes_at_3_TB_a_second": stack.bytes / 3e9,
            "configs": [[*key, tuple(c or ())] for key, c in zip(keys, chosen, strict=True)],
        }
        print(
            "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.items()
                if name != "configs"
            ),
            flush=True,
        )
        rows.append(row)
    return rows


def main(out: str, seconds: float, all_rows: list[int], models: list[str]) -> None:
    began = time.monotonic()
    jobs: dict[tuple[Any, ...], Job] = {}
    for model in models:
        for operation, n, k in all_shapes(model):
            for m in rows_of(n, all_rows):
                for config in candidates(operation, m, n, k):
                    job = (operation, m, n, k, config)
                    jobs.setdefault(compile_key(job), job)
    failed: dict[tuple[Any, ...], str] = dict.fromkeys(jobs, "not compiled in time")
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures = {executor.submit(compile_job, job): key for key, job in jobs.items()}
    try:
        for future in as_completed(futures, timeout=0.5 * seconds):
            error = future.exception()  # a worker that died
            if problem := repr(error) if error else future.result():
                failed[futures[future]] = problem
                print("FAILED", jobs[futures[future]], problem, flush=True)
            else:
                del failed[futures[future]]
    except TimeoutError:
        print("compiling was cut short", flush=True)
    executor.shutdown(wait=False, cancel_futures=True)
    print(f"compiled {len(jobs) - len(failed)} of {len(jobs)} in {time.monotonic() - began:.0f} s", flush=True)

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": [],
        "stacks": [],
        "failed": [[*map(str, jobs[key]), problem] for key, problem in failed.items()],
    }
    tuned = {}
    for model in models:
        deadline = began + seconds * (1.0 if model == models[-1] else 0.8)
        alone = tune(model, all_rows, failed, began + seconds * (0.9 if model == models[-1] else 0.7))
        for key, (cublas, *timed) in alone.items():
            tuned[key] = timed[0][1]
            entry = {"key": key, "us_instead": cublas, "us": [[us, tuple(c)] for us, c in timed]}
            report["kernels"].append(entry)
        for row in tune_stack(model, all_rows, alone, deadline) if model in MODELS else ():
            report["stacks"].append(row)
            tuned |= {tuple(key): Config(*config) for *key, config in row["configs"]}
        Path(out).write_text(json.dumps(report, indent=1))
        torch.cuda.empty_cache()
    print("TUNED: dict[tuple[str, int, int, int], Config] = {")
    for key, config in tuned.items():
        print(f"    {key!r}: Config{tuple(config)},".replace("'", '"'))
    print("}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("out", help="JSON report")
    parser.add_argument("seconds", nargs="?", type=float, default=110, help="when to stop trying (default 110)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="batch sizes, with commas between")
    parser.add_argument("--model", default=",".join(MODELS), help=f"some of {','.join([*MODELS, RANK_OF_TWO])}")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seconds, [int(m) for m in arguments.rows.split(",")], arguments.model.split(","))
