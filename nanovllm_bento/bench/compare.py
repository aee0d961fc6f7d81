"""Reads result files, ours and peers', and compares two of ours number by number."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm_bento.errors import ConfigError

UP, DOWN = "higher", "lower"
"""Which direction is better."""

METRICS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "throughput": (("kv_cache_dtype", "num_seqs", "workload"), {"tok_s_first": UP, "tok_s_best": UP}),
    "steps": (("kv_cache_dtype", "num_rows"), {"wall_us": DOWN, "host_us": DOWN, "gpu_us": DOWN}),
    "prefix": (
        ("kv_cache_dtype", "name"),
        {"hit_rate": UP, "prefill_saved": UP, "on.output_tok_s": UP, "on.ttft_median_ms": DOWN},
    ),
    "ttft": (("kv_cache_dtype", "prompt_tokens"), {"cold_ms": DOWN, "cached_ms": DOWN}),
    "kernels": (("kernel", "shape"), {"us": DOWN}),
    "memory": (("kv_cache_dtype",), {"weights_bytes": DOWN, "peak_reserved_bytes": DOWN, "num_blocks": UP}),
    "startup": (("kind",), {"seconds": DOWN}),
}
"""Section of a report -> the fields that name a row, and its numbers with the direction that is better."""


SERVE_METRICS = {
    "requests_per_s": UP,
    "output_tok_s": UP,
    "goodput.requests_per_s": UP,
    **{f"{metric}_ms.{at}": DOWN for metric in ("ttft", "tpot", "itl", "e2el") for at in ("median", "p99")},
    "prefix_cache.hit_rate": UP,
    "requests.failed": DOWN,
}
"""Numbers of a run of ``bench serve``."""


@dataclass(frozen=True, slots=True)
class Change:
    """One number of both files. ``change``: (new - old) / old. worse: in the wrong direction beyond the threshold."""

    name: str
    old: float
    new: float
    better: str
    threshold: float

    @property
    def change(self) -> float:
        return (self.new - self.old) / self.old if self.old else 0.0 if self.new == self.old else float("inf")

    @property
    def regressed(self) -> bool:
        loss = -self.change if self.better == UP else self.change
        return loss > self.threshold

    @property
    def improved(self) -> bool:
        gain = self.change if self.better == UP else -self.change
        return gain > self.threshold


def compare_results(old: dict[str, Any], new: dict[str, Any], threshold: float = 0.03) -> list[Change]:
    """Every number that both results hold. Raises ConfigError if there is none."""
    a, b = dict(numbers(old)), dict(numbers(new))
    changes = [Change(name, a[name][0], b[name][0], better, threshold) for name, (_, better) in b.items() if name in a]
    if not changes:
        raise ConfigError("the two results have no number in common: are they of the same benchmark and workload?")
    return changes


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two results hard to compare: another machine, model or setting."""

    def gpu_names(result: dict[str, Any]) -> list[str]:
        return [card["name"] for card in result.get("environment", {}).get("gpu", [])]

    def cpu_name(result: dict[str, Any]) -> Any:
        return result.get("environment", {}).get("cpu", {}).get("model")

    subjects = {
        "GPU": (gpu_names(old), gpu_names(new)),
        "CPU": (cpu_name(old), cpu_name(new)),
        "model": (old.get("model"), new.get("model")),
        "settings": (old.get("settings"), new.get("settings")),
        "random weights": (old.get("random_weights"), new.get("random_weights")),
        "endpoint": (old.get("endpoint"), new.get("endpoint")),
        "workloads": (_serve_workloads(old), _serve_workloads(new)),
        "client-bound runs": (_client_bound(old), _client_bound(new)),
    }
    if old.get("benchmark") == new.get("benchmark") == "serve":
        del subjects["settings"]  # those of the client: what matters of them is in the workloads
    return [f"{name}: {a} against {b}" for name, (a, b) in subjects.items() if a != b]


def _serve_workloads(result: dict[str, Any]) -> list[Any]:
    return [run.get("workload") for run in result.get("runs", []) if result.get("benchmark") == "serve"]


def _client_bound(result: dict[str, Any]) -> list[str]:
    """Runs of bench serve whose numbers may be the client's."""
    runs = result.get("runs", []) if result.get("benchmark") == "serve" else []
    return [run["name"] for run in runs if run["client"]["bound"] or run["client"]["starved"]]


def lost(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the numbers that only the old result holds: a failed section must not look like no regression."""
    have = {name for name, _ in numbers(new)}
    return [name for name, _ in numbers(old) if name not in have]


def numbers(result: dict[str, Any]) -> Iterator[tuple[str, tuple[float, str]]]:
    """(name, (value, better direction)) of the numbers of a report, an offline benchmark or bench serve."""
    for section, (id_fields, metrics) in METRICS.items():
        for row in result.get("sections", {}).get(section, {}).get("rows", []):
            name = ", ".join(str(row[field]) for field in id_fields if row.get(field) is not None)
            for metric, better in metrics.items():
                if (value := _field(row, metric)) is not None:
                    yield f"{section}: {name}: {metric}", (float(value), better)
    for run in result.get("runs", []) if result.get("benchmark") == "serve" else ():
        for metric, better in SERVE_METRICS.items():
            if (value := _field(run, metric)) is not None:
                yield f"serve: {run['name']}: {metric}", (float(value), better)
    for batch in result.get("batches", [result] if "results" in result else []):
        for row in batch["results"]:
            for metric in ("tok_s_first", "tok_s_best"):
                name = f"{batch['workload']['num_seqs']} × {batch['workload']['name']}: {row['engine']}: {metric}"
                yield name, (float(row[metric]), UP)
    for engine, seconds in result.get("load_seconds", {}).items():
        yield f"load: {engine}: seconds", (float(seconds), DOWN)


def _field(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_result(path: Path) -> dict[str, Any]:
    """One JSON object. Raises ConfigError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a result file that can be read: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a result file: it holds a {type(found).__name__}, not an object.")
    return found


def read_peer(path: Path) -> list[dict[str, Any]]:
    """A peer's throughput, one row per kv_cache_dtype and num_seqs, the fastest run of each.

    The file is a report or an offline result of ours, or what shared/peers' bench_vllm_offline.py prints: an object, or
    one a line (lines that are no JSON object are log lines and passed over). Raises ConfigError if no row is found.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    objects = [found for found in map(_json_or_none, [text]) if found is not None]
    if not objects:
        objects = [found for found in map(_json_or_none, text.splitlines()) if found is not None]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for found in objects:
        for entry in found if isinstance(found, list) else [found]:
            for row in _peer_rows(entry) if isinstance(entry, dict) else ():
                key = (row["kv_cache_dtype"], row["num_seqs"])
                if key not in rows or row["tok_s_best"] > rows[key]["tok_s_best"]:
                    rows[key] = row
    if not rows:
        raise ConfigError(f"{path} holds no throughput: neither a result of ours nor of bench_vllm_offline.py.")
    return [rows[key] for key in sorted(rows)]


def _peer_rows(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "sections" in entry:  # our report
        for row in entry["sections"].get("throughput", {}).get("rows", []):
            yield {
                "engine": "nanovllm_bento",
                "version": entry.get("environment", {}).get("nanovllm_bento"),
                "kv_cache_dtype": kv_name(row["kv_cache_dtype"]),
                **{k: row[k] for k in ("num_seqs", "output_tokens", "tok_s_first", "tok_s_best")},
            }
    elif "results" in entry:  # our bench offline; a peer in it is none of ours
        for row in entry["results"][:1]:
            yield {
                "engine": row["engine"],
                "version": entry.get("environment", {}).get("nanovllm_bento"),
                "kv_cache_dtype": kv_name(entry.get("settings", {}).get("kv_cache_dtype")),
                "num_seqs": entry["workload"]["num_seqs"],
                "output_tokens": entry["workload"]["output_tokens"],
                "tok_s_first": row["tok_s_first"],
                "tok_s_best": row["tok_s_best"],
                "load_s": entry.get("load_seconds", {}).get(row["engine"]),
            }
    elif {"tok_s_first", "tok_s_best"} <= entry.keys() and ("seqs" in entry or "num_seqs" in entry):
        yield {
            "engine": entry.get("engine", "peer"),
            "version": entry.get("version"),
            "gpu": entry.get("gpu"),
            "kv_cache_dtype": kv_name(entry.get("kv_dtype", entry.get("kv_cache_dtype"))),
            "num_seqs": entry["seqs"] if "seqs" in entry else entry["num_seqs"],
            "output_tokens": entry.get("out_tokens"),
            "tok_s_first": entry["tok_s_first"],
            "tok_s_best": entry["tok_s_best"],
            "load_s": entry.get("load_s"),
        }


def kv_name(name: str | None) -> str:
    """One name for each KV cache type, whoever wrote it: "auto" (the model's dtype) or "fp8_e4m3"."""
    return {"fp8": "fp8_e4m3", None: "auto", "bfloat16": "auto"}.get(name, str(name))


def parse_threshold(text: str) -> float:
    """ "3%" or "0.03" as a share. Raises ConfigError."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"threshold={text!r}: give a share such as 3% or 0.03.")
    return value


def _json_or_none(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, (dict, list)) else None
