"""A deadline also holds where the engine does not see the request: in the queue of callers that wait for their turn."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm_bento.serving.admission import Admission
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.middleware import protect
from tests.serving.fakes import FakeEngine, make_context

PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "Hi", "n": 2}
KEY = "alice-secret"


@pytest.fixture
def context(engine: FakeEngine) -> ServingContext:
    context = make_context(engine, api_keys=f"alice:{KEY}")
    context.admission = Admission(context.config, max_num_seqs=1)
    return context


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waits_for_its_turn_ends_at_its_deadline(
    engine: FakeEngine, context: ServingContext, stream: bool
) -> None:
    engine.hold = asyncio.Event()
    transport = httpx.ASGITransport(protect(create_app(context), context.config))
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        running = asyncio.create_task(http.post(PATH, json=BODY))
        await engine.until(lambda: len(engine.open) == 2)
        began = time.monotonic()
        late = asyncio.create_task(http.post(PATH, json={**BODY, "deadline_ms": 100, "stream": stream}))
        patient = asyncio.create_task(http.post(PATH, json={**BODY, "deadline_ms": 60_000}))
        async with asyncio.timeout(5):
            answer = await late
        assert time.monotonic() - began >= 0.1
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        queue = context.admission.queue
        assert queue is not None and queue.num_held == 2, "only the patient one still waits"
        engine.hold.set()
        assert {(await running).status_code, (await patient).status_code} == {200}
    assert len(engine.requests) == 4, "the late one never reached the engine"
    assert context.num_open == queue.num_inside == queue.num_held == 0
    families = text_string_to_metric_families(context.render_metrics().decode())
    samples = [sample for family in families for sample in family.samples]
    (counted,) = (s.value for s in samples if s.name == "nanovllm:num_deadlines_exceeded_total")
    (ended,) = (s.value for s in samples if s.labels.get("finished_reason") == "error")
    assert (counted, ended) == (1.0, 2.0)
