"""Every refusal has OpenAI's shape and names its field; nothing a client asks for is dropped in silence."""

import asyncio
import json

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.openai.protocol import ChatCompletionRequest, CompletionRequest
from tests.serving.fakes import FakeEngine, Visit, make_context

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


async def refused(http: httpx.AsyncClient, path: str, body: object, status: int = 400) -> dict:
    answer = await http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, "9", 1.5, True)],
        *[("temperature", value) for value in (-0.1, "1", [], True)],
        *[("top_p", value) for value in (0, 1.1, -1)],
        *[("top_k", value) for value in (-2, 1.5)],
        *[("min_p", value) for value in (-0.1, 1.1)],
        *[("n", value) for value in (0, -1, 129, 10**9)],
        *[("seed", value) for value in (-1, 2**64)],
        *[("stop", value) for value in (1, [1], [""], {})],
        *[("stop_token_ids", value) for value in ([258], [-1])],
        ("min_tokens", 17),
        ("stream", "yes"),
        ("priority", 2**40),
        ("stream_options", {"include_usage": True}),
        ("model", 5),
    ],
)
async def test_values_out_of_range_are_named(
    http: httpx.AsyncClient, engine: FakeEngine, field: str, value: object
) -> None:
    error = await refused(http, TEXT, {"prompt": "a", field: value})
    assert error["param"] == field and field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize(
    "field",
    [
        *[{"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}}],
        *[
            {"best_of": 2},
            {"echo": True},
            {"suffix": "x"},
            {"logprobs": 0},
            {"response_format": {"type": "json_object"}},
        ],
        *[{"prompt_logprobs": 1}, {"use_beam_search": True}, {"presence_penalty": False}],
    ],
)
async def test_unsupported_values_are_refused_by_name(http: httpx.AsyncClient, field: dict) -> None:
    error = await refused(http, TEXT, {"prompt": "a", **field})
    assert (error["param"], error["code"]) == (next(iter(field)), "unsupported_parameter")


@pytest.mark.parametrize(
    "field",
    [
        *[{"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"logprobs": True}, {"top_logprobs": 2}],
        *[{"reasoning_effort": "low"}, {"store": True}, {"modalities": ["audio"]}, {"functions": [{}]}],
    ],
)
async def test_unsupported_chat_fields_are_refused_by_name(http: httpx.AsyncClient, field: dict) -> None:
    error = await refused(http, CHAT, {"messages": USER, **field})
    assert (error["param"], error["code"]) == (next(iter(field)), "unsupported_parameter")


async def test_unknown_fields_are_refused_by_name(http: httpx.AsyncClient) -> None:
    error = await refused(http, CHAT, {"messages": USER, "temperatur": 1})
    assert (error["param"], error["code"]) == ("temperatur", "unknown_parameter")
    error = await refused(http, CHAT, {"messages": [{**USER[0], "mood": 1}]})
    assert error["param"] == "messages[0].mood"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ],
)
async def test_bad_conversations(http: httpx.AsyncClient, body: dict, param: str) -> None:
    assert (await refused(http, CHAT, body))["param"] == param


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], "", [[]], [1, "a"], [[1, "a"]], [1.5], [True], [258], [-1], [10**30], ["a", [1]], "x" * 600],
)
async def test_bad_prompts(http: httpx.AsyncClient, engine: FakeEngine, prompt: object) -> None:
    assert (await refused(http, TEXT, {"prompt": prompt}))["param"] == "prompt"
    assert not engine.requests


async def test_a_priority_needs_the_priority_policy(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(engine.info, scheduling_policy="fcfs")
    assert (await refused(http, TEXT, {"prompt": "a", "priority": 1}))["param"] == "priority"
    assert (await http.post(TEXT, json={"prompt": "a", "priority": 0})).status_code == 200


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(http: httpx.AsyncClient) -> None:
    error = await refused(http, TEXT, {"prompt": "x" * 600})
    assert error["code"] == "context_length_exceeded" and "600" in error["message"] and "512" in error["message"]


async def test_one_bad_prompt_refuses_the_request_before_anything_runs(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await refused(http, TEXT, {"prompt": ["good", "x" * 600]})
    await refused(http, TEXT, {"prompt": ["good", ""]})
    assert not engine.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b'{"prompt"'])
async def test_malformed_bodies(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post(TEXT, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


async def test_unknown_models_paths_and_methods(http: httpx.AsyncClient) -> None:
    error = await refused(http, TEXT, {"prompt": "a", "model": "gpt"}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "tiny" in error["message"]
    assert (await http.get("/v1/models/gpt")).json()["error"]["code"] == "model_not_found"
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/elsewhere", 404),
    ]:
        answer = await http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["message"]


async def test_an_engine_that_is_not_ready_is_503(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.is_ready = False
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        answer = await http.post(TEXT, json=body)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "engine_not_ready"


@pytest.mark.parametrize("streamed", [False, True])
async def test_too_many_open_requests_are_429_until_some_end(engine: FakeEngine, streamed: bool) -> None:
    engine.hold = asyncio.Event()
    context = make_context(engine, max_waiting_requests=3)
    app = create_app(context)
    running = [Visit(app, TEXT, {"prompt": "a", "stream": streamed}) for _ in range(3)]
    await engine.until(lambda: len(engine.open) == 3)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post(TEXT, json={"prompt": "a", "stream": streamed})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        await refused(http, TEXT, {"prompt": "a", "n": 4, "stream": streamed})  # would never fit
        await running[0].leave()
        engine.hold.set()
        assert (await http.post(TEXT, json={"prompt": "a", "stream": streamed})).status_code == 200
    await asyncio.gather(*(visit.task for visit in running))
    assert context.num_open == 0


async def test_an_engine_that_dies_is_500(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.dies_after = 3
    assert (await refused(http, TEXT, {"prompt": "a"}, 500))["code"] == "engine_dead"
    engine.dies_after = 0  # before the first token, so that a stream has its status too
    assert (await refused(http, TEXT, {"prompt": "a", "stream": True}, 500))["code"] == "engine_dead"


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_whose_engine_dies_says_so_and_does_not_end_as_if_done(
    http: httpx.AsyncClient, engine: FakeEngine, n: int
) -> None:
    engine.dies_after = 3
    answer = await http.post(TEXT, json={"prompt": "a", "stream": True, "n": n})
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error" and last["error"]["code"] == "engine_dead"
    assert 'finish_reason":"stop' not in answer.text


async def test_a_bug_is_500_without_its_details(http: httpx.AsyncClient, engine: FakeEngine, caplog) -> None:
    engine.submit = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign]
    error = await refused(http, TEXT, {"prompt": "a"}, 500)
    assert error["code"] == "internal_error" and "zero" not in error["message"]
    assert "ZeroDivisionError" in caplog.text


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from([*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "x"])
_bodies = st.fixed_dictionaries(
    {}, optional={"prompt": st.just("a") | _json, "messages": st.just(USER) | _json}
).flatmap(lambda base: st.dictionaries(_names, _json, max_size=3).map(lambda more: more | base))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_bodies | _json, chat=st.booleans())
def test_no_body_makes_the_server_fail(body: object, chat: bool) -> None:
    async def send() -> httpx.Response:
        app: FastAPI = create_app(make_context(FakeEngine()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.post(CHAT if chat else TEXT, content=json.dumps(body))

    answer = asyncio.run(send())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
