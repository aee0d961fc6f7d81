"""generate_batch, BentoML's adaptive batching, through BentoML's own clients."""

import asyncio

import bentoml
import httpx
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 6}
ITEMS = [
    {"prompt": "The capital of France is", "sampling": GREEDY},
    {"prompt": "", "sampling": GREEDY},
    {"prompt": "The capital of Italy is", "sampling": {**GREEDY, "stop": ["."]}},
    {"prompt": "x", "sampling": {"temperature": -1}},
]


def test_sync_client(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url) as client:
        france, empty, italy, cold = client.generate_batch(requests=ITEMS)
    assert "Paris" in france["text"] and france["error"] is None and len(france["token_ids"]) == 6
    assert italy["text"].strip().startswith("Rome") and "." not in italy["text"]
    assert empty["error"]["param"] == "prompt" and cold["error"]["param"] == "temperature"


async def test_async_client_calls_share_batches(server: Server) -> None:
    async with bentoml.AsyncHTTPClient(server.url) as client:
        answers = await asyncio.gather(*(client.generate_batch(requests=[item]) for item in ITEMS * 3))
    results = [result for (result,) in answers]
    assert [result["error"] is None for result in results] == [True, False, True, False] * 3
    assert len({result["text"] for result in results[::4]}) == 1 and "Paris" in results[0]["text"]


def test_more_items_than_a_batch_holds(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url, timeout=300) as client:
        results = client.generate_batch(requests=[{"prompt": "a", "sampling": {"max_tokens": 1}}] * 70)
    assert len(results) == 70 and all(result["error"] is None for result in results)


def test_the_service_has_bentomls_own_routes_beside_ours(server: Server) -> None:
    for path in ("/livez", "/readyz", "/docs.json", "/schema.json", "/docs", "/openapi.json", "/", "/health"):
        assert httpx.get(server.url + path).status_code == 200, path
    answer = httpx.get(server.url + "/v1/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    answer = httpx.get(server.url + "/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "method_not_allowed"
