"""The plots of ``bench serve``, as PNG files beside the result. They are drawn from the result file alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm_bento.errors import ConfigError

OURS, SECOND, BAD = "#1f6f8b", "#e07a5f", "#c1121f"
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


def require_matplotlib() -> None:
    """Raises ConfigError, naming the way out, if matplotlib is not installed. (bench.plots would import torch.)"""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: pip install 'nanovllm-bento[bench]'. Or pass --no-plots, and make them later, on a "
            "machine that has it, with --from RESULT.json."
        ) from None


def write_plots(result: dict[str, Any], beside: Path) -> list[Path]:
    """A page per run, and with several runs one that sets them against each other; named after the result's file.

    Raises ConfigError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    runs = result["runs"]
    made = []
    for run in runs:
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        _draw_run(figure, run)
        figure.suptitle(_title(result, run), fontsize=11)
        made.append(_save(figure, beside, run["name"] if len(runs) > 1 else None))
    if len(runs) > 1:
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        _draw_sweep(figure, runs)
        figure.suptitle(_title(result, None), fontsize=11)
        made.append(_save(figure, beside, "all"))
    return made


def _save(figure: Any, beside: Path, name: str | None) -> Path:
    tail = "" if name is None else "_" + "".join(c if c.isalnum() or c == "." else "-" for c in name)
    path = beside.with_name(beside.stem + tail + ".png")
    figure.savefig(path, dpi=130)
    return path


def _title(result: dict[str, Any], run: dict[str, Any] | None) -> str:
    about = (run or result["runs"][0])["workload"]
    parts = [result["model"], about["dataset"]]
    if about["dataset"] == "random":
        count = max(1, about["requests"])
        parts.append(f"{about['input_tokens'] / count:.0f} in / {about['output_tokens'] / count:.0f} out")
    first = " · ".join(parts)
    if run is None:
        return first
    second = [run["name"], f"{run['requests_per_s']:,.1f} req/s", f"{run['output_tok_s']:,.0f} output tok/s"]
    if run["requests"]["failed"]:
        second.append(f"{run['requests']['failed']} FAILED")
    if run["client"]["bound"] or run["client"]["starved"]:
        second.append("CLIENT-BOUND")
    return first + "\n" + " · ".join(second)


def _draw_run(figure: Any, run: dict[str, Any]) -> None:
    """Above: distributions of TTFT, TPOT and ITL. Below: the run over time."""
    distributions, times = figure.subfigures(2, 1)
    for axes, name in zip(distributions.subplots(1, 4), METRICS, strict=True):
        _distribution(axes, run, name)
    load, waits = times.subplots(1, 2)
    rows = run["timeline"]
    _clean(load, waits)
    if not rows:
        return
    at = [row["at_s"] + row["seconds"] / 2 for row in rows]
    load.plot(at, [row["output_tok_s"] for row in rows], color=OURS, label="output tok/s")
    load.set_ylabel("output tok/s", color=OURS)
    load.set_ylim(bottom=0)
    load.set_xlabel("seconds")
    running = load.twinx()
    running.plot(at, [row["running"] for row in rows], color=SECOND, linewidth=1, label="open requests")
    running.set_ylabel("open requests", color=SECOND)
    running.set_ylim(bottom=0)
    running.spines["top"].set_visible(False)
    for key, label, color in (("ttft_median_ms", "median", OURS), ("ttft_p99_ms", "p99", SECOND)):
        points = [(x, row[key]) for x, row in zip(at, rows, strict=True) if row[key] is not None]
        if points:
            waits.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, color=color, label=label)
            waits.legend(fontsize=8, frameon=False)
    waits.set_ylim(bottom=0)
    waits.set_xlabel("seconds (start of the request)")
    waits.set_ylabel("TTFT, ms")
    if any(row["failed"] for row in rows):
        load.bar(at, [row["failed"] for row in rows], [row["seconds"] for row in rows], color=BAD, alpha=0.4)
        load.set_title("red: failed requests", fontsize=8, color=BAD)


def _distribution(axes: Any, run: dict[str, Any], name: str) -> None:
    """Share of requests (of ITL: gaps) that took no longer; median and p99 marked, the service level as a line."""
    _clean(axes)
    values: Sequence[float] | None = run["quantiles"][f"{name}_ms"]
    axes.set_xlabel(f"{METRICS[name]}, ms")
    axes.set_ylim(0, 101)
    if name == "ttft":
        axes.set_ylabel("% of requests")
    if not values:
        axes.text(0.5, 50, "none", ha="center", transform=axes.get_xaxis_transform())
        return
    axes.plot(values, range(101), color=OURS)
    found = run[f"{name}_ms"]
    for key, style in (("median", "-"), ("p99", "--")):
        axes.axvline(found[key], color="#888888", linewidth=0.8, linestyle=style)
    said = f"median {found['median']:,.1f}, p99 {found['p99']:,.1f}"
    if run["goodput"] and name in run["goodput"]["slo_ms"]:
        bound = run["goodput"]["slo_ms"][name]
        axes.axvline(bound, color=BAD, linewidth=1)
        said += f"\nservice level {bound:g}: {run['goodput']['share_each'][name]:.1%}"
    axes.set_title(said, fontsize=8)
    axes.set_xlim(0, 1.05 * max(values[99] * 1.2, found["p99"], 1e-3))


def _draw_sweep(figure: Any, runs: Sequence[dict[str, Any]]) -> None:
    """Throughput against latency, a point a run."""
    axes = figure.subplots(1, 2)
    _clean(*axes)
    for panel, metric in zip(axes, ("ttft", "tpot"), strict=True):
        found = [run for run in runs if run[f"{metric}_ms"]]
        for key, color in (("median", OURS), ("p99", SECOND)):
            y = [run[f"{metric}_ms"][key] for run in found]
            panel.plot([run["output_tok_s"] for run in found], y, "o-", color=color, label=key)
        for run in found:
            where = run["output_tok_s"], run[f"{metric}_ms"]["median"]
            panel.annotate(run["name"], where, textcoords="offset points", xytext=(4, -10), fontsize=8)
        panel.set_xlabel("output tok/s")
        panel.set_ylabel(f"{METRICS[metric]}, ms")
        panel.set_ylim(bottom=0)
        if found:
            panel.legend(fontsize=8, frameon=False)


def _clean(*panels: Any) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
