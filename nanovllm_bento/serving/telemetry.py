"""OpenTelemetry traces: one span for each request, with vLLM's attributes, below the client's span if it sent one.

OpenTelemetry is imported only where traces are asked for (``pip install nanovllm-bento[otel]``). A span is made when
its request has ended, so nothing is paid before. The tracer is our own: BentoML's, which is global, is left alone.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from nanovllm_bento import __version__
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.metrics import RequestMetrics
from nanovllm_bento.serving.summary import summarize

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

SPAN_NAME = "llm_request"
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
FLUSH_TIMEOUT = 5.0
"""Seconds that a closing worker gives to the collector."""
_PROTOCOLS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


class Tracing:
    """Makes spans and sends them in the background. Made in the worker, not before it is forked or spawned."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME") or "nanovllm"
        # The sampler is what OTEL_TRACES_SAMPLER says; by default a span is sampled if its parent is, or has none.
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nanovllm_bento", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def create(cls, config: ServiceConfig, env: Mapping[str, str] | None = None) -> Self | None:
        """Tracing as configured; None where no endpoint is.

        Raises ConfigError if otlp_traces_endpoint is set but nothing is installed that could send there. If the
        endpoint only comes from OTEL_*, which may be meant for other programs, that is a warning.
        """
        env = os.environ if env is None else env
        endpoint = config.otlp_traces_endpoint
        from_env = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER", "") == "none":
            from_env = None
        if not endpoint and not from_env:
            return None
        try:
            return cls(_exporter(endpoint, env))
        except ConfigError as error:
            if endpoint:
                raise
            logger.warning("no traces are sent to %s: %s", from_env, error)
            return None

    def record(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        request_id: str,
        model: str,
        arrived: float,
        sequences: Sequence[RequestMetrics],
        sampling: SamplingParams | None = None,
        *,
        error: str | None = None,
    ) -> None:
        """Send the span of a request that has ended.

        headers: of the request, as in an ASGI scope; traceparent in them names the parent. arrived: time.monotonic().
        sequences: what ran for it. sampling: its parameters. error: the error's code, if it failed.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        seconds = time.monotonic() - arrived
        ended = time.time_ns()
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _CONTEXT_HEADERS}
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=ended - int(seconds * 1e9),
        )
        if span.is_recording():
            attributes = _attributes(request_id, model, sequences, sampling)
            span.set_attributes({**attributes, "gen_ai.latency.e2e": seconds})
            if error is not None:
                span.set_attribute("error.type", error)
                span.set_status(Status(StatusCode.ERROR, error))
        span.end(ended)

    async def close(self) -> None:
        """Send what is left, for FLUSH_TIMEOUT seconds at most."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop was closed while this was waiting for a collector
                loop.call_soon_threadsafe(sent.set)

        # A daemon, because OpenTelemetry tries for half a minute to reach a collector that is gone.
        threading.Thread(target=close, daemon=True).start()
        try:
            await asyncio.wait_for(sent.wait(), FLUSH_TIMEOUT)
        except TimeoutError:
            logger.warning("the last traces could not be sent within %.0f seconds", FLUSH_TIMEOUT)


def _attributes(
    request_id: str, model: str, sequences: Sequence[RequestMetrics], sampling: SamplingParams | None
) -> dict[str, Any]:
    summary = summarize(sequences)
    attributes: dict[str, Any] = {
        "gen_ai.request.id": request_id,
        "gen_ai.response.model": model,
        "gen_ai.request.n": summary.n or None,
        "gen_ai.usage.num_sequences": summary.num_sequences,
        "gen_ai.usage.prompt_tokens": summary.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": summary.num_generation_tokens,
        "gen_ai.response.finish_reasons": summary.finish_reasons,
        "gen_ai.latency.time_to_first_token": summary.time_to_first_token,
        "gen_ai.latency.time_in_queue": summary.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": summary.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": summary.decode_seconds,
        "gen_ai.latency.time_in_model_inference": summary.inference_seconds,
    }
    if sampling is not None:
        attributes |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        }
    return {name: value for name, value in attributes.items() if value is not None}


def _exporter(endpoint: str | None, env: Mapping[str, str]) -> "SpanExporter":
    """``endpoint`` None: the exporter reads it from OTEL_*. Raises ConfigError."""
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = protocol or "http/protobuf"
    if protocol not in _PROTOCOLS:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r} is not one of {', '.join(_PROTOCOLS)}.")
    package = _PROTOCOLS[protocol].split(".")[:5]
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as e:
        extra = " (or nanovllm-bento[otel])" if protocol != "grpc" else ""
        raise ConfigError(f"Traces over {protocol} need the package {'-'.join(package)}{extra}: {e}.") from None
    return OTLPSpanExporter(endpoint=endpoint)
