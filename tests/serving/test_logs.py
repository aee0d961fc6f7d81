"""Request ids are the client's where they are sane, and the access log says how a request went without its prompt."""

import io
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.log_format import PACKAGE, set_up
from nanovllm_bento.serving.logs import AccessLog, request_id_of
from nanovllm_bento.serving.metrics import Metrics, RequestMetrics

SECRET = "the prompt that nobody may read"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    ours = logging.getLogger(PACKAGE)
    before = ours.handlers, ours.propagate, ours.level
    try:
        yield io.StringIO()
    finally:
        logging.captureWarnings(False)
        ours.handlers, ours.propagate, ours.level = before


def sequences(n: int, reason: str = "stop") -> list[RequestMetrics]:
    """n choices of one prompt of 10 tokens, 4 of them cached; 3 tokens each; the last begun never came to a token."""
    metrics = Metrics(ServiceConfig.create(env={}), "tiny")
    found = []
    for i in range(n):
        request = metrics.request(10, 1.0, n=0 if i else n)
        request.queued_at = 1.0
        request.first(2.0 + i, 1.25, 1, 4)
        request.tokens(3.0 + i, 2)
        request.finish(3.0 + i, reason)
        found.append(request)
    return found


def write(stream: io.StringIO, log_format: Any = "json", **settings: Any) -> str:
    set_up(log_format, "worker", stream=stream)
    log = AccessLog.create(ServiceConfig.create(env={}, access_log=True, **settings))
    assert log is not None
    arrived = time.monotonic()
    log.write("abc", "/v1/completions", 200, arrived, sequences(2), caller="team", prompt=SECRET)
    return stream.getvalue()


@pytest.mark.parametrize("value", ["abc", "req-1.2_3:4/5@6+7=", "x" * 128, "3f2b8c1e-0000-4000-8000-000000000000"])
def test_a_sane_request_id_is_taken(value: str) -> None:
    assert request_id_of([(b"host", b"h"), (b"x-request-id", value.encode())]) == value


@pytest.mark.parametrize(
    "value",
    [b"", b"x" * 129, b"a b", b"a\nb", b"a\r\nX-Evil: 1", b'a"b', b"a{b", "é".encode(), b"\xff", b"a\x00", b"a\n"],
)
def test_one_that_could_forge_a_line_is_replaced(value: bytes) -> None:
    given, other = (request_id_of([(b"x-request-id", value)]) for _ in range(2))
    assert given != other and len(given) == 32 and given.isalnum()


def test_without_one_it_is_new_each_time() -> None:
    assert request_id_of([]) != request_id_of([])


def test_the_access_log_is_off_unless_asked_for() -> None:
    assert AccessLog.create(ServiceConfig.create(env={})) is None
    assert AccessLog.create(ServiceConfig.create(env={}, log_prompts=True)) is None


def test_a_finished_request_is_one_json_line(stream: io.StringIO) -> None:
    (line,) = map(json.loads, write(stream).splitlines())
    assert line.pop("seconds") >= 0
    assert {key: line[key] for key in line if key not in ("time", "pid", "level", "process")} == {
        "logger": "nanovllm_bento.access",
        "message": "request",
        "request_id": "abc",
        "path": "/v1/completions",
        "status": 200,
        "caller": "team",
        "finish_reason": "stop,stop",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 6,
        "queue_seconds": 0.25,
        "ttft_seconds": 1.0,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_prompt_is_not_logged_unless_asked_for(log_format: str) -> None:
    assert SECRET not in write(io.StringIO(), log_format)
    assert SECRET in write(io.StringIO(), log_format, log_prompts=True)


def test_a_refused_request_has_its_error_and_no_counts(stream: io.StringIO) -> None:
    set_up("json", "worker", stream=stream)
    AccessLog().write("abc", "/v1/completions", 429, time.monotonic(), error="rate_limit_exceeded")
    line = json.loads(stream.getvalue())
    assert (line["status"], line["error"]) == (429, "rate_limit_exceeded")
    assert "prompt_tokens" not in line and "ttft_seconds" not in line


def test_a_request_that_ended_before_its_first_token_has_no_times(stream: io.StringIO) -> None:
    set_up("json", "worker", stream=stream)
    request = Metrics(ServiceConfig.create(env={}), "tiny").request(10, 0.0)
    request.finish(1.0, "abort")
    AccessLog().write("abc", "/v1/completions", 499, time.monotonic(), [request])
    line = json.loads(stream.getvalue())
    assert line["finish_reason"] == "abort" and line["completion_tokens"] == 0 and "ttft_seconds" not in line
