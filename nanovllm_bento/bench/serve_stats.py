"""From the records of a run's requests to its numbers. Pure functions; times in seconds come in, milliseconds go out.

The metrics are vLLM's: TTFT is the time from sending a request to its first token; E2EL to its last; TPOT is
(E2EL - TTFT) / (output tokens - 1); ITL the gaps between the chunks of a stream. Failed requests count in no
distribution and no throughput.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from nanovllm_bento.bench.serve_messages import Done, Record

PERCENTILES = (50, 90, 95, 99)
CLIENT_BOUND = 0.5
"""Share of a core beyond which a client process may have held the server back."""
CLIENT_STARVED = 0.25
"""Share of the time that a client process waited for a core, beyond which its times are too long."""
NUM_BUCKETS = 60
MAX_EXAMPLES = 5


def summarize(done: Sequence[Done], start: float, *, slo: Mapping[str, float], ignore_eos: bool) -> dict[str, Any]:
    """The numbers of one run that began at ``start`` (monotonic)."""
    records = sorted((r for d in done for r in d.records), key=lambda r: r.started)
    good = [r for r in records if r.failure is None]
    seconds = max((r.ended for r in records), default=start) - start
    input_tokens = sum(r.prompt_tokens or 0 for r in good)
    output_tokens = sum(map(output_count, good))
    chunks = sum(len(chunk_times(r)) for r in good)
    metrics = distributions(good)
    found = {
        "seconds": round(seconds, 3),
        "requests": {
            "sent": len(records),
            "completed": len(good),
            "failed": len(records) - len(good),
            "failures": failures(records),
            "turns_not_sent": sum(d.not_sent for d in done),
            "reconnects": sum(d.reconnects for d in done),
        },
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "output_tokens_counted_by": counted_by(good),
        "short_answers": short_answers(good) if ignore_eos else None,
        "requests_per_s": per_second(len(good), seconds),
        "input_tok_s": per_second(input_tokens, seconds),
        "output_tok_s": per_second(output_tokens, seconds),
        "total_tok_s": per_second(input_tokens + output_tokens, seconds),
        "chunks_per_s": per_second(chunks, seconds),
        "tokens_per_chunk": round(output_tokens / chunks, 3) if chunks else None,
        "peak_concurrency": peak_concurrency(records),
        **{f"{name}_ms": spread(values) for name, values in metrics.items()},
        "goodput": goodput(good, len(records), seconds, slo) if slo else None,
        "prefix_cache": prefix_cache(good),
        "client": client_cost(done, records),
        "timeline": timeline(records, start, seconds),
        "quantiles": {f"{name}_ms": quantiles(values) for name, values in metrics.items()},
    }
    return found


def chunk_times(record: Record) -> "array[float]":
    """Seconds after its start at which each chunk with tokens came."""
    times = array("d")
    times.frombytes(record.chunks)
    return times


def output_count(record: Record) -> int:
    """Output tokens as the server counts them; where it does not, the chunks: no less than one token each."""
    return record.output_tokens if record.output_tokens is not None else len(record.chunks) // 8


def counted_by(good: Sequence[Record]) -> str:
    """Who counted the output tokens: usage, chunks, or both in one run."""
    kinds = {"chunks" if r.output_tokens is None else "usage" for r in good}
    return " and ".join(sorted(kinds)) or "usage"


def ttft(record: Record) -> float | None:
    return None if record.first is None else record.first - record.started


def e2el(record: Record) -> float | None:
    return None if record.last is None else record.last - record.started


def tpot(record: Record) -> float | None:
    """None where there is no second token."""
    tokens = output_count(record)
    if record.first is None or record.last is None or tokens < 2:
        return None
    return (record.last - record.first) / (tokens - 1)


def distributions(good: Sequence[Record]) -> dict[str, list[float]]:
    """Metric → its values in ms."""

    def ms(values: Iterable[float | None]) -> list[float]:
        return [1000 * value for value in values if value is not None]

    gaps = [np.diff(np.frombuffer(r.chunks, dtype="<f8")) for r in good if len(r.chunks) > 8]
    itl: list[float] = (1000 * np.concatenate(gaps)).tolist() if gaps else []
    return {
        "ttft": ms(map(ttft, good)),
        "tpot": ms(map(tpot, good)),
        "itl": itl,
        "e2el": ms(map(e2el, good)),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, percentiles (linear between ranks, as numpy's) and maximum; None without values."""
    if not values:
        return None
    data = np.asarray(values)
    found = {"mean": float(data.mean()), "std": float(data.std()), "max": float(data.max())}
    for p, value in zip(PERCENTILES, np.percentile(data, PERCENTILES).tolist(), strict=True):
        found["median" if p == 50 else f"p{p}"] = value
    order = ("mean", "median", "p90", "p95", "p99", "max", "std")
    return {name: round(found[name], 3) for name in order}


def quantiles(values: Sequence[float]) -> list[float] | None:
    """The value at 0, 1, … 100 per cent, for plots."""
    return [round(v, 3) for v in np.percentile(np.asarray(values), range(101)).tolist()] if values else None


def failures(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Kind → how many, and some of what was said."""
    kinds = Counter(r.failure for r in records if r.failure is not None)
    return {
        kind: {
            "count": count,
            "examples": list(dict.fromkeys(r.detail for r in records if r.failure == kind and r.detail))[:MAX_EXAMPLES],
        }
        for kind, count in kinds.most_common()
    }


def short_answers(good: Sequence[Record]) -> int:
    """Answers of another length than was asked for with ignore_eos: then two servers did not do the same work."""
    return sum(r.output_tokens not in (None, r.wanted_tokens) for r in good if r.wanted_tokens is not None)


def goodput(good: Sequence[Record], sent: int, seconds: float, slo: Mapping[str, float]) -> dict[str, Any]:
    """Requests a second that meet every bound (ms). A request without a TPOT meets that; a failed one meets none."""
    measures = {"ttft": ttft, "tpot": tpot, "e2el": e2el}

    def met(record: Record, name: str) -> bool:
        value = measures[name](record)
        return 1000 * (value or 0.0) <= slo[name]

    each = {name: sum(met(r, name) for r in good) for name in slo}
    all_met = sum(all(met(r, name) for name in slo) for r in good)
    return {
        "slo_ms": dict(slo),
        "requests_per_s": per_second(all_met, seconds),
        "share": round(all_met / sent, 4) if sent else 0.0,
        "share_each": {name: round(count / sent, 4) if sent else 0.0 for name, count in each.items()},
    }


def prefix_cache(good: Sequence[Record]) -> dict[str, Any] | None:
    """Prompt tokens that the server says it had cached; None where it says nothing."""
    told = [r for r in good if r.cached_tokens is not None and r.prompt_tokens]
    if not told:
        return None
    cached, prompt = sum(r.cached_tokens or 0 for r in told), sum(r.prompt_tokens or 0 for r in told)
    return {"cached_tokens": cached, "prompt_tokens": prompt, "hit_rate": round(cached / prompt, 4)}


def client_cost(done: Sequence[Done], records: Sequence[Record]) -> dict[str, Any]:
    """What the load generator cost itself, and whether its numbers can be those of the server."""

    def share(seconds: float | None, of: float) -> float | None:
        return None if seconds is None else round(seconds / of, 4) if of > 0 else 0.0

    rows: list[dict[str, Any]] = [
        {
            "requests": len(d.records),
            "chunks": sum(len(r.chunks) // 8 for r in d.records),
            "cpu_share": share(d.usage.cpu_seconds, d.usage.seconds),
            "peak_cpu_share": round(d.usage.peak_cpu_share, 4),
            "waited_share": share(d.usage.waited_seconds, d.usage.seconds),
        }
        for d in done
    ]
    late = [r.started - r.planned for r in records if r.planned is not None]
    return {
        "bound": any(row["cpu_share"] > CLIENT_BOUND for row in rows),
        "starved": any((row["waited_share"] or 0.0) > CLIENT_STARVED for row in rows),
        "late_ms": spread([1000 * s for s in late]),
        "processes": rows,
    }


def peak_concurrency(records: Sequence[Record]) -> int:
    """Requests open at the same time, at most."""
    events = [(r.started, 1) for r in records] + [(r.ended, -1) for r in records]
    running = peak = 0
    for _, change in sorted(events):  # at the same time, ends before starts
        running += change
        peak = max(peak, running)
    return peak


def timeline(records: Sequence[Record], start: float, seconds: float) -> list[dict[str, Any]]:
    """The run in slices of at least a second: requests running, tokens a second, TTFT of those that started."""
    if seconds <= 0:
        return []
    width = max(1.0, seconds / NUM_BUCKETS)
    count = max(1, ceil(seconds / width - 1e-9))
    tokens, running = np.zeros(count), np.zeros(count)
    waits: list[list[float]] = [[] for _ in range(count)]
    completed, failed = [0] * count, [0] * count
    for r in records:
        begin = r.started - start
        slot = min(count - 1, max(0, int(begin / width)))
        wait = ttft(r)
        if r.failure is None and wait is not None:
            waits[slot].append(1000 * wait)
        end = r.ended - start
        ended = min(count - 1, max(0, int(end / width)))
        (completed if r.failure is None else failed)[ended] += 1
        for i in range(slot, ended + 1):
            running[i] += max(0.0, min(end, (i + 1) * width) - max(begin, i * width)) / width
        times = np.frombuffer(r.chunks, dtype="<f8")
        if len(times):
            places = np.clip(((times + begin) / width).astype(int), 0, count - 1)
            np.add.at(tokens, places, output_count(r) / len(times))
    rows = []
    for i in range(count):
        span = min(width, seconds - i * width)
        if span < 0.05 * width:  # too little of a slice for a rate
            continue
        rows.append(
            {
                "at_s": round(i * width, 3),
                "seconds": round(span, 3),
                "running": round(float(running[i]) * width / span, 2),
                "output_tok_s": round(float(tokens[i]) / span, 1),
                "completed": completed[i],
                "failed": failed[i],
                "ttft_median_ms": round(float(np.median(waits[i])), 3) if waits[i] else None,
                "ttft_p99_ms": round(float(np.percentile(waits[i], 99)), 3) if waits[i] else None,
            }
        )
    return rows


def per_second(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0
