"""The load generator reads answers right, however the bytes come, and knows which chunk carries a token."""

import json
from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_bento.bench.serve_client import settle
from nanovllm_bento.bench.serve_http import Answer, AnswerReader, EventReader, ProtocolError
from nanovllm_bento.bench.serve_messages import Record

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


USAGE = event(
    choices=[], usage={"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
)
DONE = b"data: [DONE]\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def read(*pieces: bytes, answer: Answer | None = None) -> tuple[Answer, AnswerReader, bool]:
    """Feed pieces at seconds 1, 2, 3, …"""
    answer = answer or Answer(keep_text=True)
    reader = AnswerReader(answer)
    complete = False
    for now, piece in enumerate(pieces, 1):
        complete = reader.feed(piece, float(now))
    return answer, reader, complete


WHOLE = HEAD + chunked(text("a"), text("é b"), text("c", "length") + USAGE + DONE)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_an_answer_is_the_same_however_its_bytes_are_cut(cuts: list[int]) -> None:
    places = sorted({0, len(WHOLE), *cuts})
    answer, reader, complete = read(*(WHOLE[a:b] for a, b in pairwise(places)))
    assert complete and reader.keep_alive and answer.done
    assert "".join(answer.text) == "aé bc" and len(answer.chunks) == 3 and answer.finish == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_chunks_have_the_time_at_which_they_came() -> None:
    answer, _, _ = read(
        HEAD, chunked(text("a"))[:-5], chunked(text("b"))[:-5], chunked(text("c", "stop") + USAGE + DONE)
    )
    assert answer.chunks == [2.0, 3.0, 4.0] and answer.last == 4.0
    record = Record(0, 0, 3, None, 0.5)
    settle(record, answer, stream=True)
    assert (record.first, record.last, record.failure) == (2.0, 4.0, None)
    assert array("d", record.chunks).tolist() == [1.5, 2.5, 3.5]
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (9, 4, 3)


def test_a_role_or_a_bare_end_is_no_token() -> None:
    parts = [delta(role="assistant", content=""), delta(content="x"), delta(reasoning_content="y"), delta("stop")]
    answer, _, _ = read(HEAD, *(chunked(p)[:-5] for p in parts), chunked(USAGE + DONE))
    assert answer.chunks == [3.0, 4.0] and answer.last == 5.0 and answer.finish == "stop"


def test_a_token_without_text_yet_is_a_token() -> None:
    answer, _, _ = read(HEAD, chunked(text(""))[:-5], chunked(text("é"))[:-5])
    assert answer.chunks == [2.0, 3.0]


def test_tool_calls_are_tokens() -> None:
    call = delta(role="assistant", tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}])
    answer, _, _ = read(HEAD, chunked(call)[:-5])
    assert answer.chunks == [2.0]


@pytest.mark.parametrize(
    "body",
    [
        b"data: 1\r\n\r\ndata: 2\r\n\r\n",
        b": ping\n\nevent: x\ndata: 1\nid: 7\n\ndata:2\n\n",
        b"data: 1\n\ndata: 2\n\ndat",
    ],
)
def test_events_of_any_lawful_form(body: bytes) -> None:
    reader = EventReader()
    assert [found for i in range(len(body)) for found in reader.feed(body[i : i + 1])] == [b"1", b"2"]


def test_an_answer_with_a_length() -> None:
    body = json.dumps({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}).encode()
    answer, reader, complete = read(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    answer.finished()
    assert complete and reader.keep_alive and answer.text == ["hi"] and answer.finish == "stop"


def test_an_answer_to_the_end_of_the_connection() -> None:
    answer, reader, complete = read(b"HTTP/1.0 503 no\r\n\r\n", b'{"error": {"message": "later"}}')
    assert not complete and reader.end() and not reader.keep_alive
    answer.finished()
    assert (answer.status, answer.error) == (503, "later")


def test_an_interim_answer_is_passed_over() -> None:
    answer, _, complete = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 slow\r\ncontent-length: 0\r\n\r\n")
    assert complete and answer.status == 429


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        HEAD + b"zz\r\n",
        HEAD + chunked(b"data: {]\n\n"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
    ],
)
def test_nonsense_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data)


@pytest.mark.parametrize(
    ("parts", "failure", "detail"),
    [
        ([text("a")], "cut", "without a finish_reason"),
        ([text("a"), event(error={"message": "engine died"}), DONE], "error_event", "engine died"),
        ([text("a", "abort"), DONE], "finish_abort", ""),
        ([text("a", "stop")], None, ""),  # [DONE] is not asked for where the answer is whole
    ],
)
def test_a_stream_that_does_not_end_well_is_a_failure(parts: list[bytes], failure: str | None, detail: str) -> None:
    answer, _, complete = read(HEAD + chunked(*parts))
    assert complete
    record = Record(0, 0, None, None, 0.0)
    settle(record, answer, stream=True)
    assert record.failure == failure and detail in record.detail
