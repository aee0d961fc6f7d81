"""Sampling parameters: defaults, every range with its exact limits, types, and what goes together."""

import math
from typing import Any

import msgspec
import pytest

from nanovllm_bento.errors import InvalidRequestError, SamplingParamsError, TokenOutOfVocabularyError
from nanovllm_bento.sampling_params import MAX_SEED, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert params.stop == [] and params.stop_token_ids == []
    assert params.detokenize and params.skip_special_tokens and not params.ignore_eos


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 5], [0, -1]),
        ("temperature", [0, 0.0, 1e-6, 2, 100.0], [-1e-9, -1, math.inf, math.nan]),
        ("top_p", [1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.0000001, math.nan]),
        ("top_k", [0, 1, 10**6], [-2, -100]),
        ("min_p", [0, 0.0, 0.5, 1, 1.0], [-1e-9, 1.0000001, math.nan]),
        ("seed", [None, 0, MAX_SEED], [-1, MAX_SEED + 1]),
        ("max_tokens", [None, 1, 10**6], [0, -1]),
        ("min_tokens", [0, 1, 16], [-1]),
    ],
)
def test_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(SamplingParamsError, match=name) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        assert caught.value.status_code == 400


def test_top_k_minus_one_keeps_all() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


@pytest.mark.parametrize("name", ["n", "top_k", "min_tokens", "seed", "max_tokens"])
@pytest.mark.parametrize("value", [1.0, 1.5, "1", True, [1]])
def test_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError, match=f"{name} must be an integer"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("value", ["0.5", True, None, [0.5]])
def test_numbers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError, match=f"{name} must be a number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["ignore_eos", "detokenize", "skip_special_tokens"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_switches_are_booleans(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError, match=name):
        SamplingParams(**{name: value})


def test_unknown_parameter_is_an_error() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_stop_is_a_list_however_given() -> None:
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert SamplingParams(stop=[]).stop_strings == []


@pytest.mark.parametrize("stop", [3, [3], ["a", None], {"a": 1}])
def test_stop_of_a_wrong_type(stop: Any) -> None:
    with pytest.raises(SamplingParamsError, match="stop must be"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(SamplingParamsError, match="empty string"):
        SamplingParams(stop=stop)


def test_stop_strings_need_text() -> None:
    with pytest.raises(SamplingParamsError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_min_tokens_is_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=4, max_tokens=4)
    SamplingParams(min_tokens=100, max_tokens=None)
    with pytest.raises(SamplingParamsError, match="min_tokens must be at most max_tokens=4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize("ids", [[1.5], ["a"], [True], [None]])
def test_stop_token_ids_are_integers(ids: Any) -> None:
    with pytest.raises(SamplingParamsError, match="stop_token_ids must be an integer"):
        SamplingParams(stop_token_ids=ids)


def test_stop_token_ids_lie_in_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=[0, 9]).check_vocabulary(10)
    for token in (-1, 10):
        with pytest.raises(TokenOutOfVocabularyError, match=f"{token}.*0 to 9"):
            SamplingParams(stop_token_ids=[token]).check_vocabulary(10)


def test_is_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy


def test_with_changes_copies_and_checks_again() -> None:
    before = SamplingParams(temperature=0.5)
    after = before.with_changes(seed=3)
    assert (after.seed, after.temperature, before.seed) == (3, 0.5, None)
    with pytest.raises(SamplingParamsError):
        before.with_changes(top_p=2.0)


def test_it_travels_as_msgpack() -> None:
    params = SamplingParams(temperature=0.3, stop=["x"], stop_token_ids=[1], seed=MAX_SEED, max_tokens=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_errors_are_value_errors_of_a_request() -> None:
    with pytest.raises(ValueError):
        SamplingParams(n=0)
    assert issubclass(SamplingParamsError, InvalidRequestError)
