"""Chooses what a decode step is made of, in the engine: python -m benchmarks.decode_tune MODEL OUT.json --rows 80,128

Kernels that overlap must leave room for each other, so that what is fastest alone need not be so in a step. For each
number of rows: attention with the division of memory, then one product after the other (kernels/skinny.py up to 16
rows, kernels/split_k.py beyond), and all once more; each by the time of a whole step, whose graph is captured anew
(decode_rows.py). Prints entries for TUNED. MODEL: a folder with a dense model; random weights are as good as any.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
AT_LAST, TURNS, GAIN = 4, 5, 0.998
"""The best few are measured again so many times, in turns with what is chosen so far, which is changed for 0.2% or more
in the medians: the same step varies by 1%, so that the best of thirty is often best by chance."""


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
    jobs: list[Any] = [(operation, rows, n, k, config) for config in found]
    failed = split_k_tune.compile_all(jobs, seconds, compile_job)
    if rows <= skinny.MAX_ROWS:
        return [job[4] for job in jobs if job not in failed and is_right(job)]
    _, timed = split_k_tune.time_alone((operation, n, k), rows, failed)
    good = [config for took, config in timed[:AT_MOST] if took <= SLOWER_ALONE * timed[0][0]]
    return [None, *good]


class Tuning:
    """Of one number of rows: attention and division as chosen so far. (Products are in their tables.)

    log: of each turn the best few, at first and when measured again.
    """

    def __init__(self, step: Step) -> None:
        assert isinstance(step.runner, ModelRunner)
        self.step, self.keys = step, keys(step.runner.model_config, step.rows)
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

    def choose(self, turn: Any, now: Any, others: Sequence[Any], put_in_force: Callable[[Any], None]) -> list[Any]:
        """One of ``now`` and ``others``, put in force; returns the best few of the others, best first."""

        def times(choice: Any, turns: int) -> Iterator[float]:
            for _ in range(turns):
                put_in_force(choice)
                yield self.microseconds()

        tried = [(next(times(choice, 1)), choice) for choice in others if choice != now]
        tried = sorted((found for found in tried if found[0] < math.inf), key=lambda found: found[0])[:AT_LAST]
        finalists = [now, *(choice for _, choice in tried)]
        turns = zip(*(times(choice, TURNS) for choice in finalists), strict=True)  # in turns, so that drift is shared
        finals = [statistics.median(found) for found in zip(*turns, strict=True)]
        best = min(range(len(finals)), key=finals.__getitem__)
        chosen = finalists[best] if finals[best] < GAIN * finals[0] else now
        put_in_force(chosen)
        self.log.append(
            {
                "turn": turn,
                "us_before": finals[0],
                "was": self.named(now),
                "chosen": self.named(chosen),
                "best": [
                    {"us": us, "us_at_first": at_first, "choice": self.named(choice)}
                    for us, (at_first, choice) in zip(finals[1:], tried, strict=True)
                ],
            }
        )
        return finalists[1:]

    @staticmethod
    def named(choice: Any) -> Any:
        if isinstance(choice, list):
            return [Tuning.named(part) for part in choice]
        is_pair = isinstance(choice, tuple) and isinstance(choice[0], DecodeConfig)
        return {"attention": describe(choice[0]), "percent": choice[1]} if is_pair else choice

    def put_attention(self, pair: tuple[DecodeConfig, int]) -> None:
        self.attention, self.percent = pair

    def all_choices(self) -> list[Any]:
        return [(self.attention, self.percent), *(table(key).get(key) for key in self.keys)]

    def put_all(self, choices: list[Any]) -> None:
        self.put_attention(choices[0])
        for key, config in zip(self.keys, choices[1:], strict=True):
            put(key, config)

    def tune_attention(self) -> None:
        configs = configurations(self.step.rows, self.step.runner.num_kv_heads, self.attention)
        pairs = list(product(configs, PERCENTS))
        self.choose("attention", (self.attention, self.percent), pairs, self.put_attention)

    def tune_product(self, key: Key, configs: list[Config | None]) -> list[Config | None]:
        """Returns the best few, best first."""
        return self.choose(list(key), table(key).get(key), configs, lambda config: put(key, config))


def tune(core: EngineCore, rows: int, seconds: float) -> dict[str, Any]:
    """seconds: for compiling each product's candidates."""
    with (
        patch.dict(skinny.TUNED),  # other numbers of rows may share an entry, and start from what is there now
        patch.dict(split_k.TUNED),
        decoding(core, rows) as step,
    ):
        tuning = Tuning(step)
        start = tuning.all_choices()
        tuning.tune_attention()
        best = {key: tuning.tune_product(key, candidates(key, seconds)) for key in tuning.keys}
        tuning.tune_attention()
        for key, configs in best.items():
            tuning.tune_product(key, configs)
        tuning.choose("together", start, [tuning.all_choices()], tuning.put_all)
        chosen = [[*key, table(key).get(key)] for key in tuning.keys]
    forget_choices()
    log = tuning.log
    before = log[-1]["us_before"]
    after = before if log[-1]["chosen"] == log[-1]["was"] else log[-1]["best"][0]["us"]
    print(f"{rows} rows: {before} -> {after} us; {tuning.percent}%, {describe(tuning.attention)}", flush=True)
    for *product_key, config in chosen:
        print(f"    {tuple(product_key)!r}: {config!r},".replace("'", '"'), flush=True)
    found = {"rows": rows, "us_before": before, "us": after, "percent": tuning.percent}
    return found | {"attention": describe(tuning.attention), "products": chosen, "log": log}


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
