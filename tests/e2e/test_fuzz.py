"""Requests that nobody should send, and everything that the service's own OpenAPI documents allow: never a 5xx.

The long form of the first is ``python -m benchmarks.fuzz --num-requests 10000``.
"""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.fuzz import check_healthy, fuzz
from tests.e2e.observer import Observer
from tests.e2e.server import Server, serve
from tests.e2e.tiny import SETTINGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_MALFORMED = 480
MAX_EXAMPLES = 12
"""Of each operation and mode."""
OURS = ("/v1/", "/health", "/metrics")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[Server]:
    """With short limits, so that the longest valid request is soon done; nothing is left in it at the end."""
    limits = {"max_model_len": 64, "max_waiting_requests": 32}
    with serve(tiny_model, **SETTINGS | limits) as server:
        yield server
        asyncio.run(check_healthy(server.url))
        with Observer(server) as observer:
            observer.until_idle()


async def test_malformed_requests_are_refused_and_harm_nothing(server: Server) -> None:
    workers, engine = server.worker_pids, server.engine_pid
    report = await fuzz(server.url, NUM_MALFORMED, seed=1)
    assert report.num_failures == 0, report.failures[:5]
    assert sum(report.totals.values()) == NUM_MALFORMED and report.totals["400"] > NUM_MALFORMED / 3, report.totals
    await check_healthy(server.url)
    assert (server.worker_pids, server.engine_pid) == (workers, engine), "no process was replaced"


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("document", ["/openapi.json", "/docs.json"])
def test_the_service_keeps_to_its_openapi_documents(server: Server, document: str, mode: GenerationMode) -> None:
    """positive: what the document allows has one of the answers it names. negative: what it does not is refused."""
    schema = schemathesis.openapi.from_dict(httpx.get(server.url + document).json())
    names = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        names.append(operation.path)
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong
        _drive(operation, mode, server.url)
    expected = "/v1/completions" if document == "/openapi.json" else "/generate_batch"
    assert expected in names


def _drive(operation: APIOperation, mode: GenerationMode, url: str) -> None:
    ours = operation.path.startswith(OURS)
    checks = [*CHECKS, *([negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]

    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        response = case.call(base_url=url, timeout=60)
        # BentoML's own documents name few of its answers: only ours are held to theirs.
        case.validate_response(response, checks=checks if ours else [not_a_server_error])

    run()
