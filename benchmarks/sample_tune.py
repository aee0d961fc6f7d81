"""Times of sampling on a GPU, by CUDA-graph replay: python benchmarks/sample_tune.py OUT.json [--sweep].

Rows 1, 16, 64, 256 of 151,936 bf16 logits, flat as a random model's (N(0, 0.6)) and peaked as a trained one's, for
greedy, plain and filtered rows. us: median of 5 timings of a graph that samples several times. gb_per_s: the logits'
bytes over that. --sweep also times other tile sizes, warps and numbers of programs at 1 and 256 rows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.sample import new_slot_table, slot_words
from nanovllm_bento.kernels.sample_triton import sample_rows

VOCAB = 151_936
DEVICE = torch.device("cuda")
MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.6},
    "chat": {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "top_k_500_top_p": {"temperature": 0.7, "top_k": 500, "top_p": 0.9},
    "top_k_2000": {"temperature": 1.0, "top_k": 2000},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
}


def make_logits(shape: str, n: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(n, VOCAB, device=DEVICE, generator=generator)
    if shape == "flat":
        return (logits * 0.6).bfloat16()
    # A trained model: a wide bulk, and some 50 entries that stand out by a law of powers.
    ranks = torch.arange(1, 51, device=DEVICE).log()
    where = torch.randint(0, VOCAB, (n, 50), device=DEVICE, generator=generator)
    return (logits * 2.2).scatter_(1, where, (20 - 2.5 * ranks).expand(n, -1)).bfloat16()


def measure(logits: torch.Tensor, mode: str, **config: Any) -> float:
    """Microseconds of one call. Each call in the graph has its own positions, so that noise and rounds differ."""
    n = len(logits)
    table = new_slot_table(n)
    for name, value in MODES[mode].items():
        table[name] = value
    table["seed"] = table["slot"] + 1
    words, slots = slot_words(table).to(DEVICE), torch.arange(n, dtype=torch.int32, device=DEVICE)
    calls = 8
    positions = torch.arange(calls * n, device=DEVICE).view(calls, n)
    out = torch.empty(n, dtype=torch.int64, device=DEVICE)
    filtered = mode not in ("greedy", "plain")

    def run() -> None:
        for i in range(calls):
            sample_rows(logits, words, slots, positions[i], out, filtered=filtered, pdl=use_pdl(DEVICE), **config)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (2 * calls))
    return statistics.median(times)


def results() -> Iterator[dict[str, Any]]:
    for shape in ("flat", "peaked"):
        for n in (1, 16, 64, 256):
            logits = make_logits(shape, n)
            for mode in MODES:
                us = measure(logits, mode)
                gb_per_s = logits.nbytes / us / 1000
                yield {"logits": shape, "rows": n, "mode": mode, "us": round(us, 2), "gb_per_s": round(gb_per_s, 1)}


def sweep() -> Iterator[dict[str, Any]]:
    """One setting at a time beside the defaults; the first is a compilation each."""
    settings: list[tuple[str, list[dict[str, Any]]]] = [
        (
            "plain",
            [
                {"block": b, "num_warps": w}
                for b, w in ((1024, 1), (1024, 2), (1024, 4), (2048, 2), (2048, 8), (4096, 4))
            ],
        ),
        ("plain", [{"programs": p} for p in (1056, 4224, 8448)]),
        ("chat", [{"choose_warps": w} for w in (4, 16)]),
        ("chat", [{"block": 4096, "num_warps": 8}, {"tile": 16}, {"tile": 64}, {"pairs": 8}, {"candidates": 512}]),
        ("top_p", [{"narrow": 32}, {"narrow": 128}, {"choose_block": 8192, "choose_warps": 16}]),
    ]
    for shape in ("flat", "peaked"):
        for n in (1, 256):
            logits = make_logits(shape, n)
            for mode, configs in settings:
                for config in [{}, *configs]:
                    us = measure(logits, mode, **config)
                    yield {"logits": shape, "rows": n, "mode": mode, "config": config, "us": round(us, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vocab_size": VOCAB,
        "results": [],
        "sweep": [],
    }
    started = time.perf_counter()
    for key, rows in (("results", results()), ("sweep", sweep() if args.sweep else iter(()))):
        for row in rows:
            print(json.dumps(row), flush=True)
            report[key].append(row)
            args.out.write_text(json.dumps(report, indent=1))
    report["seconds"] = round(time.perf_counter() - started, 1)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
