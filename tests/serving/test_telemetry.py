"""Traces reach a collector with vLLM's attributes, below the client's span; without an endpoint they cost nothing."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving import telemetry
from nanovllm_bento.serving.metrics import Metrics, RequestMetrics
from nanovllm_bento.serving.telemetry import Tracing

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes what is posted to it, on a port of this machine."""

    def __init__(self) -> None:
        self.posts: queue.Queue[tuple[str, bytes]] = queue.Queue()
        posts = self.posts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posts.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def spans(self, path: str = "/v1/traces") -> tuple[dict[str, Any], list[Any]]:
        """The next post's resource and spans."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        posted_to, body = self.posts.get(timeout=30)
        assert posted_to == path
        (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
        (scope,) = resource.scope_spans
        return attributes_of(resource.resource), list(scope.spans)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attributes_of(thing: Any) -> dict[str, Any]:
    found = {}
    for attribute in thing.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def sequence() -> RequestMetrics:
    request = Metrics(ServiceConfig.create(env={}), "tiny").request(10, 1.0, max_tokens=16)
    request.queued_at = 1.0
    request.first(2.0, 1.25, 1, 4)
    request.tokens(4.0, 2)
    request.finish(4.5, "stop")
    return request


def make(endpoint: str | None, **env: str) -> Tracing | None:
    return Tracing.create(ServiceConfig.create(env={}, otlp_traces_endpoint=endpoint), env)


async def test_a_request_is_one_span_with_vllms_attributes(collector: Collector) -> None:
    tracing = make(f"{collector.url}/v1/traces")
    assert tracing is not None
    sampling = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=16)
    arrived = time.monotonic() - 3.5
    tracing.record([], "abc", "tiny", arrived, [sequence()], sampling)
    await tracing.close()
    resource, (span,) = collector.spans()
    assert resource["service.name"] == os.environ.get("OTEL_SERVICE_NAME", "nanovllm")
    assert span.name == "llm_request" and span.kind == span.SPAN_KIND_SERVER and not span.parent_span_id
    found = attributes_of(span)
    assert found.pop("gen_ai.latency.e2e") == pytest.approx(3.5, abs=1)
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(3.5, abs=1)
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 60
    assert found == {
        "gen_ai.request.id": "abc",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": 10,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.latency.time_to_first_token": 1.0,
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.75,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 2.75,
    }


async def test_the_clients_span_is_the_parent(collector: Collector) -> None:
    tracing = make(f"{collector.url}/v1/traces")
    assert tracing is not None
    headers = [(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode()), (b"tracestate", b"vendor=1")]
    tracing.record(headers, "abc", "tiny", time.monotonic(), [sequence()])
    tracing.record([(b"traceparent", b"garbage\xff")], "def", "tiny", time.monotonic(), [sequence()])
    await tracing.close()
    _, (span, orphan) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert span.trace_state == "vendor=1"
    assert orphan.trace_id and not orphan.parent_span_id


async def test_what_the_client_does_not_sample_is_not_sent(collector: Collector) -> None:
    tracing = make(f"{collector.url}/v1/traces")
    assert tracing is not None
    headers = [(b"traceparent", f"00-{TRACE}-{SPAN}-00".encode())]
    tracing.record(headers, "quiet", "tiny", time.monotonic(), [sequence()])
    tracing.record([], "loud", "tiny", time.monotonic(), [sequence()])
    await tracing.close()
    _, spans = collector.spans()
    assert [attributes_of(span)["gen_ai.request.id"] for span in spans] == ["loud"]


async def test_a_failure_is_told(collector: Collector) -> None:
    tracing = make(f"{collector.url}/v1/traces")
    assert tracing is not None
    tracing.record([], "abc", "tiny", time.monotonic(), [], error="engine_dead")
    await tracing.close()
    _, (span,) = collector.spans()
    assert span.status.code == span.status.STATUS_CODE_ERROR
    found = attributes_of(span)
    assert found["error.type"] == "engine_dead" and "gen_ai.latency.time_to_first_token" not in found


async def test_the_standard_variable_alone_turns_traces_on(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    tracing = Tracing.create(ServiceConfig.create(env={}))
    assert tracing is not None
    tracing.record([], "abc", "tiny", time.monotonic(), [sequence()])
    await tracing.close()
    resource, spans = collector.spans("/v1/traces")
    assert resource["service.name"] == "chat" and len(spans) == 1


async def test_closing_does_not_wait_for_a_collector_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_TIMEOUT", 0.05)
    tracing = make("http://127.0.0.1:1/v1/traces")
    assert tracing is not None
    released = threading.Event()
    monkeypatch.setattr(tracing._provider, "shutdown", lambda: released.wait(30))
    await tracing.close()  # would last half a minute
    released.set()


@pytest.mark.parametrize(
    "env", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h", "OTEL_SDK_DISABLED": "true"}], ids=["unset", "disabled"]
)
def test_without_an_endpoint_there_is_no_tracing(env: dict[str, str]) -> None:
    assert make(None, **env) is None


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys; from nanovllm_bento.config import ServiceConfig; from nanovllm_bento.serving import telemetry\n"
        "assert telemetry.Tracing.create(ServiceConfig.create(env={}), {}) is None\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_protocol_that_cannot_be_spoken_is_an_error_only_where_we_were_asked_for_traces() -> None:
    for protocol in ("grpc", "carrier-pigeon"):
        if protocol == "grpc" and _has_grpc():
            continue
        with pytest.raises(ConfigError, match=protocol):
            make("http://h", OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
        assert make(None, OTEL_EXPORTER_OTLP_ENDPOINT="http://h", OTEL_EXPORTER_OTLP_PROTOCOL=protocol) is None


def _has_grpc() -> bool:
    try:
        import opentelemetry.exporter.otlp.proto.grpc  # noqa: F401
    except ImportError:
        return False
    return True
