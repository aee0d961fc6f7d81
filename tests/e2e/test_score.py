"""score, and many callers of both batched methods at once, through BentoML's own clients."""

import asyncio
import math
from collections import Counter

import bentoml
import httpx
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FRANCE = "The capital of France is"
ITEMS = [{"context": FRANCE, "continuation": city} for city in (" Paris", " London", " bread")]


def test_sync_client(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url) as client:
        results = client.score(requests=[*ITEMS, {"context": FRANCE}])
    paris, london, bread, bad = results
    assert paris["sum_logprob"] > london["sum_logprob"] > bread["sum_logprob"]
    assert all(paris["is_greedy"]) and not all(bread["is_greedy"])
    for result in (paris, london, bread):
        assert result["error"] is None and len(result["logprobs"]) == len(result["token_ids"]) > 0
        assert result["sum_logprob"] == pytest.approx(math.fsum(result["logprobs"]))
    assert bad["error"]["param"] == "continuation"


def test_the_scores_of_a_greedy_continuation_are_greedy(server: Server) -> None:
    """As text, and as the very token ids that generate_batch gave."""
    with bentoml.SyncHTTPClient(server.url) as client:
        (made,) = client.generate_batch(requests=[{"prompt": FRANCE, "sampling": {"temperature": 0, "max_tokens": 8}}])
        by_text, by_ids = client.score(
            requests=[
                {"context": FRANCE, "continuation": made["text"]},
                {"context": FRANCE, "continuation_token_ids": made["token_ids"]},
            ]
        )
    assert by_ids["token_ids"] == made["token_ids"] and all(by_ids["is_greedy"])
    assert by_text["sum_logprob"] == pytest.approx(by_ids["sum_logprob"], abs=0.05)


async def test_async_clients_share_batches_and_get_the_same_scores(server: Server) -> None:
    async with bentoml.AsyncHTTPClient(server.url) as client:
        answers = await asyncio.gather(*(client.score(requests=[item]) for item in ITEMS * 8))
    sums = [result["sum_logprob"] for (result,) in answers]
    for i, value in enumerate(sums):
        assert value == pytest.approx(sums[i % 3], abs=0.05)  # bfloat16, in batches of different sizes


async def test_short_and_long_items_of_many_callers_are_all_served(server: Server) -> None:
    """None is shed (503), whatever the dispatcher expects after long batches."""
    statuses: Counter[int] = Counter()

    async def call(i: int) -> None:
        sampling = {"max_tokens": 24 if i % 10 == 0 else 1, "ignore_eos": True}
        body: dict = {"requests": [{"prompt_token_ids": [300 + i], "sampling": sampling}]}
        path = "/generate_batch"
        if i % 3 == 0:
            path = "/score"
            length = 200 if i % 9 == 0 else 4
            body = {"requests": [{"context_token_ids": [300 + i] * length, "continuation_token_ids": [400, 401]}]}
        answer = await client.post(path, json=body)
        statuses[answer.status_code] += 1
        assert answer.json()[0]["error"] is None

    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        for i in range(12):  # the dispatcher learns what a batch takes from its first ones, one by one
            await call(i)
        await asyncio.gather(*(call(i) for i in range(48)))
    assert statuses == {200: 60}


def test_a_call_with_too_many_items_is_refused(server: Server) -> None:
    answer = httpx.post(server.url + "/score", json={"requests": [ITEMS[0]] * 257})
    assert answer.status_code == 400 and "256" in answer.text
    answer = httpx.post(server.url + "/score", json={"requests": [{**ITEMS[0], "mood": 1}]})
    assert answer.status_code == 400 and "mood" in answer.text


def test_both_methods_are_in_the_api_document(server: Server) -> None:
    paths = httpx.get(server.url + "/docs.json").json()["paths"]
    assert {"/score", "/generate_batch"} <= paths.keys()
