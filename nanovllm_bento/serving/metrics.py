"""GET /metrics: what vLLM exposes, under its names and with its meanings, summed over all API workers of the service.

What belongs to requests is counted where it is seen, in the workers; what belongs to the engine comes with its
heartbeats. Not responsible for files and processes: that is counters.py. docs/observability.md explains each metric.
"""

import asyncio
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import EngineClient
from nanovllm_bento.engine.messages import ITERATION_TOKENS_BUCKETS, EngineInfo, EngineStats
from nanovllm_bento.serving.counters import EpochTotals, WorkerCounters

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

# fmt: off
# vLLM's bounds, and before the "|" finer ones: where a token takes 2 ms, all would fall into vLLM's first bucket.
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)
_PER_TOKEN = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075,  # |
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
_LATENCY = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2,  # |
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on
_TOKENS = tuple(mantissa * 10**exponent for exponent in range(8) for mantissa in (1, 2, 5))
"""Bounds of counts of tokens; those above max_model_len are not shown, which makes them vLLM's."""
_NUM_CHOICES = (1, 2, 5, 10, 20)

FINISHED_REASONS = ("stop", "length", "abort", "error")
REFUSALS = ("400", "401", "403", "404", "405", "408", "413", "415", "429", "500", "503", "504", "other")
"""HTTP statuses of requests that were not begun or failed before their first token."""


@dataclass(slots=True)
class _Plan:
    """Which float64 of a file means what. Places are given in the order of the calls."""

    size: int = 0
    meaning: list[object] = field(default_factory=list)

    def take(self, name: str, bounds: Sequence[float] = ()) -> int:
        """The place of a counter, or of a histogram's first bucket: one per bound, one above them, then the sum."""
        place = self.size
        self.size += len(bounds) + 2 if bounds else 1
        self.meaning.append((name, tuple(bounds)))
        return place

    @property
    def version(self) -> int:
        return zlib.crc32(repr(self.meaning).encode())


@dataclass(slots=True)
class _Histogram:
    plan: _Plan
    name: str
    bounds: tuple[float, ...]
    documentation: str
    start: int = field(init=False)
    sum: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.plan.take(self.name, self.bounds)
        self.sum = self.start + len(self.bounds) + 1

    def observe(self, values: "memoryview[float]", value: float) -> None:
        values[self.start + bisect_left(self.bounds, value)] += 1.0
        values[self.sum] += value


_plan = _Plan()
_PROMPT_TOKENS = _plan.take("prompt_tokens")
_CACHED_TOKENS = _plan.take("prompt_tokens_cached")
_FIRST_TOKENS = _plan.take("first_tokens")  # all later ones are in the inter-token histogram
_HELD = _plan.take("requests held")  # a gauge
_DEADLINES = _plan.take("num_deadlines_exceeded")
_SUCCESS = {reason: _plan.take(f"request_success {reason}") for reason in FINISHED_REASONS}
_REFUSED = {status: _plan.take(f"requests_refused {status}") for status in REFUSALS}
_ttft = _Histogram(_plan, "time_to_first_token_seconds", _TTFT, "Histogram of time to first token in seconds.")
_itl = _Histogram(_plan, "inter_token_latency_seconds", _PER_TOKEN, "Histogram of inter-token latency in seconds.")
_tpot = _Histogram(
    _plan, "request_time_per_output_token_seconds", _PER_TOKEN, "Histogram of time per output token of each request."
)
_e2e = _Histogram(_plan, "e2e_request_latency_seconds", _LATENCY, "Histogram of end-to-end request latency in seconds.")
_queue = _Histogram(_plan, "request_queue_time_seconds", _LATENCY, "Histogram of time spent waiting to be scheduled.")
_inference = _Histogram(_plan, "request_inference_time_seconds", _LATENCY, "Histogram of time spent running.")
_prefill = _Histogram(_plan, "request_prefill_time_seconds", _LATENCY, "Histogram of time spent in prefill.")
_decode = _Histogram(_plan, "request_decode_time_seconds", _LATENCY, "Histogram of time spent in decode.")
_prompt = _Histogram(_plan, "request_prompt_tokens", _TOKENS, "Histogram of prompt tokens of a request.")
_generation = _Histogram(_plan, "request_generation_tokens", _TOKENS, "Histogram of output tokens of a request.")
_computed = _Histogram(
    _plan, "request_prefill_kv_computed_tokens", _TOKENS, "Histogram of prompt tokens that were not cached."
)
_max_tokens = _Histogram(_plan, "request_params_max_tokens", _TOKENS, "Histogram of the max_tokens parameter.")
_n = _Histogram(_plan, "request_params_n", _NUM_CHOICES, "Histogram of the n parameter.")
_HISTOGRAMS = [_ttft, _itl, _tpot, _e2e, _queue, _inference, _prefill, _decode, _prompt, _generation, _computed]
_HISTOGRAMS += [_max_tokens, _n]
# What tokens() needs, without a look into an object.
_ITL_BOUNDS, _ITL_START, _ITL_SUM = _itl.bounds, _itl.start, _itl.sum

_engine_plan = _Plan()
_PREEMPTIONS = _engine_plan.take("num_preemptions")
_CACHE_QUERIES = _engine_plan.take("prefix_cache_queries")
_CACHE_HITS = _engine_plan.take("prefix_cache_hits")
_iteration = _Histogram(
    _engine_plan, "iteration_tokens_total", ITERATION_TOKENS_BUCKETS, "Histogram of number of tokens per engine step."
)


class RequestMetrics:
    """One sequence from its start to its end. Times are of time.monotonic(), in seconds.

    Also what the access log and the traces say of it: see serving/logs.py and serving/telemetry.py.
    """

    __slots__ = (
        "_held",
        "_values",
        "arrived",
        "finish_reason",
        "finished_at",
        "first_at",
        "last_at",
        "max_tokens",
        "n",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "queued_at",
        "scheduled_at",
    )

    def __init__(
        self,
        values: "memoryview[float]",
        num_prompt_tokens: int,
        arrived: float,
        max_tokens: int | None,
        n: int,
        held: bool,
    ) -> None:
        self._values, self._held = values, held
        if held:
            values[_HELD] += 1.0
        self.num_prompt_tokens, self.max_tokens, self.n = num_prompt_tokens, max_tokens, n
        self.arrived, self.queued_at = arrived, time.monotonic()
        self.scheduled_at = self.first_at = self.last_at = self.finished_at = 0.0
        self.num_tokens = self.num_cached_tokens = 0
        self.finish_reason: str | None = None

    def submitted(self) -> None:
        """It waits in the engine from now on, no longer here."""
        if self._held:
            self._held = False
            self._values[_HELD] -= 1.0

    def first(self, now: float, scheduled_at: float, num_tokens: int, num_cached: int) -> None:
        """The first tokens came. ``scheduled_at``: when a step first took the sequence; 0 if that is not known."""
        self.scheduled_at = min(max(scheduled_at, self.queued_at), now)
        self.first_at = self.last_at = now
        self.num_tokens, self.num_cached_tokens = num_tokens, num_cached
        values = self._values
        values[_PROMPT_TOKENS] += self.num_prompt_tokens
        values[_CACHED_TOKENS] += num_cached
        values[_FIRST_TOKENS] += num_tokens
        _ttft.observe(values, now - self.arrived)

    def tokens(self, now: float, n: int) -> None:
        """``n`` further tokens came together; they count as if each had come ``1/n`` of the time after the one before.

        So the histogram does not depend on how many steps were joined.
        """
        if not n:
            return
        seconds = now - self.last_at
        self.last_at = now
        self.num_tokens += n
        values = self._values
        if n == 1:
            values[_ITL_START + bisect_left(_ITL_BOUNDS, seconds)] += 1.0
        else:
            values[_ITL_START + bisect_left(_ITL_BOUNDS, seconds / n)] += n
        values[_ITL_SUM] += seconds

    def finish(self, now: float, reason: str) -> None:
        """It ended: "stop", "length", "abort" (its client left) or "error". Only the first call counts.

        As in vLLM, only what ran to its end has a place in the histograms of whole requests.
        """
        if self.finish_reason is not None:
            return
        self.submitted()
        self.finish_reason, self.finished_at = reason, now
        values = self._values
        values[_SUCCESS[reason]] += 1.0
        if reason not in ("stop", "length") or not self.first_at:
            return
        _e2e.observe(values, now - self.arrived)
        _queue.observe(values, self.queue_seconds)
        _prefill.observe(values, self.prefill_seconds)
        _decode.observe(values, self.decode_seconds)
        _inference.observe(values, self.last_at - self.scheduled_at)
        _tpot.observe(values, self.decode_seconds / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0)
        _prompt.observe(values, self.num_prompt_tokens)
        _generation.observe(values, self.num_tokens)
        _computed.observe(values, self.num_prompt_tokens - self.num_cached_tokens)
        if self.max_tokens is not None:
            _max_tokens.observe(values, self.max_tokens)
        if self.n:
            _n.observe(values, self.n)

    @property
    def queue_seconds(self) -> float:
        """From its beginning here to its first step."""
        return self.scheduled_at - self.queued_at

    @property
    def prefill_seconds(self) -> float:
        """From its first step to its first token."""
        return self.first_at - self.scheduled_at

    @property
    def decode_seconds(self) -> float:
        """From its first token to its last."""
        return self.last_at - self.first_at


class Metrics:
    """One worker's share in the service's metrics, and the text about all of them."""

    def __init__(
        self,
        config: ServiceConfig,
        model_name: str,
        folder: Path | None = None,
        *,
        engine_config: EngineConfig | None = None,
    ) -> None:
        self.prefix = config.metrics_prefix
        self.labels = {"model_name": model_name, "engine": "0"}
        self.engine_config = engine_config
        self._interval = config.engine_heartbeat_interval
        self._counters = WorkerCounters(_plan.size, _plan.version, gauges=[_HELD])
        self._engine_totals = EpochTotals(_engine_plan.size, _engine_plan.version)
        if folder is not None:
            self.open(folder)

    def open(self, folder: Path) -> None:
        """Share the counts with the other workers of the service, through its IPC folder. Raises OSError."""
        self._counters.open(folder)
        self._engine_totals.open(folder)

    def close(self) -> None:
        """Leave this worker's counts to the sum."""
        self._counters.close()
        self._engine_totals.close()

    def request(
        self, num_prompt_tokens: int, arrived: float, *, max_tokens: int | None = None, n: int = 1, held: bool = False
    ) -> RequestMetrics:
        """Begin to watch one sequence; from here on it waits for its first step.

        arrived: time.monotonic() when its HTTP request came. n: the choices of its request, for the first of them; 0
        for the others, so that each request's parameter counts once. held: it waits in this worker until ``submitted``
        says that it was handed to the engine, or ``finish`` that it never will be.
        """
        return RequestMetrics(self._counters.values, num_prompt_tokens, arrived, max_tokens, n, held)

    def refused(self, status: int) -> None:
        """A request was answered with an error, by HTTP status, before any token."""
        self._counters.values[_REFUSED.get(str(status), _REFUSED["other"])] += 1.0

    def deadline_exceeded(self) -> None:
        """A request was ended by its deadline, before its first token or after."""
        self._counters.values[_DEADLINES] += 1.0

    def record_engine(self, stats: EngineStats) -> None:
        """Take the engine's totals into the sums, so that they outlive the engine."""
        totals = [stats.num_preemptions, stats.prefix_cache_queries, stats.prefix_cache_hits]
        totals += [*stats.iteration_tokens, stats.iteration_tokens_sum]
        self._engine_totals.record(stats.epoch, totals)

    async def follow(self, engine: EngineClient) -> None:
        """Record the engine's totals about once a heartbeat; to be run as a task for as long as the worker lives."""
        while True:
            await asyncio.sleep(self._interval)
            self.record_engine(engine.stats)

    def render(self, stats: EngineStats | None, info: EngineInfo | None = None) -> bytes:
        """The answer of /metrics (its type is CONTENT_TYPE). Takes a few milliseconds.

        stats: the engine's last; None while no engine is ready: its gauges are 0 then. info: None before there ever
        was one.
        """
        if stats is not None:
            self.record_engine(stats)
        return generate_latest(_Families(self._families(stats or EngineStats(), info)))

    def _families(self, stats: EngineStats, info: EngineInfo | None) -> Iterator[Metric]:
        values = self._counters.total()
        epoch, engine = self._engine_totals.total()
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        waiting = stats.num_requests_waiting + self._counters.living()[_HELD]
        yield self._gauge(
            "num_requests_running", "Number of requests in model execution batches.", stats.num_requests_running
        )
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage)
        yield self._gauge(
            "oldest_waiting_seconds", "Time that the longest waiting request has waited.", stats.oldest_waiting_seconds
        )
        yield self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.", engine[_CACHE_QUERIES])
        yield self._counter("prefix_cache_hits", "Prefix cache hits, in tokens.", engine[_CACHE_HITS])
        yield self._counter("num_preemptions", "Cumulative number of preemptions.", engine[_PREEMPTIONS])
        yield self._counter("num_deadlines_exceeded", "HTTP requests ended by their deadline.", values[_DEADLINES])
        yield self._counter("engine_restarts", "Starts of the engine after the first.", max(0, epoch))
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", values[_PROMPT_TOKENS])
        yield self._counter("prompt_tokens_cached", "Number of cached prompt tokens.", values[_CACHED_TOKENS])
        generated = values[_FIRST_TOKENS] + sum(values[_ITL_START:_ITL_SUM])
        yield self._counter("generation_tokens", "Number of generation tokens processed.", generated)
        yield self._counters_by("request_success", "Count of finished requests.", "finished_reason", _SUCCESS, values)
        yield self._counters_by(
            "requests_refused", "Requests answered with an error before any token.", "status", _REFUSED, values
        )
        longest = info.max_model_len if info is not None else None
        for histogram in _HISTOGRAMS:
            yield self._histogram(histogram, values, longest if histogram.bounds is _TOKENS else None)
        yield self._histogram(_iteration, engine)
        if info is not None:
            yield self._cache_config(info)

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(self.prefix + name, documentation, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(self.prefix + name, documentation, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counters_by(
        self, name: str, documentation: str, label: str, places: Mapping[str, int], values: Sequence[float]
    ) -> Metric:
        family = CounterMetricFamily(self.prefix + name, documentation, labels=[*self.labels, label])
        for key, place in places.items():
            family.add_metric([*self.labels.values(), key], values[place])
        return family

    def _histogram(self, histogram: _Histogram, values: Sequence[float], highest: int | None = None) -> Metric:
        buckets: list[tuple[str, float]] = []
        count = 0.0
        for i, bound in enumerate(histogram.bounds):
            count += values[histogram.start + i]
            if highest is None or bound <= highest:
                buckets.append((floatToGoString(bound), count))
        buckets.append(("+Inf", count + values[histogram.sum - 1]))
        family = HistogramMetricFamily(self.prefix + histogram.name, histogram.documentation, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), buckets, values[histogram.sum])
        return family

    def _cache_config(self, info: EngineInfo) -> Metric:
        settings: dict[str, object] = {
            "engine": self.labels["engine"],
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_blocks,
            "cache_dtype": info.kv_cache_dtype or "auto",
        }
        if (config := self.engine_config) is not None:
            settings |= {
                "enable_prefix_caching": config.enable_prefix_caching,
                "gpu_memory_utilization": config.gpu_memory_utilization,
                "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
                "num_gpu_blocks_override": config.num_gpu_blocks_override,
            }
        name, documentation = self.prefix + "cache_config_info", "Information of the engine's cache configuration."
        family = GaugeMetricFamily(name, documentation, labels=list(settings))
        family.add_metric([str(value) for value in settings.values()], 1)
        return family


class _Families(Collector):
    """What prometheus_client renders, without a registry, which would keep state of its own."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        return self.families
