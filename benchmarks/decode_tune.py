"""Chooses what a decode step is made of, in the engine: python -m benchmarks.decode_tune MODEL OUT.json --rows 80,128

Kernels that overlap must leave room for each other, so that what is fastest alone need not be so in a step. For each
number of rows: attention with the division of memory, then one product after the other (kernels/skinny.py up to 16
rows, kernels/split_k.py beyond), and all once more; each by the time of a whole step, whose graph is captured anew
(decode_rows.py). Prints entries for TUNED. MODEL: a folder with a dense model; random weights are as good as any.
"""

import argparse
import math
import time
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import skinny_tune, split_k_tune
from benchmarks.decode_rows import (
    PERCENTS,
    Step,
    configurations,
    decoding,
    describe,
    in_force,
    make_engine,
    percent_of,
)
from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.model_runner import ModelRunner
from nanovllm_bento.kernels import skinny, split_k
from nanovllm_bento.kernels.attention.decode_triton import DecodeConfig
from nanovllm_bento.models.config import ModelConfig

Key = tuple[str, int, int, int]  # operation, rows as TUNED has them, n, k
Config = skinny.Config | split_k.Config
SLOWER_ALONE = 1.25
"""What is slower than the best alone by more is not tried in a step."""
AT_MOST = 32
GAIN = 0.998
"""A choice is changed for 0.2% or more: less is noise."""


def keys(model: ModelConfig, rows: int) -> list[Key]:
    """The four products of a layer."""
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = model.num_attention_heads * model.head_dim
    qkv = heads + 2 * model.num_key_value_heads * model.head_dim
    if rows <= skinny.MAX_ROWS:
        operations, bound = ("norm_linear", "linear_add", "norm_gate_up", "linear_add"), 1 << (rows - 1).bit_length()
    else:
        operations = ("linear", "linear_parts", "gate_up", "linear_parts")
        bound = next(bound for bound in split_k.ROWS if bound >= rows)
    shapes = ((qkv, hidden), (hidden, heads), (inner, hidden), (hidden, inner))
    return [(operation, bound, n, k) for operation, (n, k) in zip(operations, shapes, strict=True)]


def table(key: Key) -> dict[Key, Any]:
    return skinny.TUNED if key[1] <= skinny.MAX_ROWS else split_k.TUNED


def put(key: Key, config: Config | None) -> None:
    """Make it the configuration of a product; None: the library's, or what the shape alone says."""
    if config is None:
        table(key).pop(key, None)
    else:
        table(key)[key] = config
    forget_choices()


def forget_choices() -> None:
    """After a change of the tables."""
    skinny.choose_config.cache_clear()
    split_k.choose_config.cache_clear()


def is_right(job: Any) -> bool:
    """Whether a fused product computes what it should."""
    operation, rows, n, k, _ = job
    x, (weight,), norm, out = skinny_tune.inputs(operation, rows, n, k, 1)
    return skinny_tune.is_right(job, x, weight, norm, out)


def candidates(key: Key, seconds: float) -> list[Config | None]:
    """Those that compile in time and are right; from 17 rows on, those not much slower than others alone."""
    operation, rows, n, k = key
    found: list[Config]
    if rows <= skinny.MAX_ROWS:
        found = list(skinny_tune.candidates(operation, rows, n, k))
        compile_job: Any = skinny_tune.compile_job
    else:
        found = list(split_k_tune.candidates((operation, n, k), rows))
        compile_job = split_k_tune.compile_job
    jobs = [(operation, rows, n, k, config) for config in found]
    failed = split_k_tune.compile_all(jobs, seconds, compile_job)
    if rows <= skinny.MAX_ROWS:
        return [job[4] for job in jobs if job not in failed and is_right(job)]
    _, timed = split_k_tune.time_alone((operation, n, k), rows, failed)
    good = [config for took, config in timed[:AT_MOST] if took <= SLOWER_ALONE * timed[0][0]]
    return [None, *good]


class Tuning:
    """Of one number of rows: attention and division as chosen so far. (Products are in their tables.)

    log: what was tried, the best of each turn.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.attention: DecodeConfig = step.backend.config_of(step.rows)
        self.percent = percent_of(step.runner, step.rows)
        self.log: list[dict[str, Any]] = []

    def microseconds(self) -> float:
        with in_force(self.step.backend, self.attention, self.percent):
            try:
                return self.step.microseconds()
            except Exception as error:  # too much shared memory, say
                print(f"FAILED: {error!r}"[:200], flush=True)
                return math.inf

    def tune_attention(self) -> None:
        now, best = (self.attention, self.percent), self.microseconds()
        tried = []
        for config, percent in product(configurations(self.step.rows, self.step.runner.num_kv_heads, now[0]), PERCENTS):
            self.attention, self.percent = config, percent
            tried.append((self.microseconds(), config, percent))
        tried = sorted((result for result in tried if result[0] < math.inf), key=lambda result: result[0])
        took, *pair = tried[0]
        self.attention, self.percent = pair if took < GAIN * best else now  # type: ignore[assignment]
        nearest = [{"us": us, "attention": describe(config), "percent": p} for us, config, p in tried[:6]]
        self.log.append({"turn": "attention", "us_before": best, "best": nearest})

    def tune_product(self, key: Key, configs: list[Config | None]) -> list[Config | None]:
        """Returns the best few, best first."""
        now, best = table(key).get(key), self.microseconds()
        tried: list[tuple[float, Config | None]] = [(best, now)]
        for config in configs:
            put(key, config)
            tried.append((self.microseconds(), config))
        tried = sorted((result for result in tried if result[0] < math.inf), key=lambda result: result[0])
        took, config = tried[0]
        put(key, config if took < GAIN * best else now)
        self.log.append({"turn": list(key), "was": now, "us_before": best, "best": tried[:6]})
        return [config for _, config in tried[:6]]


def tune(core: EngineCore, rows: int, seconds: float) -> dict[str, Any]:
    """seconds: for compiling each product's candidates."""
    with (
        patch.dict(skinny.TUNED),  # other numbers of rows may share an entry, and start from what is there now
        patch.dict(split_k.TUNED),
        decoding(core, rows) as step,
    ):
        tuning = Tuning(step)
        before = tuning.microseconds()
        tuning.tune_attention()
        best = {key: tuning.tune_product(key, candidates(key, seconds)) for key in keys(step.runner.model_config, rows)}
        tuning.tune_attention()
        for key, configs in best.items():
            tuning.tune_product(key, configs)
        after = tuning.microseconds()
        chosen = [[*key, table(key).get(key)] for key in best]
    forget_choices()
    print(f"{rows} rows: {before} -> {after} us; {tuning.percent}%, {describe(tuning.attention)}", flush=True)
    for *key, config in chosen:
        print(f"    {tuple(key)!r}: {config!r},".replace("'", '"'), flush=True)
    found = {"rows": rows, "us_before": before, "us": after, "percent": tuning.percent}
    return found | {"attention": describe(tuning.attention), "products": chosen, "log": tuning.log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", required=True, help="numbers of rows that have a graph, with commas between")
    parser.add_argument("--seconds", type=float, default=300, help="after which no other number of rows is begun")
    parser.add_argument("--compile-seconds", type=float, default=60, help="for the candidates of one product")
    parser.add_argument("--load-format", default="auto", help="dummy: MODEL needs no weights")
    args = parser.parse_args()
    rows, started = [int(n) for n in args.rows.split(",")], time.monotonic()
    core = make_engine(args.model, rows, load_format=args.load_format)
    assert isinstance(core.runner, ModelRunner)
    hidden_size = core.runner.model_config.hidden_size
    for n in rows:
        fused = skinny.supports(n, core.runner.torch_dtype, core.runner.torch_device, hidden_size)
        if n > split_k.MAX_ROWS or (n <= skinny.MAX_ROWS and not fused):
            raise SystemExit(f"{n} rows of this model: the products are the library's.")
    report: dict[str, Any] = {"benchmark": "decode_tune", "environment": environment(), "rows": []}
    for n in rows:
        if time.monotonic() - started < args.seconds:
            report["rows"].append(tune(core, n, args.compile_seconds))
            write_result(report, args.output)
        else:
            print(f"no time left for {n} rows", flush=True)
    core.close()


if __name__ == "__main__":
    main()
