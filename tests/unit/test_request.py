"""On arrival, a request that can never be served is refused, with the numbers; what it left open is filled in."""

from typing import Any

import pytest

from nanovllm_bento.engine.messages import EngineInfo, pack_tokens, unpack_tokens
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import (
    EmptyPromptError,
    InvalidRequestError,
    PromptExceedsCacheError,
    PromptTooLongError,
    TokenOutOfVocabularyError,
)
from nanovllm_bento.sampling_params import MAX_SEED, SamplingParams


def info(**changes: Any) -> EngineInfo:
    fields: dict[str, Any] = {
        "max_model_len": 32,
        "vocab_size": 100,
        "block_size": 4,
        "num_blocks": 100,
        "eos_token_ids": [0],
        "max_num_seqs": 8,
        "scheduling_policy": "fcfs",
        "dtype": "float32",
        "device": "cpu",
        "startup_seconds": {},
    }
    return EngineInfo(**{**fields, **changes})


def test_empty_prompt() -> None:
    with pytest.raises(EmptyPromptError) as caught:
        resolve_request([], SamplingParams(), info(), param="messages")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("token", [-1, 100, 2**31])
def test_token_out_of_vocabulary(token: int) -> None:
    with pytest.raises(TokenOutOfVocabularyError, match=rf"{token}.*0 to 99") as caught:
        resolve_request([1, token, 2], SamplingParams(), info())
    assert (caught.value.param, caught.value.status_code) == ("prompt", 400)


def test_first_and_last_token_of_the_vocabulary_are_fine() -> None:
    resolve_request([0, 99], SamplingParams(), info())


def test_stop_token_out_of_vocabulary() -> None:
    with pytest.raises(TokenOutOfVocabularyError, match="stop_token_ids"):
        resolve_request([1], SamplingParams(stop_token_ids=[100]), info())


def test_prompt_must_leave_room_for_one_token() -> None:
    assert resolve_request([1] * 31, SamplingParams(), info()).max_tokens == 1
    for length in (32, 33):
        with pytest.raises(PromptTooLongError, match=rf"{length} tokens.*max_model_len is 32") as caught:
            resolve_request([1] * length, SamplingParams(), info())
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("asked", "given"), [(None, 22), (5, 5), (22, 22), (23, 22), (1000, 22)])
def test_max_tokens_is_cut_to_what_is_left(asked: int | None, given: int) -> None:
    assert resolve_request([1] * 10, SamplingParams(max_tokens=asked), info()).max_tokens == given


def test_min_tokens_is_cut_with_it() -> None:
    resolved = resolve_request([1] * 30, SamplingParams(min_tokens=10, max_tokens=None), info())
    assert (resolved.max_tokens, resolved.min_tokens) == (2, 2)


def test_request_that_can_never_fit_in_the_cache() -> None:
    small = info(num_blocks=4)  # 16 tokens; the last output token needs no place
    assert resolve_request([1] * 10, SamplingParams(max_tokens=7), small).max_tokens == 7
    with pytest.raises(PromptExceedsCacheError, match=r"17 tokens.*holds 16") as caught:
        resolve_request([1] * 10, SamplingParams(max_tokens=8), small)
    assert caught.value.code == "context_length_exceeded"


def test_prompt_beyond_the_cache_is_refused_whatever_it_asks_for() -> None:
    small = info(num_blocks=4)
    assert resolve_request([1] * 16, SamplingParams(max_tokens=None), small).max_tokens == 1
    with pytest.raises(PromptExceedsCacheError, match="17 prompt"):
        resolve_request([1] * 17, SamplingParams(max_tokens=None), small)


def test_open_max_tokens_is_cut_to_the_cache() -> None:
    assert resolve_request([1] * 10, SamplingParams(max_tokens=None), info(num_blocks=4)).max_tokens == 7


def test_seed_is_kept_or_drawn() -> None:
    assert resolve_request([1], SamplingParams(seed=0), info()).seed == 0
    drawn = {resolve_request([1], SamplingParams(), info()).seed for _ in range(8)}
    assert len(drawn) == 8 and all(seed is not None and 0 <= seed <= MAX_SEED for seed in drawn)


def test_given_parameters_are_not_changed() -> None:
    params = SamplingParams(max_tokens=None)
    resolve_request([1], params, info())
    assert params.max_tokens is None and params.seed is None


def test_all_refusals_are_invalid_requests() -> None:
    for error in (EmptyPromptError, PromptTooLongError, PromptExceedsCacheError, TokenOutOfVocabularyError):
        assert issubclass(error, InvalidRequestError)


def test_tokens_travel_as_little_endian_int32() -> None:
    assert pack_tokens([1, 256]) == bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert unpack_tokens(pack_tokens([0, 1, 2**31 - 1])) == [0, 1, 2**31 - 1]
    assert unpack_tokens(b"") == []
