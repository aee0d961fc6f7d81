"""The report's plots, as PNG files. matplotlib (extra ``bench``) is imported only when they are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm_bento.bench.markdown import peer_row
from nanovllm_bento.bench.steps import HOST_PARTS
from nanovllm_bento.errors import ConfigError

OURS, FLOOR = "#1f6f8b", "#222222"
PEERS = ("#e07a5f", "#8d99ae", "#bc9c22", "#7b5ea7")
PARTS = {"schedule": "#f2cc8f", "launch": "#e07a5f", "wait": "#d9d9d9", "commit": "#81b29a"}
GPU, GAP = "#1f6f8b", "#f4f4f4"


def require_matplotlib() -> None:
    """Raises ConfigError, naming the way out, if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: pip install 'nanovllm-bento[bench]'. Or pass --no-plots, and make them later, on a "
            "machine that has it, with --from report.json."
        ) from None


def write_plots(result: dict[str, Any], out: Path) -> list[Path]:
    """Every plot whose section has numbers. Raises ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    made = []
    for name, draw in PLOTS.items():
        rows = result["sections"].get(name, {}).get("rows")
        if not rows:
            continue
        figure = Figure(layout="constrained")
        draw(figure, rows, result)
        random = ", random weights" if result["random_weights"] and name not in ("kernels",) else ""
        figure.suptitle(f"{_TITLES[name]}\n{result['model']}{random}, {_where(result)}", fontsize=11)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=150)
        made.append(path)
    return made


def _where(result: dict[str, Any]) -> str:
    env = result["environment"]
    if result["device"] == "cuda" and env["gpu"]:
        return str(env["gpu"][0]["name"])
    return f"CPU, {env['cpu']['cores']} cores"


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _throughput(figure: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A panel per KV cache type: bars of each engine per number of sequences, the floor as a line above them."""
    kinds = list(dict.fromkeys(row["kv_cache_dtype"] for row in rows))
    figure.set_size_inches(max(6.5, 6 * len(kinds)), 4.8)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    names = ["nanovllm-bento", *result["peers"]]
    width = 0.8 / len(names)
    for axes, kind in zip(panels, kinds, strict=True):
        mine = [row for row in rows if row["kv_cache_dtype"] == kind]
        lowest = min(row["tok_s_best"] for row in mine)
        for i, name in enumerate(names):
            found = [row if i == 0 else peer_row(result, name, row) for row in mine]
            places = [x - 0.4 + width * (i + 0.5) for x, row in enumerate(found) if row]
            heights = [row["tok_s_best"] for row in found if row]
            color = OURS if i == 0 else PEERS[(i - 1) % len(PEERS)]
            bars = axes.bar(places, heights, width * 0.92, label=name, color=color)
            for bar, height in zip(bars, heights, strict=True):  # inside the bar: above it may be the roofline
                where = (bar.get_x() + bar.get_width() / 2, height)
                style = {"ha": "center", "va": "top", "fontsize": 7.5, "color": "white", "fontweight": "bold"}
                axes.annotate(_short(height), where, (0, -2), textcoords="offset points", **style)
            lowest = min([lowest, *heights])
        for x, row in enumerate(mine):
            label = "roofline" if x == 0 else None
            axes.hlines(row["floor_tok_s"], x - 0.42, x + 0.42, color=FLOOR, linewidth=1.4, label=label)
            ratio = f"{100 * row['floor_share']:.0f}% of {_short(row['floor_tok_s'])}"
            axes.annotate(ratio, (x, row["floor_tok_s"]), (0, 3), textcoords="offset points", ha="center", fontsize=7.5)
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, lowest / 2.5), max(top, max(row["floor_tok_s"] for row in mine)) * 1.6)
        axes.set_xticks(range(len(mine)), [str(row["num_seqs"]) for row in mine])
        axes.set_xlabel("sequences")
        axes.set_title(f"KV cache: {result['dtype'] if kind == 'auto' else kind}", fontsize=10)
        _clean(axes)
    panels[0].set_ylabel("output tokens per second, best run (log)")
    panels[0].legend(fontsize=8, loc="upper left", frameon=False)


def _steps(figure: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A panel per row count: the host's parts stacked, and beside them the GPU's time and what it idles."""
    figure.set_size_inches(max(6.0, 2.3 * len(rows) + 1.2), 4.6)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        bottom = 0.0
        for part in HOST_PARTS:
            height = row[f"{part}_us"]
            axes.bar(0, height, 0.7, bottom=bottom, color=PARTS[part], label=part, edgecolor="white", linewidth=0.4)
            if height > 0.07 * row["wall_us"]:
                axes.text(0, bottom + height / 2, f"{height:,.0f}", ha="center", va="center", fontsize=8)
            bottom += height
        labels = ["host"]
        if row["gpu_us"] is not None:
            gap = max(0.0, row["gap_us"])
            axes.bar(1, row["gpu_us"], 0.7, color=GPU, label="GPU busy")
            axes.bar(1, gap, 0.7, bottom=row["gpu_us"], color=GAP, edgecolor="#999999", hatch="//", label="GPU gap")
            axes.text(
                1, row["gpu_us"] / 2, f"{row['gpu_us']:,.0f}", ha="center", va="center", fontsize=8, color="white"
            )
            labels.append("GPU")
        axes.axhline(row["floor_us"], color=FLOOR, linewidth=1.2, linestyle="--", label="roofline")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_xticks(range(len(labels)), labels)
        kv = "" if row["kv_cache_dtype"] == "auto" else f"\n{row['kv_cache_dtype']}"
        axes.set_title(f"{row['num_rows']} row{'s' * (row['num_rows'] > 1)}{kv}", fontsize=10)
        axes.tick_params(labelsize=8)
        _clean(axes)
    panels[0].set_ylabel("microseconds per decode step")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)


def _kernels(figure: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A bar per case, as long as its share of what the ceilings allow, with its rate and speed-up."""
    figure.set_size_inches(9, 1.4 + 0.21 * len(rows))
    axes = figure.subplots()
    colors = {"bytes": OURS, "flops": "#e07a5f"}
    for bound, label in (("bytes", "bound by bytes"), ("flops", "bound by FLOPs")):
        places = [i for i, row in enumerate(rows) if row["bound"] == bound]
        axes.barh(places, [100 * rows[i]["ceiling_share"] for i in places], color=colors[bound], label=label)
    longest = max(100.0, *(100 * row["ceiling_share"] for row in rows))
    for i, row in enumerate(rows):
        text = f"{row['rate']:,.3g} {row['unit']}" if row["rate"] < 1000 else f"{row['rate']:,.0f} {row['unit']}"
        text += f", {row['speedup']:.1f}× plain PyTorch"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(100 * row["ceiling_share"] + 0.008 * longest, i, text, va="center", fontsize=7, bbox=box)
    axes.axvline(100, color=FLOOR, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{row['kernel']}: {row['shape']}" for row in rows], fontsize=7)
    axes.set_xlim(0, longest * 1.35)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("% of the ceiling measured in this run")
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    _clean(axes)


def _startup(figure: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A stacked bar per start; what no phase accounts for is last."""
    from matplotlib import colormaps

    figure.set_size_inches(9, 1.9 + 0.5 * len(rows))
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    palette = colormaps["tab20"]
    for i, row in enumerate(rows):
        left = 0.0
        rest = "Python, imports and the rest"
        parts = {**row["phases"], rest: max(0.0, row["seconds"] - sum(row["phases"].values()))}
        for name, seconds in parts.items():
            color = "#dddddd" if name == rest else palette(names.index(name) % 20)
            axes.barh(i, seconds, 0.65, left=left, color=color, label=name.replace("_", " "))
            left += seconds
        axes.text(left, i, f" {row['seconds']:.1f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["kind"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(row["seconds"] for row in rows))
    axes.set_xlabel("seconds")
    handles: dict[str, Any] = {}
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(name, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _clean(axes)


def _prefix(figure: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Left, what the cache saves, goals as lines; right, the median TTFT without and with it."""
    figure.set_size_inches(10, 4.4)
    shares, ttft = figure.subplots(1, 2, width_ratios=[3, 2])
    fields = {"hit_rate": "hits", "prefill_saved": "prefill tokens saved", "prefill_flops_saved": "prefill FLOPs saved"}
    names = [row["name"] + ("" if row["kv_cache_dtype"] == "auto" else f"\n{row['kv_cache_dtype']}") for row in rows]
    goal_label = "goal"
    for i, ((key, label), color) in enumerate(zip(fields.items(), ("#8ecae6", "#81b29a", "#f2cc8f"), strict=True)):
        places = [x + 0.27 * (i - 1) for x in range(len(rows))]
        bars = shares.bar(places, [100 * row[key] for row in rows], 0.25, color=color, label=label)
        shares.bar_label(bars, fmt="%.0f%%", fontsize=8, label_type="center")
        for x, row in zip(places, rows, strict=True):
            if row["goal"] and key in row["goal"]:
                shares.hlines(100 * row["goal"][key], x - 0.13, x + 0.13, color=FLOOR, linewidth=2, label=goal_label)
                goal_label = "_nolegend_"
    shares.set_xticks(range(len(rows)), names)
    shares.set_ylim(0, 125)
    shares.set_yticks(range(0, 101, 20))
    shares.set_ylabel("% of prompt tokens")
    shares.legend(fontsize=8, ncols=2, loc="upper left", frameon=False)
    for i, (key, color) in enumerate((("off", "#bbbbbb"), ("on", OURS))):
        places = [x + 0.36 * (i - 0.5) for x in range(len(rows))]
        bars = ttft.bar(places, [row[key]["ttft_median_ms"] for row in rows], 0.33, color=color, label=f"cache {key}")
        ttft.bar_label(bars, [f"{row[key]['ttft_median_ms']:,.0f}" for row in rows], fontsize=8, padding=1)
    ttft.set_xticks(range(len(rows)), names, fontsize=9)
    ttft.set_ylim(0, 1.25 * ttft.get_ylim()[1])
    ttft.set_ylabel("median TTFT under this load, ms")
    ttft.legend(fontsize=8, loc="upper left", frameon=False, ncols=2)
    for axes in (shares, ttft):
        _clean(axes)


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


PLOTS: dict[str, Callable[[Any, list[dict[str, Any]], dict[str, Any]], None]] = {
    "throughput": _throughput,
    "steps": _steps,
    "prefix": _prefix,
    "kernels": _kernels,
    "startup": _startup,
}
"""Section -> what draws it; the file is called <section>.png."""
_TITLES = {
    "throughput": "Offline throughput",
    "steps": "Where a decode step's time goes",
    "prefix": "Prefix cache",
    "kernels": "Kernels against the roofline",
    "startup": "Start-up",
}
