"""The openai client against the real server and the demo model."""

import asyncio

import openai
import pytest

from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FRANCE = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def test_nothing_says_ready_before_the_engine_is(server: Server) -> None:
    *starting, (ready, health) = server.statuses
    assert ready == 200 and health in (200, 503)  # it may have become ready between the two
    assert {status for status, _ in starting} <= {503} and {status for _, status in starting} <= {503}


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_sensible_english(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=FRANCE, max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)


def test_a_chat_is_sensible_english(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_completion_tokens=40, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content is not None
    assert "Paris" in choice.message.content and "<|im_end|>" not in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options = {"model": "demo", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_seed_repeats_itself_and_another_does_not(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        options = {"max_tokens": 24, "temperature": 1.0, "seed": seed}
        return client.completions.create(model="demo", prompt="Once upon a time", **options).choices[0].text

    assert sample(7) == sample(7) != sample(8)


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    options = {"prompt": "Count: 1, 2, 3,", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(model="demo", **options).choices[0].text
    stop = free[9:12]
    choice = client.completions.create(model="demo", **options, stop=[stop]).choices[0]
    assert choice.text == free[: free.index(stop)] and choice.finish_reason == "stop"
    pieces = client.completions.create(model="demo", **options, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text


def test_prompts_and_choices(client: openai.OpenAI) -> None:
    prompts = [FRANCE, "The capital of Italy is"]
    answer = client.completions.create(model="demo", prompt=prompts, n=2, max_tokens=4, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3] and "Paris" in texts[0] and "Rome" in texts[2]


def test_characters_beyond_ascii_come_whole(client: openai.OpenAI) -> None:
    options = {
        "model": "demo",
        "prompt": "中文：你好。日本語：こんにちは。Emoji: 😀 🚀 👩‍🔬",
        "max_tokens": 48,
        "seed": 1,
    }
    whole = client.completions.create(**options).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces[:-1]) or "\ufffd" in whole


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": ""},
        {"max_tokens": 0},
        {"temperature": -1},
        {"prompt": [10**6]},
        {"prompt": "word " * 9000},
        {"logit_bias": {"5": 1}},
        {"extra_body": {"no_such_field": 1}},
    ],
)
def test_bad_requests_are_told_why(client: openai.OpenAI, bad: dict) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "demo", "prompt": "a", **bad})
    assert caught.value.param and caught.value.body


async def test_bad_requests_do_not_disturb_a_good_one(async_client: openai.AsyncOpenAI) -> None:
    create = async_client.completions.create
    good = {"model": "demo", "prompt": FRANCE, "max_tokens": 60, "temperature": 0}
    alone = (await create(**good)).choices[0].text
    bad = [{"model": "demo", "prompt": "a", "temperature": -1}, {"model": "x", "prompt": "a"}]
    bad += [{"model": "demo", "prompt": [10**6]}, {"model": "demo", "prompt": "word " * 9000}]
    beside, *errors = await asyncio.gather(create(**good), *(create(**b) for b in bad * 3), return_exceptions=True)
    assert all(isinstance(error, openai.APIStatusError) and error.status_code in (400, 404) for error in errors)
    assert not isinstance(beside, BaseException) and beside.choices[0].text == alone


async def test_many_streams_at_once(async_client: openai.AsyncOpenAI) -> None:
    async def read(i: int) -> str:
        prompt = f"The number {i} is"
        chunks = await async_client.completions.create(
            model="demo", prompt=prompt, max_tokens=16, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    texts = await asyncio.gather(*(read(i % 4) for i in range(16)))
    assert texts[:4] * 4 == texts and all(texts)
