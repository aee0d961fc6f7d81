"""Encodes the chunks of a stream: bytes around a delta that alone is escaped for each chunk."""

import msgspec

from nanovllm_bento.serving.openai.protocol import Usage

_encode = msgspec.json.encode


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

    def role(self, index: int) -> bytes:
        """A chat choice's first chunk."""
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""}' % index
        return self._head + delta + self._more

    def text(self, index: int, text: str) -> bytes:
        """A choice's text grew."""
        return b"%b%b%b" % (self._head, self._delta(index, text), self._more)

    def last(self, index: int, text: str, finish_reason: str, stop_reason: int | str | None) -> bytes:
        """A choice ended, with its last text."""
        return b'%b%b,"logprobs":null,"finish_reason":"%b","stop_reason":%b}%b' % (
            self._head,
            self._delta(index, text),
            finish_reason.encode(),
            _encode(stop_reason),
            self._tail,
        )

    def usage(self, usage: Usage) -> bytes:
        """The chunk after all choices ended."""
        return self._head + b'],"usage":' + usage.model_dump_json().encode() + b"}\n\n"

    def _delta(self, index: int, text: str) -> bytes:
        if not self._chat:
            return b'{"index":%d,"text":%b' % (index, _escape(text))
        if not text:
            return b'{"index":%d,"delta":{}' % index
        return b'{"index":%d,"delta":{"content":%b}' % (index, _escape(text))
