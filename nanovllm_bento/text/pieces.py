"""Tokenizes what has been tokenized before by looking it up: most of a conversation is the template's own text, the
system message and earlier turns, which come again with every request.

Special tokens cut a text into pieces, each of which the tokenizer treats by itself; so the ids of a text are those of
its pieces, one after the other. That does not hold for every tokenizer: see ``are_independent``.
"""

import re
from collections import OrderedDict
from typing import Any

from nanovllm_bento.text.tokenizer import Tokenizer, component_state

MAX_CHARS = 2**20
"""Characters of the pieces that are kept, together; their ids take about ten bytes for each."""
MAX_PIECE_CHARS = MAX_CHARS // 16

_LOCAL = frozenset(("ByteLevel", "Digits", "Punctuation", "Split", "Whitespace"))
"""Pre-tokenizers that look at nothing but the piece they are given (Metaspace asks whether it is the text's first)."""


def are_independent(tokenizer: Tokenizer) -> bool:
    """Whether a special token of this tokenizer cuts a text, with no effect on what stands before and behind it."""
    tokens = tokenizer.backend.get_added_tokens_decoder().values()
    is_cut = all(not (token.normalized or token.lstrip or token.rstrip or token.single_word) for token in tokens)
    steps = _steps(component_state(tokenizer.backend.pre_tokenizer))
    return is_cut and bool(tokens) and tokenizer.is_byte_level and steps <= _LOCAL


def _steps(pre_tokenizer: dict[str, Any]) -> set[str]:
    inner = pre_tokenizer.get("pretokenizers")
    if inner is None:
        return {pre_tokenizer.get("type", "")}
    return set[str]().union(*map(_steps, inner))


class PieceCache:
    """The ids of pieces, least recently used ones given up first. For tokenizers whose pieces ``are_independent``."""

    def __init__(self, tokenizer: Tokenizer, max_chars: int = MAX_CHARS) -> None:
        assert are_independent(tokenizer)
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        self._num_chars = 0
        self._ids: OrderedDict[str | tuple[str, str], list[int]] = OrderedDict()
        tokens = tokenizer.backend.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in tokens.items()}
        # The longest of those that begin at the same place, as the tokenizer takes it.
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def encode(self, text: str, *, new: str = "", salt: str = "") -> list[int]:
        """The ids of a text, no special tokens added. Raises InvalidRequestError for a text that is not valid Unicode.

        new: a part of it that has not been seen before, as far as can be told: a piece with this in it is not kept, as
        it would push out others and may never come again. salt: pieces are found again under the same salt only, as
        the time that is saved tells that somebody has sent them.
        """
        self._tokenizer.check_text(text)
        token_ids: list[int] = []
        special, known = self._special, self._ids
        for piece in self._split(text):
            if not piece:
                continue
            if (token_id := special.get(piece)) is not None:
                token_ids.append(token_id)
                continue
            key = (salt, piece) if salt else piece
            if (found := known.get(key)) is not None:
                known.move_to_end(key)
            else:
                found = self._tokenizer.backend.encode(piece, add_special_tokens=False).ids
                if not (new and new in piece):
                    self._keep(key, len(piece), found)
            token_ids += found
        return token_ids

    def _keep(self, key: str | tuple[str, str], num_chars: int, token_ids: list[int]) -> None:
        if num_chars > MAX_PIECE_CHARS:
            return
        self._ids[key] = token_ids
        self._num_chars += num_chars
        while self._num_chars > self._max_chars:
            given_up, _ = self._ids.popitem(last=False)
            self._num_chars -= len(given_up if isinstance(given_up, str) else given_up[1])
