"""How the load generator shows itself: live progress, and a run's numbers as text. rich draws where it is installed."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from nanovllm_bento.bench.compare import read_result
from nanovllm_bento.bench.serve_messages import Progress
from nanovllm_bento.bench.serve_stats import CLIENT_BOUND, CLIENT_STARVED
from nanovllm_bento.errors import ConfigError

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
COLUMNS = ("mean", "median", "p90", "p95", "p99", "max")
PLAIN_INTERVAL = 5.0
"""Seconds between lines of progress where there is no terminal."""
LATE_MS = 10.0
"""Median lateness of sending beyond which the rate asked for was not met."""


def read(path: Path) -> dict[str, Any]:
    """A result of bench serve. Raises ConfigError."""
    found = read_result(path)
    if found.get("benchmark") != "serve":
        raise ConfigError(f"{path} is not a result of bench serve.")
    return found


class Display:
    """Progress on standard error while it is entered as a context; results on standard output."""

    def __init__(self) -> None:
        self._live: Any = None  # rich's Progress
        self._task: tuple[str, Any] | None = None
        self._last_line = 0.0
        self._ttft: list[float] = []
        self._latest: list[Progress] = []
        self._rate = _Rate()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._live = _rich_progress()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, name: str, total: int, progress: Sequence[Progress], seconds: float) -> None:
        """What all processes together have done. Called at each message of one of them."""
        for p in progress:
            if not any(p is seen for seen in self._latest):
                self._ttft += p.ttft
        self._latest = list(progress)
        del self._ttft[:-200]
        text = self._text(progress, seconds)
        ended = sum(p.completed + p.failed for p in progress)
        if self._live is not None:
            if self._task is None or self._task[0] != name:
                self._task = (name, self._live.add_task(name, total=total, text=""))
            self._live.update(self._task[1], completed=ended, text=text)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            self.say(f"{name}: {ended} of {total} · {text}")

    def result(self, result: dict[str, Any]) -> None:
        print("\n".join(text(result)), flush=True)

    def _text(self, progress: Sequence[Progress], seconds: float) -> str:
        started, failed = sum(p.started for p in progress), sum(p.failed for p in progress)
        completed = sum(p.completed for p in progress)
        requests, chunks = self._rate(seconds, completed, sum(p.chunks for p in progress))
        parts = [f"{started - completed - failed} open", f"{requests:.1f} req/s", f"{chunks:,.0f} chunks/s"]
        if self._ttft:
            parts.append(f"TTFT {1000 * median(self._ttft):,.0f} ms")
        if failed:
            parts.append(f"{failed} FAILED")
        return " · ".join(parts)


class _Rate:
    """Requests and chunks a second over the last few seconds."""

    WINDOW = 3.0

    def __init__(self) -> None:
        self._points: list[tuple[float, int, int]] = []

    def __call__(self, seconds: float, requests: int, chunks: int) -> tuple[float, float]:
        if self._points and seconds < self._points[-1][0]:
            self._points.clear()  # another run
        self._points.append((seconds, requests, chunks))
        while len(self._points) > 2 and self._points[1][0] < seconds - self.WINDOW:
            self._points.pop(0)
        first = self._points[0] if len(self._points) > 1 else (0.0, 0, 0)
        span = max(seconds - first[0], 1e-3)
        return (requests - first[1]) / span, (chunks - first[2]) / span


def _rich_progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


def text(result: dict[str, Any]) -> Iterator[str]:
    """A result for people, line by line."""
    yield f"{result['model']} at {result['url']}{result['endpoint']}"
    for run in result["runs"]:
        yield from _run(run)
    if len(result["runs"]) > 1:
        yield from _summary(result["runs"])


def _run(run: dict[str, Any]) -> Iterator[str]:
    about, requests = run["workload"], run["requests"]
    yield ""
    yield f"── {run['name']} · {about['dataset']}, {about['requests']} requests ".ljust(100, "─")
    tokens = "" if run["output_tokens_counted_by"] == "usage" else " (at least: not all answers had usage)"
    yield _row("requests", f"{requests['completed']} completed, {requests['failed']} failed in {run['seconds']:,.1f} s")
    yield _row(
        "throughput",
        f"{run['requests_per_s']:,.2f} req/s, {run['output_tok_s']:,.0f} output tok/s{tokens}, "
        f"{run['input_tok_s']:,.0f} input tok/s",
    )
    if run["tokens_per_chunk"] is not None:
        yield _row("stream", f"{run['chunks_per_s']:,.0f} chunks/s, {run['tokens_per_chunk']:.2f} tokens a chunk")
    yield _row("open", f"at most {run['peak_concurrency']}")
    yield _row("ms", "".join(f"{name:>11}" for name in COLUMNS))
    for name, label in METRICS.items():
        if values := run[f"{name}_ms"]:
            yield _row(label, "".join(f"{values[column]:>11,.2f}" for column in COLUMNS))
    if good := run["goodput"]:
        bounds = ", ".join(
            f"{METRICS[name]} ≤ {bound:g} ms: {good['share_each'][name]:.1%}" for name, bound in good["slo_ms"].items()
        )
        yield _row("goodput", f"{good['requests_per_s']:,.2f} req/s, {good['share']:.1%} of all sent ({bounds})")
    if cache := run["prefix_cache"]:
        yield _row("prefix cache", f"{cache['hit_rate']:.1%} of {cache['prompt_tokens']:,} prompt tokens")
    yield _row("client", client_line(run["client"]))
    for warning in warnings(run):
        yield f"! {warning}"


def client_line(client: dict[str, Any]) -> str:
    rows = client["processes"]
    share, peak = max(r["cpu_share"] for r in rows), max(r["peak_cpu_share"] for r in rows)
    waits = [r["waited_share"] for r in rows if r["waited_share"] is not None]
    waited = f", waited for a core {max(waits):.0%} of the time" if waits else ""
    count = f"{len(rows)} process{'es' if len(rows) > 1 else ''}"
    return f"{count}, the busiest at {share:.0%} of a core (peak {peak:.0%}){waited}"


def warnings(run: dict[str, Any]) -> Iterator[str]:
    """What must be known before a run's numbers are believed."""
    client, requests = run["client"], run["requests"]
    if client["bound"]:
        yield (
            f"CLIENT-BOUND: a client process used more than {CLIENT_BOUND:.0%} of a core; "
            "the server may be faster than this shows. Give more --processes, or cores."
        )
    if client["starved"]:
        yield (
            f"CLIENT-BOUND: a client process waited for a core more than {CLIENT_STARVED:.0%} of the time; "
            "latencies are too long by that. Leave cores to the client, or run it on another machine."
        )
    if client["late_ms"] and not run["max_concurrency"] and client["late_ms"]["median"] > LATE_MS:
        yield f"requests were sent {client['late_ms']['median']:.0f} ms late (median): the rate was not met."
    for kind, found in requests["failures"].items():
        said = f": {found['examples'][0]}" if found["examples"] else ""
        yield f"FAILED {found['count']} × {kind}{said}"
    if requests["turns_not_sent"]:
        yield f"{requests['turns_not_sent']} turns were not sent: their conversations had failed."
    if run["short_answers"]:
        yield f"{run['short_answers']} answers have another length than was asked for, in spite of ignore_eos."
    if run["interrupted"]:
        yield "INTERRUPTED: the run was stopped before its end."


def _summary(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    heads = ("req/s", "output tok/s", "TTFT med", "TTFT p99", "TPOT med", "TPOT p99", "failed")
    width = max(len(run["name"]) for run in runs) + 2
    yield ""
    yield "".ljust(width) + "".join(f"{head:>14}" for head in heads)
    for run in runs:
        cells = [f"{run['requests_per_s']:,.2f}", f"{run['output_tok_s']:,.0f}"]
        for metric in ("ttft", "tpot"):
            found = run[f"{metric}_ms"]
            cells += [f"{found[c]:,.2f}" if found else "-" for c in ("median", "p99")]
        cells.append(str(run["requests"]["failed"]))
        bound = " client-bound" if run["client"]["bound"] or run["client"]["starved"] else ""
        yield run["name"].ljust(width) + "".join(f"{cell:>14}" for cell in cells) + bound


def _row(label: str, value: str) -> str:
    return f"{label:<13}{value}"
