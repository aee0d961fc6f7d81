"""Times the experts of Qwen3-30B-A3B on this GPU: benchmarks/moe.py OUT.json [--tokens 1,256] [--ranks 1,2]

For one rank and for one of two (half of each expert's inner size), and 1 to 8192 tokens: every kernel alone over a list
of tiles, then the whole layer, against the time that its bytes (the weights of the experts that are asked) and its
FLOPs need at the measured copy bandwidth and matrix rate. Everything is CUDA-graph replays over several layers' weights
and routings in turn, so that the L2 cache holds none of them. Prints the best as entries for TUNED in
nanovllm_bento/kernels/moe.py. A configuration that fails or is wrong is named and left out; what is left when the time
is up is skipped.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.roofline import measure_ceilings
from nanovllm_bento.kernels import moe, skinny
from nanovllm_bento.kernels.linear import linear
from nanovllm_bento.kernels.moe import Config, GroupedConfig, PairConfig, PairTile, Tile

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8
TOKENS = [1, 2, 4, 16, 64, 256, 1024, 8192]
LAYERS = 4
DEVICE, DTYPE = "cuda", torch.bfloat16
SHARED_MEMORY = 227 << 10
AnyTile = Tile | PairTile


class Job(NamedTuple):
    """One kernel with one tile; ``inner`` as on the rank. block_m 0: by pairs."""

    operation: str  # gate_up or down
    block_m: int
    tile: AnyTile
    inner: int


def block_sizes(tokens: int) -> list[int]:
    """Rows of a block to try; 0: by pairs."""
    rows = tokens * TOP_K / EXPERTS
    if tokens <= 16:
        return [0, 16] if tokens <= 4 else [16, 0]
    if rows <= 4:
        return [16]
    return [16, 32] if rows <= 32 else [64, 128] if rows <= 96 else [128, 64]


def tiles(operation: str, block_m: int, inner: int) -> list[AnyTile]:
    """A bounded list; what does not fit in shared memory is left out."""
    gate_up = operation == "gate_up"
    if not block_m:
        pairs = [(4, 2048, 4), (2, 2048, 4), (8, 2048, 8), (4, 1024, 4), (8, 1024, 4), (2, 1024, 2), (4, 512, 2)]
        if not gate_up:
            pairs = [(4, 256, 4), (2, 256, 4), (8, 256, 8), (2, 256, 2), (4, 128, 4), (8, 128, 4), (4, 128, 2)]
        return [PairTile(*pair) for pair in pairs]
    found = []
    if block_m <= 32:
        for block_n, block_k, warps, stages in [
            *((16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4)),
            *((128, 64, 4, 4), (128, 128, 4, 3), (128, 64, 8, 4), (64, 256, 4, 2)),
        ]:
            found.append(Tile(block_n, block_k, warps, stages))
            if block_n >= 64:
                found.append(Tile(block_n, block_k, warps, stages, swap=True))
        found.append(Tile(64, 64, 4, 6, swap=True))
    else:
        for block_n, block_k, warps, stages in [
            *((64, 64, 4, 4), (64, 64, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 3)),
            *((128, 32, 8, 5), (256, 64, 8, 3)),
        ]:
            groups = (1, 8) if block_m == 64 else (4, 8)
            found += [Tile(block_n, block_k, warps, stages, group) for group in groups]
        found.append(Tile(128, 64, 8, 4, 16))
        found.append(Tile(128, 64, 8, 3, 8, swap=True))
    matrices = 2 if gate_up else 1
    width = inner if gate_up else HIDDEN

    def fits(tile: Tile) -> bool:
        size = 2 * tile.block_k * (block_m + matrices * tile.block_n) * tile.num_stages
        registers = block_m * tile.block_n * matrices // (32 * tile.num_warps)  # of a thread, for sums
        return size <= SHARED_MEMORY and registers <= 128 and tile.block_n <= width

    return [tile for tile in found if fits(tile)]


def compile_key(job: Job) -> tuple[Any, ...]:
    """Jobs that share a binary share a key."""
    n, k = (job.inner, HIDDEN) if job.operation == "gate_up" else (HIDDEN, job.inner)
    even = n % job.tile.block_n == 0, k % job.tile.block_k == 0
    return job.operation, job.block_m, job.tile, even, 0 if job.block_m else k


def compile_job(job: Job) -> str:
    """Fill Triton's cache by a launch with one expert, in a process of its own; what failed, or nothing."""
    try:
        gate_up = torch.zeros(1, 2 * job.inner, HIDDEN, device=DEVICE, dtype=DTYPE)
        down = torch.zeros(1, HIDDEN, job.inner, device=DEVICE, dtype=DTYPE)
        x = torch.zeros(1, HIDDEN, device=DEVICE, dtype=DTYPE)
        ids = torch.zeros(1, TOP_K, device=DEVICE, dtype=torch.int32)
        run_alone(job, x, gate_up, down, torch.zeros(1, TOP_K, device=DEVICE), ids, None, None)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def run_alone(
    job: Job,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    found: moe.SortedPairs | None,
    h: Tensor | None,
) -> None:
    """One kernel; what it needs of the ones before it (found, h) is made where it is None."""
    from nanovllm_bento.kernels import moe_pairs_triton, moe_triton

    tile = job.tile
    if isinstance(tile, PairTile):
        if job.operation == "gate_up":
            moe_pairs_triton.gate_up_pairs(x, gate_up, ids, 0, tile)
        else:
            h = x.new_zeros(ids.numel(), job.inner) if h is None else h
            moe_pairs_triton.down_pairs(h, down, weights, ids, 0, tile)
        return
    found = moe_triton.sort_pairs(ids, 0, len(gate_up), job.block_m) if found is None else found
    if job.operation == "gate_up":
        moe_triton.grouped_gate_up(x, gate_up, found, TOP_K, tile)
    else:
        h = x.new_zeros(len(found.pairs), job.inner) if h is None else h
        moe_triton.grouped_down(h, down, found, weights, tile)


def microseconds(body: Callable[[], None]) -> float:
    """Of one replay of body's graph: the median of 3 groups of replays, some 15 ms each."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()

    def timed(replays: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / replays

    timed(1)
    replays = max(2, min(50, int(15_000 / timed(1))))
    return statistics.median(timed(replays) for _ in range(3))


class Rank:
    """The weights of several layers as one of ``ranks`` holds them."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.inner = ranks, INNER // ranks
        self.router, self.gate_up, self.down = [], [], []
        for _ in range(LAYERS):
            self.router.append(random(EXPERTS, HIDDEN))
            self.gate_up.append(random(EXPERTS, 2 * self.inner, HIDDEN))
            self.down.append(random(EXPERTS, HIDDEN, self.inner))


def random(*shape: int) -> Tensor:
    return torch.empty(*shape, device=DEVICE, dtype=DTYPE).normal_(std=shape[-1] ** -0.5)


class Case:
    """A number of tokens on one rank: inputs, routing and expected results."""

    def __init__(self, rank: Rank, tokens: int, failed: dict[tuple[Any, ...], str], deadline: float) -> None:
        self.rank, self.tokens, self.failed, self.deadline = rank, tokens, failed, deadline
        self.x = torch.randn(tokens, HIDDEN, device=DEVICE).to(DTYPE)
        routed = [moe.route(linear(self.x, router, None), TOP_K, renormalize=True) for router in rank.router]
        self.weights = [weights for weights, _ in routed]
        self.ids = [ids for _, ids in routed]
        self.experts = statistics.mean(len(ids.unique()) for ids in self.ids)
        self.wanted = moe.experts_mlp_reference(
            self.x, rank.gate_up[0], rank.down[0], self.weights[0], self.ids[0]
        ).double()
        self.skipped = 0

    @property
    def bytes(self) -> float:
        return self.experts * 3 * self.rank.inner * HIDDEN * 2

    @property
    def flops(self) -> float:
        return self.tokens * TOP_K * 6 * self.rank.inner * HIDDEN

    def is_right(self, config: Config) -> bool:
        found = moe.experts_mlp(
            self.x, self.rank.gate_up[0], self.rank.down[0], self.weights[0], self.ids[0], config=config
        )
        return bool((found.double() - self.wanted).norm() < 2e-2 * self.wanted.norm())

    def per_layer(self, body: Callable[[int], Any]) -> float:
        def all_layers() -> None:
            for layer in range(LAYERS):
                body(layer)

        return microseconds(all_layers) / LAYERS

    def tune(self, operation: str, block_m: int, other: AnyTile) -> list[tuple[float, AnyTile]]:
        """(µs, tile), best first. other: a tile of the other product, to check results of the two together."""
        from nanovllm_bento.kernels import moe_triton

        rank, timed = self.rank, []
        found: list[moe.SortedPairs | None] = [None] * LAYERS
        rows = self.tokens * TOP_K
        if block_m:
            found = [moe_triton.sort_pairs(ids, 0, EXPERTS, block_m) for ids in self.ids]
            rows = moe.max_blocks(rows, EXPERTS, block_m) * block_m
        h = torch.randn(rows, rank.inner, device=DEVICE).to(DTYPE)
        for tile in tiles(operation, block_m, rank.inner):
            job = Job(operation, block_m, tile, rank.inner)
            if time.monotonic() > self.deadline:
                self.skipped += 1
                continue
            if compile_key(job) in self.failed:
                continue

            def body(layer: int, job: Job = job) -> None:
                weights, ids = self.weights[layer], self.ids[layer]
                run_alone(job, self.x, rank.gate_up[layer], rank.down[layer], weights, ids, found[layer], h)

            try:
                pair = (tile, other) if operation == "gate_up" else (other, tile)
                if not self.is_right(make_config(block_m, *pair)):
                    print("WRONG", self.tokens, *job, flush=True)
                    continue
                timed.append((self.per_layer(body), tile))
            except Exception as error:
                print("FAILED", self.tokens, *job, f"{type(error).__name__}: {error}"[:200], flush=True)
        return sorted(timed, key=lambda pair: pair[0])

    def parts(self, config: Config) -> dict[str, float]:
        """Microseconds of what is not tuned: router, choice of experts, sorting, sum."""
        from nanovllm_bento.kernels import moe_triton

        rank = self.rank
        logits = [linear(self.x, router, None) for router in rank.router]
        found = {
            "router": self.per_layer(lambda layer: self.router_logits(layer)),
            "route": self.per_layer(lambda layer: moe.route(logits[layer], TOP_K, renormalize=True)),
        }
        if isinstance(config, GroupedConfig):
            y = random(self.tokens * TOP_K, HIDDEN)
            block_m = config.block_m
            found["sort"] = self.per_layer(lambda layer: moe_triton.sort_pairs(self.ids[layer], 0, EXPERTS, block_m))
            found["combine"] = self.per_layer(lambda layer: moe_triton.combine(y, self.ids[layer], 0, EXPERTS))
        return found

    def router_logits(self, layer: int) -> Tensor:
        """As layers/moe.py."""
        if skinny.supports(self.tokens, DTYPE, self.x.device, HIDDEN):
            return skinny.linear(self.x, self.rank.router[layer], None)
        return linear(self.x, self.rank.router[layer], None)

    def layer(self, config: Config) -> float:
        """Microseconds of the whole layer: router, experts, sum."""
        rank = self.rank

        def body(layer: int) -> None:
            weights, ids = moe.route(self.router_logits(layer), TOP_K, renormalize=True)
            moe.experts_mlp(self.x, rank.gate_up[layer], rank.down[layer], weights, ids, config=config)

        return self.per_layer(body)


def make_config(block_m: int, gate_up: AnyTile, down: AnyTile) -> Config:
    if isinstance(gate_up, PairTile) and isinstance(down, PairTile):
        return PairConfig(gate_up, down)
    assert isinstance(gate_up, Tile) and isinstance(down, Tile)
    return GroupedConfig(block_m, gate_up, down)


def measure(case: Case, copy_bytes_s: float, matmul_flops_s: float) -> dict[str, Any]:
    """Tune one case: each product alone for each block size, then the whole layer with the best of each."""
    rank = case.rank
    chosen = moe.choose_config(EXPERTS, 2 * rank.inner, HIDDEN, TOP_K, case.tokens, 2)
    tried: dict[str, dict[str, list[Any]]] = {}
    layers: list[tuple[float, Config]] = []
    for block_m in block_sizes(case.tokens):
        defaults = [tiles(operation, block_m, rank.inner)[0] for operation in ("gate_up", "down")]
        gate_up = case.tune("gate_up", block_m, defaults[1])
        down = case.tune("down", block_m, defaults[0])
        tried[str(block_m)] = {
            name: [[round(us, 2), tuple(tile)] for us, tile in timed]
            for name, timed in (("gate_up", gate_up), ("down", down))
        }
        if gate_up and down:
            config = make_config(block_m, gate_up[0][1], down[0][1])
            layers.append((case.layer(config), config))
    as_chosen = case.layer(chosen)
    best, config = min([*layers, (as_chosen, chosen)], key=lambda pair: pair[0])
    of_bytes, of_flops = case.bytes / copy_bytes_s * 1e6, case.flops / matmul_flops_s * 1e6
    floor = max(of_bytes, of_flops)
    us_parts = case.parts(config)
    row = {
        "ranks": rank.ranks,
        "inner": rank.inner,
        "tokens": case.tokens,
        "experts_asked": case.experts,
        "us_of_bytes": of_bytes,
        "us_of_flops": of_flops,
        "us_layer": best,
        "us_layer_as_chosen": as_chosen,
        "us_layer_invariant": case.layer(moe.INVARIANT),
        "of_floor": floor / best,
        "config": config,
        "config_as_chosen": chosen,
        "us_parts": us_parts,
        "tried": tried,
        "skipped": case.skipped,
    }
    line = (
        f"TP {rank.ranks} tokens {case.tokens:5}: layer {best:8.1f} us (as chosen {as_chosen:8.1f}), floor {floor:8.1f}"
    )
    line += f" {'bytes' if of_bytes > of_flops else 'FLOPs'} {floor / best:6.1%}"
    parts = dict(us_parts)
    used = str(config.block_m if isinstance(config, GroupedConfig) else 0)
    for name, timed in tried.get(used, {}).items():
        if timed:
            parts[name] = timed[0][0]
    print(line, " ".join(f"{name} {us:.1f}" for name, us in parts.items()), flush=True)
    for height, products in tried.items():
        for name, timed in products.items():
            best3 = ", ".join(f"{us} {tile}" for us, tile in timed[:3])
            print(f"    block_m {height:>3} {name:7} {best3} of {len(timed)}", flush=True)
    return row


def compile_all(jobs: dict[tuple[Any, ...], Job], seconds: float, workers: int) -> dict[tuple[Any, ...], str]:
    """Fill Triton's cache in parallel. Returns what failed, by key."""
    failed: dict[tuple[Any, ...], str] = dict.fromkeys(jobs, "not compiled in time")
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures = {executor.submit(compile_job, job): key for key, job in jobs.items()}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()  # a worker that died
            if problem := repr(error) if error else future.result():
                failed[futures[future]] = problem
                print("FAILED", jobs[futures[future]], problem, flush=True)
            else:
                del failed[futures[future]]
    except TimeoutError:
        print(f"{len(failed)} of {len(jobs)} were not compiled in time", flush=True)
    executor.shutdown(wait=False, cancel_futures=True)
    return failed


def all_jobs(all_tokens: list[int], all_ranks: list[int]) -> dict[tuple[Any, ...], Job]:
    jobs: dict[tuple[Any, ...], Job] = {}
    for ranks in all_ranks:
        for tokens in all_tokens:
            for block_m in block_sizes(tokens):
                for operation in ("gate_up", "down"):
                    for tile in tiles(operation, block_m, INNER // ranks):
                        job = Job(operation, block_m, tile, INNER // ranks)
                        jobs.setdefault(compile_key(job), job)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=110, help="skip what is left after these (%(default)s)")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="separated by commas")
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="separated by commas")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)), help="compilers")
    args = parser.parse_args()
    began = time.monotonic()
    jobs = all_jobs(args.tokens, args.ranks)
    failed = compile_all(jobs, 0.5 * args.seconds, args.jobs)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} compiled in {time.monotonic() - began:.0f} s", flush=True)
    ceilings = measure_ceilings(torch.device(DEVICE), DTYPE)
    print(
        f"copy {ceilings.copy_bytes_s / 1e9:.0f} GB/s, matmul {ceilings.matmul_flops_s / 1e12:.0f} TFLOP/s", flush=True
    )
    torch.manual_seed(0)
    rows = []
    for i, ranks in enumerate(args.ranks):
        deadline = began + args.seconds * (0.5 + 0.5 * (i + 1) / len(args.ranks))
        rank = Rank(ranks)
        for tokens in args.tokens:
            case = Case(rank, tokens, failed, deadline)
            rows.append(measure(case, ceilings.copy_bytes_s, ceilings.matmul_flops_s))
        del rank
    print("\nTUNED = {")
    for row in rows:
        key = (EXPERTS, TOP_K, row["inner"], HIDDEN, row["tokens"])
        print(f"    {key}: {source(row['config'])},")
    print("}")
    result = {
        "environment": environment(),
        "seconds": time.monotonic() - began,
        "shape": {"hidden": HIDDEN, "inner": INNER, "experts": EXPERTS, "top_k": TOP_K, "layers_in_turn": LAYERS},
        "ceilings": ceilings.as_dict(),
        "failed": [[str(jobs[key]), why] for key, why in failed.items()],
        "results": rows,
    }
    write_result(result, args.result)


def source(value: Any) -> str:
    """A configuration as Python writes it, without field names."""
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(source(field) for field in value)})"
    return repr(value)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
