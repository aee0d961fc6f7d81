"""Every route is told of: its refusals in the metrics, each request in the access log, what was generated in a trace.

Over a real BentoML application, put together as service.py does it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import bentoml
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.batch import (
    BatchGate,
    BatchItem,
    BatchResult,
    ScoreItem,
    ScoreResult,
    run_batch,
    run_scores,
)
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.front import Front
from nanovllm_bento.serving.middleware import middlewares
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints
from tests.serving.fakes import FakeEngine, Visit, make_context

KEY = {"Authorization": "Bearer alice-key-1234567"}
COMPLETIONS = "/v1/completions"
INSTRUMENTS: dict[str, Any] = {
    "metrics": {"enabled": False},
    "logging": {"access": {"enabled": False}},
    "tracing": {"excluded_urls": ".*"},
}


class Recorder:
    """Stands for the access log's logger and for the tracer."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.spans: list[dict[str, Any]] = []

    def record(
        self, headers: Any, request_id: str, model: str, arrived: float, sequences: Any, *rest: Any, **more: Any
    ):
        self.spans.append({"request_id": request_id, "tokens": sum(s.num_tokens for s in sequences), **more})

    async def close(self) -> None:
        pass


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    logger = logging.getLogger("nanovllm_bento.access")
    monkeypatch.setattr(logger, "info", lambda _, extra: recorder.lines.append(extra["fields"]))
    return recorder


@pytest.fixture
def context(engine: FakeEngine, recorder: Recorder) -> ServingContext:
    keys = "alice:alice-key-1234567"
    context = make_context(engine, api_keys=keys, access_log=True, log_prompts=True, max_body_bytes=10_000)
    context.tracing = recorder  # type: ignore[assignment]
    return context


@pytest.fixture(params=[True, False], ids=["in front", "among BentoML's layers"])
async def outer(context: ServingContext, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    endpoints = OpenAIEndpoints(context)

    @bentoml.service(name="observed", **INSTRUMENTS)
    @bentoml.asgi_app(create_app(context, endpoints), path="/")
    class Observed:
        @bentoml.api(batchable=True, batch_dim=0, max_batch_size=8, max_latency_ms=60_000)
        async def generate_batch(self, requests: list[BatchItem]) -> list[BatchResult]:
            return await run_batch(context, requests)

        @bentoml.api(batchable=True, batch_dim=0, max_batch_size=8, max_latency_ms=60_000)
        async def score(self, requests: list[ScoreItem]) -> list[ScoreResult]:
            return await run_scores(context, requests)

    guards = middlewares(context.config, context.refused)
    Observed.add_asgi_middleware(Front, endpoints=endpoints, guards=guards, in_front=request.param)
    Observed.add_asgi_middleware(BatchGate, max_calls=2)
    app = Observed.to_asgi(is_main=True)
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    lifespan = asyncio.create_task(app({"type": "lifespan"}, inbox.get, outbox.put))
    inbox.put_nowait({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    yield app
    inbox.put_nowait({"type": "lifespan.shutdown"})
    await lifespan


@pytest.fixture
async def http(outer: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(outer, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def refusals(context: ServingContext) -> dict[str, float]:
    families = text_string_to_metric_families(context.render_metrics().decode())
    samples = [sample for family in families for sample in family.samples]
    counts = {s.labels["status"]: s.value for s in samples if s.name == "nanovllm:requests_refused_total"}
    return {status: count for status, count in counts.items() if count}


async def test_every_refusal_is_counted_once_and_logged_with_its_id(
    http: httpx.AsyncClient, context: ServingContext, engine: FakeEngine, recorder: Recorder
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 5_000

    asked = [
        (401, "POST", COMPLETIONS, {"json": {"prompt": "a"}}),
        (403, "POST", COMPLETIONS, {"json": {"prompt": "a"}, "headers": KEY | {"Origin": "https://evil.example"}}),
        (404, "GET", "/v1/nothing", {"headers": KEY}),
        (404, "POST", COMPLETIONS, {"json": {"prompt": "a", "model": "other"}, "headers": KEY}),
        (405, "GET", COMPLETIONS, {"headers": KEY}),
        (413, "POST", COMPLETIONS, {"content": b"x" * 10_001, "headers": KEY}),
        (413, "POST", COMPLETIONS, {"content": chunks(), "headers": KEY}),
        (413, "POST", "/score", {"content": chunks(), "headers": KEY}),
        (400, "POST", "/score", {"json": {"requests": 1}, "headers": KEY}),
        (400, "POST", COMPLETIONS, {"json": {}, "headers": KEY}),
    ]
    for i, (status, method, path, options) in enumerate(asked):
        options["headers"] = options.get("headers", {}) | {"X-Request-ID": f"id-{i}"}  # type: ignore[operator]
        answer = await http.request(method, path, **options)  # type: ignore[arg-type]
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["x-request-id"] == f"id-{i}"
    assert [(line["request_id"], line["path"], line["status"]) for line in recorder.lines] == [
        (f"id-{i}", path, status) for i, (status, _, path, _) in enumerate(asked)
    ]
    assert refusals(context) == {"400": 2, "401": 1, "403": 1, "404": 2, "405": 1, "413": 3}

    engine.is_ready = False
    for path in ("/health", "/metrics"):
        await http.get(path, headers=KEY)
    assert len(recorder.lines) == len(asked), "what watches the service is not told of"
    assert "503" not in refusals(context)


async def test_a_batched_call_is_told_of_with_what_ran_for_it(http: httpx.AsyncClient, recorder: Recorder) -> None:
    items = [{"prompt": "ab", "sampling": {"max_tokens": 3}}, {"prompt_token_ids": [7], "sampling": {"max_tokens": 2}}]
    first = http.post("/generate_batch", json={"requests": items}, headers=KEY | {"X-Request-ID": "first"})
    second = http.post("/generate_batch", json={"requests": items[:1]}, headers=KEY | {"X-Request-ID": "second"})
    answers = await asyncio.gather(first, second)
    assert [answer.status_code for answer in answers] == [200, 200]
    pair = {"context": "ab", "continuation": "c"}
    await http.post("/score", json={"requests": [pair]}, headers=KEY | {"X-Request-ID": "third"})

    lines = {line["request_id"]: line for line in recorder.lines}
    assert [lines[name]["path"] for name in ("first", "second", "third")] == ["/generate_batch"] * 2 + ["/score"]
    assert {line["caller"] for line in recorder.lines} == {"alice"}
    assert [lines[name]["completion_tokens"] for name in ("first", "second", "third")] == [5, 3, 0]
    assert [lines[name]["prompt_tokens"] for name in ("first", "second", "third")] == [3, 2, 3]
    assert [lines[name]["prompt"] for name in ("first", "second", "third")] == [["ab", [7]], ["ab"], [["ab", "c"]]]
    assert {span["request_id"]: span["tokens"] for span in recorder.spans} == {"first": 5, "second": 3, "third": 0}


async def test_calls_beyond_the_bound_are_counted(
    http: httpx.AsyncClient, context: ServingContext, engine: FakeEngine, recorder: Recorder
) -> None:
    engine.hold = asyncio.Event()
    calls = [
        asyncio.create_task(http.post("/generate_batch", json={"requests": [{"prompt": "a"}]}, headers=KEY))
        for _ in range(3)
    ]
    done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert [call.result().status_code for call in done] == [429]
    engine.hold.set()
    assert [call.result().status_code for call in (await asyncio.wait(waiting))[0]] == [200, 200]
    assert refusals(context) == {"429": 1}
    assert sorted(line["status"] for line in recorder.lines) == [200, 200, 429]


async def test_a_client_that_leaves_a_batch_frees_what_is_its_own(
    outer: Any, context: ServingContext, engine: FakeEngine, recorder: Recorder
) -> None:
    engine.hold = asyncio.Event()
    item = {"prompt": "ab", "sampling": {"max_tokens": 3}}
    pair = {"context": "ab", "continuation": "c"}
    leaver = Visit(outer, "/generate_batch", {"requests": [item, item]}, KEY)
    scorer = Visit(outer, "/score", {"requests": [pair]}, KEY)
    await engine.until(lambda: len(engine.open) == 3)
    stayer = Visit(outer, "/generate_batch", {"requests": [item]}, KEY)  # behind the batch that runs
    leaver.disconnect()
    scorer.disconnect()
    await engine.until(lambda: len(engine.aborted) == 3)
    await engine.until(lambda: len(engine.open) == 1)
    engine.hold.set()
    async with asyncio.timeout(5):
        await asyncio.gather(leaver.task, scorer.task, stayer.task)
    assert stayer.status == 200 and [result["text"] for result in json.loads(stayer.body)] == ["Hel"]
    assert not engine.open and context.num_open == 0
    ended = {line["path"]: line["finish_reason"] for line in recorder.lines if "abort" in line["finish_reason"]}
    assert ended == {"/generate_batch": "abort,abort", "/score": "abort"}


async def test_what_a_client_left_in_the_queue_never_runs(outer: Any, engine: FakeEngine) -> None:
    engine.hold = asyncio.Event()
    item = {"prompt": "ab", "sampling": {"max_tokens": 3}}
    running = Visit(outer, "/generate_batch", {"requests": [item]}, KEY)
    await engine.until(lambda: len(engine.open) == 1)
    queued = Visit(outer, "/generate_batch", {"requests": [item] * 3}, KEY)
    for _ in range(20):
        await asyncio.sleep(0)
    queued.disconnect()
    for _ in range(20):
        await asyncio.sleep(0)
    engine.hold.set()
    async with asyncio.timeout(5):
        await asyncio.gather(running.task, queued.task)
    assert len(engine.requests) == 1 and running.status == 200
