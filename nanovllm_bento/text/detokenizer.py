"""Turns the tokens of one request into text as they come: whole characters only, and no part of a stop string.

The text of all pushes and ``finish`` is exactly ``tokenizer.decode`` of all tokens, unless a stop string ended it. The
cost of a token does not grow with the text.
"""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from nanovllm_bento.text.stop import StopMatcher
from nanovllm_bento.text.tokenizer import Tokenizer

_MAX_HELD_TOKENS = 8
_PROMPT_CONTEXT = 8


class _Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class _ByteLevelDecoder:
    """Byte-level BPE: a token is bytes, and bytes that end within a character wait for the rest of it."""

    __slots__ = ("_bytes_of", "_pending")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.byte_table(skip_special_tokens).__getitem__
        self._pending = b""

    def decode(self, token_ids: Sequence[int]) -> str:
        data = b"".join(map(self._bytes_of, token_ids))
        if not self._pending and data.isascii():
            return data.decode()
        data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _WindowDecoder:
    """Any other decoder (SentencePiece style): decodes new tokens behind a context of one or more earlier ones.

    What a token adds is decode(context + new) less decode(context): the difference of prefix and read offset known from
    text-generation-inference and vLLM. Byte-fallback tokens (<0xE2>) wait until their run ends, because one bad byte
    turns the whole run into U+FFFD.
    """

    __slots__ = ("_context", "_context_length", "_held", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._held: list[int] = []
        self._context = [token for token in prompt_token_ids[-_PROMPT_CONTEXT:] if self._is_visible(token)]
        self._context_length = len(self._decode(self._context))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join([self._decode_one(token) for token in token_ids if self._is_visible(token)])

    def finish(self) -> str:
        text = self._decode(self._context + self._held)[self._context_length :] if self._held else ""
        self._context, self._context_length, self._held = self._context + self._held, self._context_length, []
        return text

    def _is_visible(self, token: int) -> bool:
        return token not in self._skip and bool(self._tokenizer.id_to_token(token))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _decode_one(self, token: int) -> str:
        self._held.append(token)
        if self._tokenizer.is_byte_fallback(token):
            return ""
        text = self._decode(self._context + self._held)
        if text.endswith("\ufffd") and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        new = text[self._context_length :]
        alone = len(self._decode([token]))
        if alone:
            self._context, self._context_length = [token], alone
        else:  # a lone word boundary: as a context it would let the next token lose its space
            self._context, self._context_length = self._context + self._held, len(text)
        self._held = []
        return new


class IncrementalDetokenizer:
    """Text of one request's output tokens.

    prompt_token_ids: with a SentencePiece-style tokenizer, the text of the first token then begins with its space, as
        in the middle of a text; without, it is stripped as decode() does. Byte-level tokenizers need none.
    stop: strings that end the text. The first complete one wins (the longest if several are complete at once).
    min_tokens: a stop string counts only if a later token than this many completes it.
    """

    __slots__ = (
        "_decoder",
        "_finished",
        "_held",
        "_matcher",
        "_min_tokens",
        "_parts",
        "num_tokens_used",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder: _Decoder
        if tokenizer.is_byte_level:
            self._decoder = _ByteLevelDecoder(tokenizer, skip_special_tokens)
        else:
            self._decoder = _WindowDecoder(tokenizer, skip_special_tokens, prompt_token_ids)
        self._matcher = StopMatcher(stop) if stop else None
        self._min_tokens = min_tokens
        self._parts: list[str] = []
        self._held = ""
        self._finished = False
        self.num_tokens_used = 0
        """Tokens pushed, up to and with the one that completed the stop string."""
        self.stop_reason: str | None = None
        """The stop string that ended the text; None as long as there is none."""

    @property
    def text(self) -> str:
        """All text handed out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that is safe to send. Behind a stop string: nothing."""
        if self._finished:
            return ""
        if self._matcher is None:
            self.num_tokens_used += len(token_ids)
            text = self._decoder.decode(token_ids)
        else:
            text = ""
            for token in token_ids:
                self.num_tokens_used += 1
                if piece := self._decoder.decode((token,)):
                    text += self._release(piece)
                    if self.stop_reason is not None:
                        break
        if text:
            self._parts.append(text)
        return text

    def finish(self) -> str:
        """Returns what is still held back; half a character becomes U+FFFD. To be called at the end of the tokens."""
        if self._finished:
            return ""
        text = self._decoder.finish()
        if self._matcher is not None:
            text = self._release(text)
            text, self._held = text + self._held, ""
        self._finished = True
        if text:
            self._parts.append(text)
        return text

    def _release(self, piece: str) -> str:
        """What of the held text and ``piece`` can be no part of a stop string."""
        assert self._matcher is not None
        match = self._matcher.feed(piece, armed=self.num_tokens_used > self._min_tokens)
        buffer = self._held + piece
        if match is not None:
            self.stop_reason, self._finished = match.stop, True
            end = len(self._held) + match.end - len(match.stop)
            self._held = ""
            return buffer[:end]
        end = len(buffer) - self._matcher.num_held
        self._held = buffer[end:]
        return buffer[:end]
