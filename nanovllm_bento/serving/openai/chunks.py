"""Encodes answers: whole ones, and the chunks of a stream as bytes around a delta that alone is escaped for each.

No model is built on the way, which would cost more than the rest of a chunk; their shapes are those of ChatCompletion
and TextCompletion in protocol.py, which a test compares.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm_bento.serving.generation import Completion

_encode = msgspec.json.encode


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object; the prompt counts once for all its choices."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def whole_answer(
    completions: Sequence[Completion],
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    usage: dict[str, Any],
) -> bytes:
    """The answer of a request without stream."""
    choices = []
    for index, done in enumerate(completions):
        said = {"message": {"role": "assistant", "content": done.text}} if chat else {"text": done.text}
        end = {"logprobs": None, "finish_reason": done.finish_reason, "stop_reason": done.stop_reason}
        choices.append({"index": index, **said, **end})
    return _encode(
        {
            "id": request_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": None,
            "choices": choices,
            "usage": usage,
        }
    )


def _escape(text: str) -> bytes:
    """A JSON string. Line breaks beyond ASCII are escaped, as some clients split events at them."""
    data = _encode(text)
    if text.isascii():
        return data
    for line_break in ("\x85", "\u2028", "\u2029"):
        data = data.replace(line_break.encode(), b"\\u%04x" % ord(line_break))
    return data


class ChunkEncoder:
    """Events of one streamed answer, ``data: {...}\\n\\n`` each. ``chat`` tells which endpoint's shape."""

    def __init__(self, *, chat: bool, request_id: str, created: int, model: str, include_usage: bool) -> None:
        self._chat = chat
        self._head = b'data: {"id":%b,"object":%b,"created":%d,"model":%b,"system_fingerprint":null,"choices":[' % (
            _encode(request_id),
            b'"chat.completion.chunk"' if chat else b'"text_completion"',
            created,
            _encode(model),
        )
        # OpenAI: with include_usage every chunk has the field, and only the last one a value.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._more = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._text_heads: dict[int, bytes] = {}  # by choice
        self._behind_text = b"}" + self._more if chat else self._more

    def role(self, index: int) -> bytes:
        """A chat choice's first chunk."""
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""}' % index
        return self._head + delta + self._more

    def text(self, index: int, text: str) -> bytes:
        """A choice's text grew; ``text`` is not empty."""
        head = self._text_heads.get(index)
        if head is None:
            said = b'"delta":{"content":' if self._chat else b'"text":'
            head = self._text_heads[index] = b'%b{"index":%d,%b' % (self._head, index, said)
        return head + _escape(text) + self._behind_text

    def last(self, index: int, text: str, finish_reason: str, stop_reason: int | str | None) -> bytes:
        """A choice ended, with its last text."""
        return b'%b%b,"logprobs":null,"finish_reason":"%b","stop_reason":%b}%b' % (
            self._head,
            self._delta(index, text),
            finish_reason.encode(),
            _encode(stop_reason),
            self._tail,
        )

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after all choices ended."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _delta(self, index: int, text: str) -> bytes:
        if not self._chat:
            return b'{"index":%d,"text":%b' % (index, _escape(text))
        if not text:
            return b'{"index":%d,"delta":{}' % index
        return b'{"index":%d,"delta":{"content":%b}' % (index, _escape(text))
