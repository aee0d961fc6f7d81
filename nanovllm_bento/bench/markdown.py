"""A report as Markdown: one table a section, failures and random weights said beside the numbers."""

from collections.abc import Callable, Iterable
from typing import Any

RANDOM = "†"
"""Marks a row that was measured with random weights."""


def render(result: dict[str, Any], plots: Iterable[str] = ()) -> str:
    """The whole document; ``plots`` are names of image files beside it."""
    parts = [f"# Evaluation of {result['model']}", *_header(result)]
    for name, section in result["sections"].items():
        title, write = _SECTIONS[name]
        parts.append(f"## {title}")
        for error in section["errors"]:
            where = ", ".join(str(error[key]) for key in ("kv_cache_dtype", "row") if error.get(key) is not None)
            parts.append(f"**Failed**{f' ({where})' if where else ''}: {' '.join(error['error'].split())}")
        if section["rows"]:
            parts += write(section["rows"], result)
    if result.get("quality") is not None:
        parts += ["## Quality", *_quality(result["quality"])]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def table(headers: list[str], rows: Iterable[list[Any]]) -> str:
    """A Markdown table; None is shown as a dash."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _header(result: dict[str, Any]) -> list[str]:
    env = result["environment"]
    where = ", ".join(card["name"] for card in env["gpu"]) if result["device"] == "cuda" else env["cpu"]["model"]
    git = env.get("git") or {}
    commit = f"commit {git['commit'][:12]}{' and local changes' if git['dirty'] else ''}, " if git else ""
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "triton") if name in env["packages"])
    parts = [f"{where}; {result['dtype'] or 'dtype unknown'}; {commit}{versions}; {env['time']}. `{env['command']}`"]
    if result["random_weights"]:
        parts.append(f"{RANDOM} Random weights: speed is that of any weights of these shapes, quality is none.")
    c = result.get("ceilings")
    if c:
        parts.append(
            f"Ceilings measured in this run: copies {c['copy_bytes_s'] / 1e9:,.0f} GB/s (bytes read and written), "
            f"{c['matmul_dtype']} products {c['matmul_flops_s'] / 1e12:,.3g} TFLOP/s."
        )
    failed = [name for name, section in result["sections"].items() if section["errors"]]
    if failed:
        parts.append(f"**Failed, in whole or in part: {', '.join(failed)}.**")
    return parts


def _mark(result: dict[str, Any]) -> str:
    return f" {RANDOM}" if result["random_weights"] else ""


def _kv(row: dict[str, Any], result: dict[str, Any]) -> str:
    kv = row["kv_cache_dtype"]
    return f"{result['dtype'] if kv == 'auto' and result['dtype'] else kv}{_mark(result)}"


def peer_row(result: dict[str, Any], name: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """A peer's row of the same KV cache type, number of sequences and output tokens as one of ours."""
    for peer in result["peers"].get(name, []):
        same = (peer["kv_cache_dtype"], peer["num_seqs"]) == (row["kv_cache_dtype"], row["num_seqs"])
        if same and peer["output_tokens"] in (None, row["output_tokens"]):
            return dict(peer)
    return None


def _throughput(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    peers = list(result["peers"])
    headers = ["KV cache", "sequences", "tok/s, first run", "best run", "floor", "of floor"]
    for name in peers:
        headers += [f"{name}, first", f"{name}, best", "ours / it (best)"]
    lines = []
    for row in rows:
        line = [_kv(row, result), row["num_seqs"], row["tok_s_first"], row["tok_s_best"]]
        line += [row["floor_tok_s"], percent(row["floor_share"])]
        for name in peers:
            peer = peer_row(result, name, row)
            line += (
                [peer["tok_s_first"], peer["tok_s_best"], f"{row['tok_s_best'] / peer['tok_s_best']:.2f}×"]
                if peer
                else [None, None, None]
            )
        lines.append(line)
    notes = [
        f"Output tokens per second of `LLM.generate`, all sequences handed over at once, prefix cache off; workload: "
        f"{rows[0]['workload']}. The floor is what the bytes and FLOPs of this workload take at the ceilings above.",
        table(headers, lines),
    ]
    for name in peers:
        first = result["peers"][name][0]
        said = [str(first[key]) for key in ("engine", "version", "gpu") if first.get(key)]
        loads = [peer["load_s"] for peer in result["peers"][name] if peer.get("load_s")]
        loaded = f"; it loaded in {min(loads):.1f} to {max(loads):.1f} s" if loads else ""
        notes.append(f"{name}: {' '.join(said)}{loaded}.")
    return notes


def _steps(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["KV cache", "rows", "context", "wall µs", "GPU", "gap", "schedule", "launch", "wait", "commit", "floor"]
    names = ["wall", "gpu", "gap", "schedule", "launch", "wait", "commit", "floor"]
    lines = [
        [_kv(row, result), row["num_rows"], row["context_len"], *(row.get(f"{name}_us") for name in names)]
        for row in rows
    ]
    parts = [
        "A decode step in microseconds, medians. Schedule, launch, wait and commit are the host's time and make up the "
        "wall time; the GPU's is measured apart, of steps that were launched in full before they began; gap = wall - "
        "GPU.",
        table(headers, lines),
    ]
    for row in rows:
        kernels = row.get("kernels")
        if not kernels:
            continue
        groups = ", ".join(f"{n} {percent(g['share'])}" for n, g in kernels["groups"].items())
        parts.append(
            f"Kernels at {row['num_rows']} rows, {_kv(row, result)}: {kernels['launches']:.0f} launches, "
            f"{kernels['kernel_us']:,.0f} µs in all: {groups}."
        )
        top = [
            [f"`{k['kernel'][:80]}`", k["group"], k["launches"], k["us"], percent(k["share"])] for k in kernels["top"]
        ]
        parts.append(table(["kernel", "group", "launches a step", "µs a step", "share"], top))
    return parts


def _prefill(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["KV cache", "tokens", "prompt", "wall ms", "launch", "kernels", "floor"]
    lines = []
    for row in rows:
        kernels = row["kernels"]["kernel_us"] if row.get("kernels") else None
        times = (row["wall_us"], row["launch_us"], kernels, row["floor_us"])
        cells = [None if us is None else f"{us / 1e3:.2f}" for us in times]
        lines.append([_kv(row, result), row["tokens"], row["prompt_len"], *cells])
    parts = [
        "A full prefill step, back to back: the loop's wall time, the host's time to enqueue it, the sum of its "
        "kernels.",
        table(headers, lines),
    ]
    for row in rows:
        if row.get("kernels"):
            groups = ", ".join(f"{n} {percent(g['share'])}" for n, g in row["kernels"]["groups"].items())
            parts.append(f"Kernels, {_kv(row, result)}: {groups}.")
    return parts


def _prefix(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["set", "KV cache", "requests", "hits", "prefill tokens saved", "prefill FLOPs saved", "goal"]
    headers += ["median TTFT off → on, ms", "p95 TTFT", "output tok/s off → on"]
    lines = []
    for row in rows:
        off, on, goal = row["off"], row["on"], row["goal"]
        lines.append(
            [
                row["name"],
                _kv(row, result),
                row["requests"],
                percent(row["hit_rate"]),
                percent(row["prefill_saved"]),
                percent(row["prefill_flops_saved"]),
                f"{goal['hit_rate']:.0%} hits, {goal['prefill_saved']:.0%} saved" if goal else None,
                f"{off['ttft_median_ms']:,.1f} → {on['ttft_median_ms']:,.1f}",
                f"{off['ttft_p95_ms']:,.1f} → {on['ttft_p95_ms']:,.1f}",
                f"{off['output_tok_s']:,.0f} → {on['output_tok_s']:,.0f}",
            ]
        )
    return ["Shares of prompt tokens; the cache is empty when a run begins.", table(headers, lines)]


def _ttft(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["KV cache", "prompt tokens", "cold, ms", "best", "cached, ms", "best"]
    names = ["prompt_tokens", "cold_ms", "cold_min_ms", "cached_ms", "cached_min_ms"]
    return [
        f"Time to the first token inside the engine, which does nothing else; medians of {rows[0]['repeat']}. Cached: "
        "the same prompt again.",
        table(headers, [[_kv(row, result), *(row[name] for name in names)] for row in rows]),
    ]


def _kernels(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["kernel", "shape", "µs", "rate", "of ceiling", "plain PyTorch, µs", "speed-up", "goal"]
    lines = [
        [
            row["kernel"],
            row["shape"],
            row["us"],
            f"{_cell(row['rate'])} {row['unit']}",
            percent(row["ceiling_share"]),
            row["naive_us"],
            f"{row['speedup']:.1f}×",
            f"{row['goal']:g}×" if row["goal"] else None,
        ]
        for row in rows
    ]
    eager = [f"{row['kernel']} {row['shape']} ({', '.join(row['eager'])})" for row in rows if row.get("eager")]
    notes = ["Random inputs. Small inputs stay in the L2 cache, so may pass the ceiling of memory."]
    if eager and result["device"] == "cuda":
        notes.append(f"Timed outside a CUDA graph, so launches may show: {'; '.join(eager)}.")
    return [*notes, table(headers, lines)]


def _memory(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    headers = ["KV cache", "weights", "KV cache, GiB", "blocks", "tokens", "KiB a token", "CUDA graphs", "peak in use"]
    headers += ["peak reserved"]
    names = ["weights_bytes", "kv_cache_bytes"]
    later = ["graph_bytes", "peak_allocated_bytes", "peak_reserved_bytes"]
    lines = [
        [
            _kv(row, result),
            *(_gib(row[name]) for name in names),
            row["num_blocks"],
            row["cache_tokens"],
            row["kv_bytes_per_token"] / 1024,
            *(_gib(row[name]) for name in later),
        ]
        for row in rows
    ]
    return ["Bytes in GiB unless said otherwise.", table(headers, lines)]


def _gib(num_bytes: int | None) -> str | None:
    return None if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _startup(rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    headers = ["start", "seconds in all", *names]
    lines = [[f"{row['kind']}{_mark(result)}", row["seconds"], *(row["phases"].get(n) for n in names)] for row in rows]
    return [
        "Seconds. In this process: the engine's own start. Fresh process: from starting Python to the first token.",
        table(headers, lines),
    ]


def _quality(quality: Any) -> list[str]:
    if isinstance(quality, dict) and quality.get("benchmark") == "kv-quality":
        return _kv_quality(quality)
    rows = quality.get("rows") if isinstance(quality, dict) else None
    if not rows:
        import json

        return [f"```json\n{json.dumps(quality, indent=2)}\n```"]
    headers = list(dict.fromkeys(name for row in rows for name in row))
    said = [quality["note"]] if quality.get("note") else []
    return [*said, table(headers, [[row.get(name) for name in headers] for row in rows])]


def _kv_quality(quality: dict[str, Any]) -> list[str]:
    """The result of benchmarks/kv_quality.py."""
    greedy, perplexity = quality["greedy"], quality["perplexity"]
    lines = [
        ["tokens predicted", quality["num_tokens"]],
        ["KL, mean", round(quality["kl_mean"], 4)],
        ["KL, 99th percentile", round(quality["kl_p99"], 3)],
        ["most likely token is the same", f"{quality['top1_agreement']:.1%}"],
        [f"perplexity, {quality['dtype']} cache", round(perplexity["auto"], 2)],
        [f"perplexity, {quality['kv_cache_dtype']} cache", round(perplexity[quality["kv_cache_dtype"]], 2)],
        ["greedy continuations", f"{greedy['prompts']} of {greedy['tokens']} tokens"],
        ["of them identical", greedy["identical"]],
        ["tokens until they part, mean", greedy["mean_shared_prefix"]],
    ]
    return [
        f"{quality['kv_cache_dtype']} KV cache against {quality['dtype']}, on real weights ({quality['model']}) and "
        f"real text ({', '.join(quality['texts'])}).",
        table(["", ""], lines),
    ]


_SECTIONS: dict[str, tuple[str, Callable[[list[dict[str, Any]], dict[str, Any]], list[str]]]] = {
    "throughput": ("Throughput", _throughput),
    "steps": ("Decode step", _steps),
    "prefix": ("Prefix cache", _prefix),
    "prefill": ("Prefill steps", _prefill),
    "ttft": ("Time to first token", _ttft),
    "kernels": ("Kernels", _kernels),
    "memory": ("Memory", _memory),
    "startup": ("Start-up", _startup),
}
