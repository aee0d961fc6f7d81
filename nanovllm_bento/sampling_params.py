"""How one request is sampled and when it ends. A leaf: imports neither torch nor anything of the engine."""

import math
from typing import Any

import msgspec

from nanovllm_bento.errors import SamplingParamsError, TokenOutOfVocabularyError

MAX_SEED = 2**64 - 1


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of a request, with vLLM's names, defaults and ranges.

    temperature: 0 is greedy; else logits are divided by it. [0, inf)
    top_p: smallest set of tokens whose probabilities sum to at least top_p. (0, 1]
    top_k: only the k most likely tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one. [0, 1]
    seed: 64-bit; with the same seed, prompt and settings a request yields the same tokens, whatever runs beside it.
        None draws a fresh one.
    n: completions per prompt; completion i > 0 is sampled with a seed derived from ``seed`` and i.
    max_tokens: tokens to generate at most, at least 1; None means up to max_model_len.
    min_tokens: end-of-sequence and stop tokens cannot be sampled before so many tokens.
    ignore_eos: do not end at an end-of-sequence token.
    stop: strings that end the text; they are never part of it.
    stop_token_ids: ids that end the sequence, beside the model's own.
    detokenize, skip_special_tokens: whether and how text is made of the tokens.

    Raises SamplingParamsError for a value out of range, TypeError for an unknown keyword.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop_token_ids = [] if self.stop_token_ids is None else list(self.stop_token_ids)
        if self.top_k == -1:
            self.top_k = 0
        if not self._is_plain():  # one of them names the fault, unless there is none
            self._check_types()
            self._check_ranges()

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list, whatever it was given as."""
        assert isinstance(self.stop, list)
        return self.stop

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def with_changes(self, **changes: Any) -> "SamplingParams":
        """A copy with some fields replaced (checked again)."""
        return msgspec.structs.replace(self, **changes)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises TokenOutOfVocabularyError if a stop token id is not in [0, vocab_size)."""
        for token in self.stop_token_ids or ():
            if not 0 <= token < vocab_size:
                raise TokenOutOfVocabularyError(
                    f"stop_token_ids holds {token}, which is not in the vocabulary (0 to {vocab_size - 1}).",
                    param="stop_token_ids",
                )

    def _is_plain(self) -> bool:
        """A fast yes for what passes all checks, as nearly every request does; no may be wrong."""
        return (
            type(self.n) is type(self.top_k) is type(self.min_tokens) is int
            and type(self.temperature) is type(self.top_p) is type(self.min_p) is float
            and (self.seed is None or (type(self.seed) is int and 0 <= self.seed <= MAX_SEED))
            and (self.max_tokens is None or (type(self.max_tokens) is int and self.min_tokens <= self.max_tokens))
            and self.max_tokens != 0
            and type(self.ignore_eos) is type(self.detokenize) is type(self.skip_special_tokens) is bool
            and not self.stop
            and not self.stop_token_ids
            and self.n >= 1
            and 0 <= self.temperature < math.inf
            and 0 < self.top_p <= 1
            and self.top_k >= 0
            and 0 <= self.min_p <= 1
            and self.min_tokens >= 0
        )

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            _check_int(name, getattr(self, name))
        for name in ("seed", "max_tokens"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SamplingParamsError(f"{name} must be a number, got {value!r}.", param=name)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise SamplingParamsError(f"{name} must be true or false, got {value!r}.", param=name)
        if not isinstance(self.stop, (list, tuple)) or not all(isinstance(s, str) for s in self.stop):
            raise SamplingParamsError("stop must be a string or a list of strings.", param="stop")
        for token in self.stop_token_ids or ():
            _check_int("stop_token_ids", token)

    def _check_ranges(self) -> None:
        _check_range("n", self.n, self.n >= 1, "at least 1")
        finite = math.isfinite(self.temperature)
        _check_range("temperature", self.temperature, finite and self.temperature >= 0, "a finite number, at least 0")
        _check_range("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check_range("top_k", self.top_k, self.top_k >= 0, "at least 1, or 0 or -1 to keep all tokens")
        _check_range("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        if self.seed is not None:
            _check_range("seed", self.seed, 0 <= self.seed <= MAX_SEED, "between 0 and 2**64 - 1")
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check_range("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.", param="min_tokens"
            )
        if self.stop_strings and not self.detokenize:
            raise SamplingParamsError("stop strings need detokenize=True.", param="stop")
        if any(not s for s in self.stop_strings):
            raise SamplingParamsError("stop must not hold an empty string.", param="stop")


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SamplingParamsError(f"{name} must be an integer, got {value!r}.", param=name)


def _check_range(name: str, value: Any, ok: bool, bound: str) -> None:
    if not ok:
        raise SamplingParamsError(f"{name} must be {bound}, got {value}.", param=name)
