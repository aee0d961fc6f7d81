#!/usr/bin/env python3
"""benchmarks/attention_tune.py RESULT.json [--seconds N]: attention kernels on this GPU against its memory and peers.

Decode (16 query heads, 8 KV heads, head_dim 128, block_size 16; bf16 and fp8 caches): first every tile shape under the
default splits, then the best shapes under other splits, for 1 to 256 rows of 300 to 1700 tokens and rows of 4096. The
calls of one CUDA graph go round regions of the cache that together exceed the L2 cache; blocks are distinct and
shuffled. Then the fused decode kernel against qk_norm_rope_store and decode, for 1 to 256 rows. Bytes are those of the
attended keys and values; percentages are of the copy bandwidth measured beside it.
Prefill: TFLOP/s. FlashAttention runs beside both where it is installed. A configuration that fails is reported."""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from nanovllm_bento.bench.environment import environment
from nanovllm_bento.kernels.attention.base import AttentionBackend, AttentionMetadata
from nanovllm_bento.kernels.attention.decode_triton import DecodeConfig
from nanovllm_bento.kernels.attention.decode_triton import choose_config as choose_decode
from nanovllm_bento.kernels.attention.flash_backend import FlashAttention
from nanovllm_bento.kernels.attention.prefill_triton import PrefillConfig
from nanovllm_bento.kernels.attention.prefill_triton import choose_config as choose_prefill
from nanovllm_bento.kernels.attention.triton_backend import TritonAttention
from nanovllm_bento.kernels.launch import num_sms
from nanovllm_bento.kernels.rope_store import make_step, qk_norm_rope_store

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16
NUM_BLOCKS = 40_000
TABLE_WIDTH = 256
MAX_MODEL_LEN = 4096
CUDA = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
KV_DTYPES = {"bf16": BF16, "fp8": FP8}
SCALE = HEAD_DIM**-0.5

DECODE_CASES = {
    "256 x 300..1700": [Random(0).randint(300, 1700) for _ in range(256)],
    "64 x 300..1700": [Random(1).randint(300, 1700) for _ in range(64)],
    "16 x 300..1700": [Random(2).randint(300, 1700) for _ in range(16)],
    "1 x 1000": [1000],
    "64 x 4096": [4096] * 64,
    "1 x 4096": [4096],
}
PREFILL_CASES = {"1 x 4096": [(4096, 4096)], "16 x 1024": [(1024, 1024)] * 16, "1 token on 4096": [(1, 4096)]}

TILES = [
    *(DecodeConfig(n, warps, stages) for n in (32, 64) for warps in (2, 4) for stages in (2, 3, 4, 5)),
    *(DecodeConfig(n, 8, stages) for n in (64, 128) for stages in (2, 3)),
    *(DecodeConfig(128, 4, stages) for stages in (2, 3, 4)),
    *(DecodeConfig(16, warps, stages) for warps in (1, 2) for stages in (3, 5)),
]
SPLITS: list[dict[str, Any]] = [
    *({"balance_splits": n, "balance_chunk": chunk} for n, chunk in ((1, 512), (2, 512), (4, 256), (8, 256), (8, 512))),
    *({"programs_per_sm": n} for n in (2, 4, 6, 8)),
    *({"programs_per_sm": 4, "min_chunk": chunk} for chunk in (64, 256)),
]
FUSED_CASES = ["1 x 1000", "1 x 4096", "16 x 300..1700", "64 x 300..1700", "256 x 300..1700"]
FUSED_FEW: list[dict[str, Any]] = [
    {"block_n": n, "num_warps": warps, "min_chunk": chunk, "programs_per_sm": programs, "num_stages": 2}
    for n, warps, chunk, programs in (
        (32, 2, 32, 4),
        (32, 4, 64, 4),
        (64, 2, 64, 4),
        (64, 4, 64, 1),
        (64, 4, 64, 4),
        (64, 4, 128, 4),
        (128, 4, 128, 4),
    )
]
FUSED_MANY: list[dict[str, Any]] = [
    {"block_n": n, "num_warps": warps, "num_stages": stages}
    for n, warps, stages in ((16, 1, 3), (32, 2, 2), (32, 2, 3), (32, 2, 4), (64, 4, 2), (64, 4, 3), (64, 2, 2))
]
PREFILL_TILES = [
    *(PrefillConfig(128, n, 8, stages) for n, stages in ((64, 2), (64, 3), (128, 2), (64, 4))),
    *(PrefillConfig(128, n, 4, stages) for n, stages in ((64, 2), (64, 3))),
    *(PrefillConfig(64, n, 4, stages) for n, stages in ((64, 2), (64, 3), (128, 2), (32, 4))),
]


@dataclass
class Memory:
    """The caches in both dtypes, random; a region is a range of their blocks."""

    k: dict[str, Tensor]
    v: dict[str, Tensor]


def make_memory(num_blocks: int) -> Memory:
    shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    k, v = (torch.empty(shape, dtype=BF16, device=CUDA).normal_() for _ in range(2))
    return Memory({"bf16": k, "fp8": k.to(FP8)}, {"bf16": v, "fp8": v.to(FP8)})


def regions(rows: list[tuple[int, int]], num_decode: int, num_blocks: int, at_most: int) -> list[AttentionMetadata]:
    """The same rows over as many disjoint sets of blocks as there are, at_most."""
    counts = [-(-n // BLOCK_SIZE) for _, n in rows]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).int()
    starts = [0, *accumulate(q for q, _ in rows)]
    found = []
    for region in range(max(1, min(at_most, num_blocks // sum(counts)))):
        table = torch.zeros(len(rows), TABLE_WIDTH, dtype=torch.int32)
        first = region * sum(counts)
        for row, count in enumerate(counts):
            table[row, :count] = order[first : first + count]
            first += count
        meta = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=CUDA),
            seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=CUDA),
            block_table=table.to(CUDA),
            slot_mapping=torch.full((starts[-1],), -1, device=CUDA),
            max_query_len=max(q for q, _ in rows),
            max_seq_len=MAX_MODEL_LEN,
            num_decode_rows=num_decode,
        )
        found.append(meta)
    return found


def seconds_a_call(calls: list[Callable[[], object]], repeat: int = 7, warm_up: int = 1) -> float:
    """Median seconds of a call, from replays of one CUDA graph that makes all calls (at least 8)."""
    calls = calls * -(-8 // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(warm_up):
        graph.replay()
    seconds = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds)


def measure_memory() -> dict[str, float]:
    """Bytes a second of copying 2 GiB (read and written bytes) and of summing it up (read bytes)."""
    source = torch.zeros(2**29, dtype=torch.float32, device=CUDA)
    target = torch.empty_like(source)
    size = source.numel() * 4
    copy = 2 * size / seconds_a_call([lambda: target.copy_(source)], repeat=15, warm_up=5)  # 40 copies to warm up
    read = size / seconds_a_call([lambda: torch.sum(source)], repeat=15)
    return {"copy": copy, "read": read}


def make_triton(kv: str, decode: DecodeConfig | None, prefill: PrefillConfig | None = None) -> TritonAttention:
    return TritonAttention(
        HEADS, KV_HEADS, HEAD_DIM, BF16, KV_DTYPES[kv], CUDA, decode_config=decode, prefill_config=prefill
    )


def make_flash() -> FlashAttention | str:
    """The backend, or why there is none."""
    reason = FlashAttention.supports(HEAD_DIM, BF16, BF16, BLOCK_SIZE, CUDA)
    if reason is not None:
        return reason
    flash = FlashAttention(BLOCK_SIZE, CUDA)
    return flash.trial(HEADS, KV_HEADS, HEAD_DIM, BF16, BLOCK_SIZE, CUDA) or flash


def default_decode(kv: str, case: str) -> DecodeConfig:
    """What the engine uses for one of DECODE_CASES."""
    return choose_decode(HEAD_DIM, KV_DTYPES[kv], BF16, len(DECODE_CASES[case]), KV_HEADS, num_sms(CUDA))


def fused_configs(kv: str, case: str) -> list[DecodeConfig]:
    """The default first."""
    default = default_decode(kv, case)
    changes = FUSED_FEW if len(DECODE_CASES[case]) <= 16 else FUSED_MANY
    return [default, *(replace(default, **change) for change in [{"prefetch": not default.prefetch}, *changes])]


def compile_fused(kv: str, config: DecodeConfig, num_rows: int) -> None:
    memory = make_memory(256)
    meta = regions([(1, 16)] * min(num_rows, 256), num_rows, 256, 1)[0]
    attention = make_triton(kv, config)
    qkv = torch.zeros(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=BF16, device=CUDA)
    table = torch.ones(16, HEAD_DIM, device=CUDA)
    weight = torch.ones(HEADS + KV_HEADS, HEAD_DIM, dtype=BF16, device=CUDA)
    step = make_step(table, (meta.seq_lens - 1).long(), meta.slot_mapping)
    attention.prepare(meta)
    attention.decode_from_qkv(qkv, step, memory.k[kv], memory.v[kv], meta, SCALE, HEADS, weight, 1e-6, 1.0, 1.0)
    torch.cuda.synchronize()


def compile_one(job: tuple[str, DecodeConfig | PrefillConfig, int]) -> str | None:
    """In a process of its own: one tiny call, which leaves the compiled kernel in Triton's cache on the disk.

    job: cache dtype, configuration, and for the fused kernel the number of rows, else 0.
    """
    kv, config, fused_rows = job
    try:
        if fused_rows:
            compile_fused(kv, config, fused_rows)  # type: ignore[arg-type]
            return None
        decode = isinstance(config, DecodeConfig)
        rows = [(1 if decode else 64, 4096)]
        memory = make_memory(256)
        meta = regions(rows, int(decode), 256, 1)[0]
        attention = make_triton(kv, config, None) if decode else make_triton(kv, None, config)  # type: ignore[arg-type]
        q = torch.zeros(rows[0][0], HEADS, HEAD_DIM, dtype=BF16, device=CUDA)
        attention.prepare(meta)
        attention.forward(q, memory.k[kv], memory.v[kv], meta, SCALE)
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, most likely; the sweep meets it again and reports it
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def time_attention(
    attention: AttentionBackend, kv: str, memory: Memory, q: Tensor, metas: list[AttentionMetadata]
) -> dict[str, Any]:
    """{"seconds": ...} of one call, or {"error": ...}."""

    def call(meta: AttentionMetadata) -> Callable[[], object]:
        return lambda: attention.forward(q, memory.k[kv], memory.v[kv], meta, SCALE)

    try:
        attention.prepare(metas[0])
        return {"seconds": seconds_a_call([call(meta) for meta in metas])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


class Sweep:
    def __init__(self, budget: float) -> None:
        self.deadline = time.monotonic() + budget
        self.memory = make_memory(NUM_BLOCKS)
        self.bandwidth = measure_memory()
        self.flash = make_flash()
        self.results: list[dict[str, Any]] = []
        self.skipped = 0

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def decode(self, case: str, kv: str, configs: list[DecodeConfig], with_flash: bool) -> None:
        lengths = DECODE_CASES[case]
        metas = regions([(1, n) for n in lengths], len(lengths), NUM_BLOCKS, at_most=32)
        q = torch.randn(len(lengths), HEADS, HEAD_DIM, dtype=BF16, device=CUDA)
        num_bytes = sum(lengths) * 2 * KV_HEADS * HEAD_DIM * KV_DTYPES[kv].itemsize
        contenders: list[tuple[Any, AttentionBackend]] = [(asdict(c), make_triton(kv, c)) for c in configs]
        if with_flash and kv == "bf16" and isinstance(self.flash, FlashAttention):
            contenders.append((f"FlashAttention-{self.flash.version}", self.flash))
        for config, attention in contenders:
            if self.late():
                self.skipped += 1
                continue
            found = time_attention(attention, kv, self.memory, q, metas)
            if "seconds" in found:
                found["bytes_per_second"] = num_bytes / found["seconds"]
                found["of_copy"] = found["bytes_per_second"] / self.bandwidth["copy"]
            self.results.append({"phase": "decode", "case": case, "kv": kv, "config": config, **found})

    def fused(self, case: str, kv: str) -> None:
        """One layer's attention part of a decode step in two kernels, then in one with several configurations."""
        lengths = DECODE_CASES[case]
        num_rows = len(lengths)
        metas = regions([(1, n) for n in lengths], num_rows, NUM_BLOCKS, at_most=32)
        for meta in metas:
            last = (meta.seq_lens - 1).long()
            block = meta.block_table.gather(1, last[:, None] // BLOCK_SIZE).squeeze(1).long()
            meta.slot_mapping = block * BLOCK_SIZE + last % BLOCK_SIZE
        qkv = torch.randn(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=BF16, device=CUDA)
        table = torch.rand(MAX_MODEL_LEN, HEAD_DIM, device=CUDA)
        weight = torch.ones(HEADS + KV_HEADS, HEAD_DIM, dtype=BF16, device=CUDA)
        k_cache, v_cache = self.memory.k[kv], self.memory.v[kv]
        steps = [make_step(table, (meta.seq_lens - 1).long(), meta.slot_mapping) for meta in metas]

        def two_kernels(attention: TritonAttention, at: int) -> Callable[[], object]:
            def call() -> object:
                q = qk_norm_rope_store(qkv, steps[at], k_cache, v_cache, HEADS, weight)
                return attention.forward(q, k_cache, v_cache, metas[at], SCALE)

            return call

        def one_kernel(attention: TritonAttention, at: int) -> Callable[[], object]:
            return lambda: attention.decode_from_qkv(
                qkv, steps[at], k_cache, v_cache, metas[at], SCALE, HEADS, weight, 1e-6, 1.0, 1.0
            )

        default, *others = fused_configs(kv, case)
        contenders = [("two kernels", default, two_kernels), ("fused, default", default, one_kernel)]
        contenders += [(f"fused, {short(asdict(config))}", config, one_kernel) for config in others]
        for name, config, make_call in contenders:
            if self.late():
                self.skipped += 1
                continue
            attention = make_triton(kv, config)
            try:
                attention.prepare(metas[0])
                calls = [make_call(attention, at) for at in range(len(metas))]
                found: dict[str, Any] = {"seconds": seconds_a_call(calls)}
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            if "seconds" in found:
                num_bytes = sum(lengths) * 2 * KV_HEADS * HEAD_DIM * KV_DTYPES[kv].itemsize
                found["bytes_per_second"] = num_bytes / found["seconds"]
                found["of_copy"] = found["bytes_per_second"] / self.bandwidth["copy"]
            self.results.append({"phase": "fused", "case": case, "kv": kv, "config": name, **found})

    def prefill(self, case: str, configs: list[PrefillConfig]) -> None:
        rows = PREFILL_CASES[case]
        metas = regions(rows, 0, NUM_BLOCKS, at_most=4)
        q = torch.randn(sum(n for n, _ in rows), HEADS, HEAD_DIM, dtype=BF16, device=CUDA)
        pairs = sum(new * (total - new) + new * (new + 1) // 2 for new, total in rows)
        contenders: list[tuple[Any, AttentionBackend]] = [(asdict(c), make_triton("bf16", None, c)) for c in configs]
        for config, attention in contenders:
            if self.late():
                self.skipped += 1
                continue
            found = time_attention(attention, "bf16", self.memory, q, metas)
            if "seconds" in found:
                found["flops_per_second"] = 4 * HEADS * HEAD_DIM * pairs / found["seconds"]
            self.results.append({"phase": "prefill", "case": case, "kv": "bf16", "config": config, **found})
        if isinstance(self.flash, FlashAttention) and not self.late():
            # what prepare leaves belongs to one step: one region
            found = time_attention(self.flash, "bf16", self.memory, q, metas[:1])
            if "seconds" in found:
                found["flops_per_second"] = 4 * HEADS * HEAD_DIM * pairs / found["seconds"]
            name = f"FlashAttention-{self.flash.version}"
            self.results.append({"phase": "prefill", "case": case, "kv": "bf16", "config": name, **found})

    def best(self, kv: str, case: str, count: int) -> list[DecodeConfig]:
        done = [
            r
            for r in self.results
            if (r["phase"], r["kv"], r["case"]) == ("decode", kv, case)
            and "seconds" in r
            and not isinstance(r["config"], str)
        ]
        return [DecodeConfig(**r["config"]) for r in sorted(done, key=lambda r: r["seconds"])[:count]]


def short(config: dict[str, Any] | str) -> str:
    if isinstance(config, str):
        return config
    shape = f"n{config['block_n']} w{config['num_warps']} s{config['num_stages']}"
    if "block_m" in config:
        return f"m{config['block_m']} {shape}"
    splits = (
        f"{config['programs_per_sm']}/sm>={config['min_chunk']} {config['balance_splits']}x{config['balance_chunk']}"
    )
    return f"{shape} {splits}{' prefetch' if config['prefetch'] else ''}"


def report(sweep: Sweep, top: int = 8) -> None:
    copy, read = sweep.bandwidth["copy"], sweep.bandwidth["read"]
    print(f"copy {copy / 1e9:.0f} GB/s, read {read / 1e9:.0f} GB/s ({read / copy:.1%} of copy)")
    if isinstance(sweep.flash, str):
        print(f"no FlashAttention: {sweep.flash}")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in sweep.results:
        groups.setdefault((result["phase"], result["kv"], result["case"]), []).append(result)
    for key, results in groups.items():
        if key[0] == "prefill":
            chosen: Any = choose_prefill(HEAD_DIM, HEADS // KV_HEADS, KV_DTYPES[key[1]], BF16)
        else:
            chosen = default_decode(*key[1:])
        default = short(asdict(chosen))
        print(f"\n{' '.join(key)}")
        done = sorted((r for r in results if "seconds" in r), key=lambda r: r["seconds"])
        for place, r in enumerate(done):
            name = short(r["config"])
            if place >= top and name != default and not isinstance(r["config"], str):
                continue
            speed = (
                f"{r['bytes_per_second'] / 1e9:7.0f} GB/s {r['of_copy']:6.1%}"
                if "of_copy" in r
                else f"{r['flops_per_second'] / 1e12:7.1f} TFLOP/s"
            )
            note = " (default)" if name == default else ""
            print(f"  {place + 1:3} {r['seconds'] * 1e6:9.1f} us {speed}  {name}{note}")
    failed = {(short(r["config"]), r["error"]) for r in sweep.results if "error" in r}
    for name, error in sorted(failed):
        print(f"failed: {name}: {error}")
    if sweep.skipped:
        print(f"{sweep.skipped} measurements were skipped: out of time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=100, help="stop measuring after this many (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    args = parser.parse_args()
    started = time.monotonic()
    kinds = list(KV_DTYPES)
    jobs: list[tuple[str, DecodeConfig | PrefillConfig, int]] = [(kv, config, 0) for config in TILES for kv in kinds]
    jobs += [("bf16", config, 0) for config in PREFILL_TILES]
    fused = {
        (kv, c, len(DECODE_CASES[case])): None for kv in kinds for case in FUSED_CASES for c in fused_configs(kv, case)
    }
    jobs += fused
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = pool.map(compile_one, jobs)
        unbuilt = [
            f"{kv} {short(asdict(config))}: {why}" for (kv, config, _), why in zip(jobs, pending, strict=True) if why
        ]
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - started:.0f} s, {len(unbuilt)} could not be")

    sweep = Sweep(args.seconds - (time.monotonic() - started))
    for kv in kinds:
        for case in DECODE_CASES:
            sweep.decode(case, kv, [default_decode(kv, case), *TILES], with_flash=True)
        for case in FUSED_CASES:
            sweep.fused(case, kv)
    for prefill_case in PREFILL_CASES:
        sweep.prefill(prefill_case, PREFILL_TILES)
    for kv in kinds:
        for case in DECODE_CASES:
            configs = [replace(tile, **splits) for tile in sweep.best(kv, case, 3) for splits in SPLITS]
            sweep.decode(case, kv, configs, with_flash=False)
    report(sweep)
    args.result.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": environment(),
        "seconds": time.monotonic() - started,
        "bandwidth": sweep.bandwidth,
        "cases": {"decode": DECODE_CASES, "prefill": PREFILL_CASES},
        "not_compiled": unbuilt,
        "skipped": sweep.skipped,
        "results": sweep.results,
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
