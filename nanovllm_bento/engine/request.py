"""Checks a request against an engine's limits and fills in what it left open. The same code runs in LLM, in API
workers and in the engine itself, so that a bad request is refused where it arrives, with the same words."""

import secrets
from collections.abc import Sequence

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
    if num_prompt == 0:
        raise EmptyPromptError("The prompt is empty: it must hold at least one token.", param=param)
    low, high = min(prompt_token_ids), max(prompt_token_ids)
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise TokenOutOfVocabularyError(
            f"The prompt holds token id {bad}, which is not in the vocabulary (0 to {info.vocab_size - 1}).",
            param=param,
        )
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
