"""What a good request gets: text, counts and reasons, whole or streamed, in the shapes the openai client reads."""

import json

import httpx
import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import EOS, FakeEngine, byte_tokenizer, events, make_context

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def post(http: httpx.AsyncClient, path: str, **body: object) -> dict:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def stream(http: httpx.AsyncClient, path: str, **body: object) -> list[dict]:
    answer = await http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


async def test_a_chat_answers_with_the_models_own_template(
    http: httpx.AsyncClient, engine: FakeEngine, context: ServingContext
) -> None:
    body = await post(http, "/v1/chat/completions", **CHAT)
    answer = ChatCompletion.model_validate(body, strict=True)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    ((prompt, sampling),) = engine.requests.values()
    assert context.text.tokenizer.decode(prompt, skip_special_tokens=False) == PROMPT
    assert sampling.max_tokens == 512 - len(prompt) and sampling.seed is not None and sampling.temperature == 1.0
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len("Hello, world!") + 1  # with the end-of-turn token
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, "/v1/chat/completions", **CHAT)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hello, world!"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_include_usage_adds_one_chunk_with_the_counts(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    chunks = await stream(http, "/v1/completions", prompt="abc", max_tokens=5, stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 5, 8)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_a_completion_has_16_tokens_unless_asked_otherwise(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.endless = True
    body = await post(http, "/v1/completions", prompt="abc")
    OpenAICompletion.model_validate(body, strict=True)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16
    body = await post(http, "/v1/completions", prompt="abc", max_tokens=None)
    assert body["usage"]["total_tokens"] == 512


async def test_several_prompts_and_choices_run_side_by_side(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await post(http, "/v1/completions", prompt=["ab", "abcd", "a"], n=2, seed=2**64 - 1, max_tokens=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert body["usage"]["prompt_tokens"] == 7 and body["usage"]["completion_tokens"] == 18
    assert engine.most_open == 6
    assert [(len(prompt), sampling.seed) for prompt, sampling in engine.requests.values()] == [
        (length, seed) for length in (2, 4, 1) for seed in (2**64 - 1, 0)
    ]
    chunks = await stream(http, "/v1/completions", prompt=[[1, 2], [3]], n=2)
    assert [text_of(chunks, index) for index in range(4)] == ["Hello, world!"] * 4


async def test_choices_without_a_seed_differ_in_their_seeds(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await post(http, "/v1/completions", prompt="a", n=4)
    assert len({sampling.seed for _, sampling in engine.requests.values()}) == 4


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 20])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_is_never_sent_even_if_it_spans_tokens(
    http: httpx.AsyncClient, engine: FakeEngine, tokens_per_step: int, streamed: bool
) -> None:
    engine.tokens_per_step, engine.endless = tokens_per_step, True
    options = {"prompt": "a", "stop": ["x", ", wo"], "max_tokens": 100}
    if streamed:
        chunks = await stream(http, "/v1/completions", **options, stream_options={"include_usage": True})
        text, end, usage = text_of(chunks), chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        body = await post(http, "/v1/completions", **options)
        text, end, usage = body["choices"][0]["text"], body["choices"][0], body["usage"]
    assert text == "Hello"
    assert end["finish_reason"] == "stop" and end["stop_reason"] == ", wo"
    assert usage["completion_tokens"] == len("Hello, wo")
    assert engine.aborted == list(engine.requests)


async def test_the_start_of_a_stop_string_is_sent_once_it_is_none(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, "/v1/completions", prompt="a", stop="world?", max_tokens=100)
    assert text_of(chunks) == "Hello, world!"


async def test_a_stop_token_ends_the_text_and_is_no_part_of_it(http: httpx.AsyncClient) -> None:
    body = await post(http, "/v1/completions", prompt="a", stop_token_ids=[ord(",")])
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello", "stop", ord(","))
    assert body["usage"]["completion_tokens"] == len("Hello,")


async def test_min_tokens_holds_for_stop_strings(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.endless = True
    body = await post(http, "/v1/completions", prompt="a", stop=["l"], min_tokens=4, max_tokens=50)
    assert body["choices"][0]["text"] == "Hello, wor"


async def test_half_a_character_is_never_sent(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "né 漢字 👩\u200d🚀\u2028!"
    chunks = await stream(http, "/v1/completions", prompt="a", max_tokens=100)
    assert all("\ufffd" not in text_of([chunk]) for chunk in chunks)
    assert text_of(chunks) == engine.reply
    engine.reply = list("é".encode())[:1]
    body = await post(http, "/v1/completions", prompt="a")
    assert body["choices"][0]["text"] == "\ufffd"


async def test_line_separators_do_not_split_an_event(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "a\u2028b\x85c\nd\x1c"
    answer = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert text_of(lines) == engine.reply


async def test_stream_interval_joins_steps_but_not_the_first_and_the_last(engine: FakeEngine) -> None:
    engine.reply = "0123456789"
    app = create_app(make_context(engine, stream_interval=4))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        chunks = await stream(http, "/v1/completions", prompt="a")
        assert [text_of([chunk]) for chunk in chunks] == ["0", "1234", "5678", "9"]
        chunks = await stream(http, "/v1/completions", prompt="a", stop=["7"])
        assert [text_of([chunk]) for chunk in chunks] == ["0", "1234", "56"]


async def test_defaults_come_from_the_models_generation_config(engine: FakeEngine) -> None:
    app = create_app(make_context(engine, defaults={"temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        await post(http, "/v1/chat/completions", **CHAT, top_p=0.5)
        await post(http, "/v1/chat/completions", **CHAT, temperature=0, top_k=-1)
    first, second = (sampling for _, sampling in engine.requests.values())
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.5, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.95, 0)


async def test_every_supported_field_reaches_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "min_tokens": 2}
    more = {"ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [9], "stop": "zz"}
    extra = {"cache_salt": "me", "priority": -3, "user": "u", "safety_identifier": "s"}
    await post(http, "/v1/completions", prompt="a", max_tokens=9, **fields, **more, **extra)
    ((_, sampling),) = engine.requests.values()
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.ignore_eos and not sampling.skip_special_tokens
    assert sampling.stop_token_ids == [9] and sampling.stop == ["zz"] and sampling.max_tokens == 9
    assert list(engine.options.values()) == [("me", -3)]


async def test_values_that_change_nothing_are_accepted(http: httpx.AsyncClient) -> None:
    zero = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "best_of": 1}
    common = {**zero, "response_format": {"type": "text"}, "n": None, "stream": None, "logprobs": None}
    chat = {
        "logprobs": False,
        "tools": [],
        "tool_choice": "auto",
        "modalities": ["text"],
        "metadata": {},
        "store": False,
    }
    await post(http, "/v1/completions", prompt="a", suffix=None, echo=False, **common)
    await post(http, "/v1/chat/completions", **CHAT, **{**common, **chat})


async def test_the_template_gets_its_variables(
    http: httpx.AsyncClient, context: ServingContext, engine: FakeEngine
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    await post(http, "/v1/chat/completions", messages=messages, chat_template_kwargs={"thinking": True})
    await post(http, "/v1/chat/completions", messages=messages, add_generation_prompt=False)
    prompts = [context.text.tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in engine.requests.values()]
    assert prompts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")
    assert prompts[0].endswith("<|im_start|>assistant\n<think>")
    assert prompts[1].endswith("<|im_start|>tool\nd<|im_end|>\n")


async def test_a_long_prompt_is_tokenized_as_a_short_one_is(engine: FakeEngine) -> None:
    engine.make_room()
    app = create_app(make_context(engine))
    text = "lang " * 4000
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        await post(http, "/v1/completions", prompt=text)
        await post(http, "/v1/chat/completions", messages=[{"role": "user", "content": text}])
    encode = byte_tokenizer().encode
    completion, chat = (ids for ids, _ in engine.requests.values())
    assert completion == list(text.encode())
    assert chat == encode(PROMPT.replace("Hi", text))


async def test_the_end_of_turn_token_is_no_text_even_if_special_tokens_are_shown(http: httpx.AsyncClient) -> None:
    body = await post(http, "/v1/completions", prompt="a", skip_special_tokens=False)
    assert body["choices"][0]["text"] == "Hello, world!"
    assert EOS == 257 and body["usage"]["completion_tokens"] == 14


async def test_models_and_health(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    (card,) = (await http.get("/v1/models")).json()["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == 512
    assert (await http.get("/v1/models/tiny")).json() == card
    assert (await http.get("/health")).status_code == 200
    engine.is_ready = False
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_the_openapi_document_describes_the_bodies(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schemas = document["components"]["schemas"]
    body = schemas[reference.rsplit("/", 1)[1]]
    assert body["required"] == ["messages"] and "temperature" in body["properties"]
    assert "ChatCompletion" in schemas and "ErrorAnswer" in schemas
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas, name
