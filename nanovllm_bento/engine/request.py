"""Checks a request against an engine's limits and fills in what it left open. The same code runs in LLM, in API
workers and in the engine itself, so that a bad request is refused where it arrives, with the same words."""

import secrets
from array import array
from collections.abc import Sequence

import numpy as np

from nanovllm_bento.engine.messages import EngineInfo
from nanovllm_bento.errors import (
    EmptyPromptError,
    PromptExceedsCacheError,
    PromptTooLongError,
    TokenOutOfVocabularyError,
)
from nanovllm_bento.sampling_params import SamplingParams


def resolve_request(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, info: EngineInfo, *, param: str = "prompt"
) -> SamplingParams:
    """Check a prompt and its sampling parameters; returns the parameters with seed and max_tokens set.

    max_tokens is cut to what max_model_len leaves. ``param`` is the field that errors name. Raises EmptyPromptError,
    TokenOutOfVocabularyError, PromptTooLongError or PromptExceedsCacheError.
    """
    num_prompt = len(prompt_token_ids)
    _check_tokens(prompt_token_ids, info, param)
    sampling.check_vocabulary(info.vocab_size)
    room = info.max_model_len - num_prompt
    if room < 1:
        raise PromptTooLongError(
            f"The prompt has {num_prompt} tokens, but max_model_len is {info.max_model_len} tokens and at least one "
            "must be left for the output. Shorten the prompt or raise max_model_len.",
            param=param,
        )
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    # The last token is never fed back, so it needs no place in the cache.
    needed = num_prompt + max_tokens - 1
    if needed > info.num_cache_tokens:
        if num_prompt > info.num_cache_tokens or sampling.max_tokens is not None:
            raise PromptExceedsCacheError(
                f"The request needs {needed} tokens of KV cache ({num_prompt} prompt, up to {max_tokens} output), but "
                f"the whole cache holds {info.num_cache_tokens}. Shorten it, lower max_tokens or give the engine more "
                "KV cache (kv_cache_memory_bytes or gpu_memory_utilization).",
                param=param,
            )
        max_tokens = info.num_cache_tokens - num_prompt + 1
    return sampling.with_changes(
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
    )


def check_score(token_ids: Sequence[int], num_scored: int, info: EngineInfo, *, param: str = "prompt") -> None:
    """Check a request for the log-probabilities of the last ``num_scored`` of ``token_ids``.

    The last token is never fed, so there may be one more than max_model_len. Raises EmptyPromptError where there is
    nothing to score or nothing before it, TokenOutOfVocabularyError, PromptTooLongError or PromptExceedsCacheError.
    """
    _check_tokens(token_ids, info, param)
    if num_scored < 1:
        raise EmptyPromptError("The continuation is empty: there is nothing to score.", param="continuation")
    if num_scored >= len(token_ids):
        raise EmptyPromptError(
            "The context is empty: the first scored token needs at least one token before it, such as the "
            "beginning-of-sequence token.",
            param="context",
        )
    num_fed = len(token_ids) - 1
    if num_fed > info.max_model_len:
        raise PromptTooLongError(
            f"Context and continuation have {len(token_ids)} tokens, but at most max_model_len + 1 = "
            f"{info.max_model_len + 1} can be scored. Shorten the context or raise max_model_len.",
            param=param,
        )
    if num_fed > info.num_cache_tokens:
        raise PromptExceedsCacheError(
            f"Context and continuation need {num_fed} tokens of KV cache, but the whole cache holds "
            f"{info.num_cache_tokens}. Shorten them or give the engine more KV cache.",
            param=param,
        )


def _check_tokens(token_ids: Sequence[int], info: EngineInfo, param: str) -> None:
    if len(token_ids) == 0:
        raise EmptyPromptError("The prompt is empty: it must hold at least one token.", param=param)
    if isinstance(token_ids, array):
        values = np.frombuffer(token_ids, np.int32)  # a fiftieth of the time that min and max take
        low, high = int(values.min()), int(values.max())
    else:
        low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise TokenOutOfVocabularyError(
            f"The prompt holds token id {bad}, which is not in the vocabulary (0 to {info.vocab_size - 1}).",
            param=param,
        )
