"""Sampling: distributions, reproducibility and every filter."""

import math

import numpy as np
import pytest
import torch

from nanovllm_bento.kernels.sample import (
    _MAX_GUMBEL_SPREAD,
    MIN_TEMPERATURE,
    best_of_shard,
    choose_among_reference,
    filter_logits,
    noise,
    philox,
    sample_reference,
    sample_rows,
    sample_shards,
    seed_to_int64,
)
from nanovllm_bento.layers.sampler import Sampler
from nanovllm_bento.sampling_params import SamplingParams
from tests.kernels.sample_checks import by_shards, check_last_tokens, check_shards


def draw(logits: torch.Tensor, n: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=None):
    """n draws from one row of logits, at n positions."""
    return sample_reference(
        logits.repeat(n, 1),
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        torch.full((n,), min_p),
        torch.full((n,), seed_to_int64(seed)),
        torch.arange(n) if position is None else torch.full((n,), position),
    )


def chi_square(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Standardised chi-square statistic; about N(0, 1) if tokens are drawn from probs."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert (counts[probs == 0] == 0).all(), "an excluded token was drawn"
    kept = probs > 0
    expected = probs[kept].double() * len(tokens)
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    tokens = draw(logits, 40_000, temperature=temperature)
    assert abs(chi_square(tokens, (logits / temperature).softmax(0))) < 4


@pytest.mark.parametrize(
    ("filters", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.7}, None), ({"min_p": 0.2}, None), ({"top_k": 9, "top_p": 0.5}, None)],
)
def test_filtered_draws_follow_the_renormalised_softmax(filters, kept):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 1.5
    probs = logits.double().softmax(0)
    order = probs.argsort(descending=True)
    keep = torch.ones(30, dtype=torch.bool)
    if "top_k" in filters:
        keep[order[filters["top_k"] :]] = False
    if "top_p" in filters:
        left = torch.where(keep, probs, 0) / probs[keep].sum()
        mass = 0.0
        for token in order:
            if mass >= filters["top_p"]:
                keep[token] = False
            mass += left[token].item()
    if "min_p" in filters:
        keep &= probs >= filters["min_p"] * probs.max()
    assert kept is None or int(keep.sum()) == kept
    expected = torch.where(keep, probs, 0) / probs[keep].sum()
    assert abs(chi_square(draw(logits, 30_000, **filters), expected)) < 4


def test_a_seed_and_a_position_fix_the_token_whatever_the_row_or_the_batch():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(3))
    seeds = torch.tensor([seed_to_int64(s) for s in (0, 1, 2**64 - 1, 5, 5, 7, 8, 9)])
    arguments = [torch.full((8,), 1.0), torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.zeros(8)]
    positions = torch.tensor([3, 3, 3, 4, 5, 6, 7, 8])
    together = sample_reference(logits, *arguments, seeds, positions)
    for i in range(8):
        alone = sample_reference(logits[i : i + 1], *(a[i : i + 1] for a in (*arguments, seeds, positions)))
        assert alone.item() == together[i].item()
    flat = torch.zeros(1, 5000)
    tokens = {draw(flat, 1, seed=s, position=p).item() for s in range(6) for p in range(6)}
    assert len(tokens) > 30, "seed and position both matter"


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, 0x299F31D0_A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_random123s_known_answers(counter, key, words):
    got = philox(torch.tensor(seed_to_int64(key)), *(torch.tensor(c) for c in counter))
    assert " ".join(f"{word.item():08x}" for word in got) == words


def test_four_entries_share_a_counter_and_each_has_a_word_of_its_own():
    u = noise(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert u.tolist() == [[((word >> 9) + 0.5) * 2.0**-23 for word in words]]


def test_the_noise_is_uniform_and_never_leaves_its_bounds():
    groups = torch.arange(50_000)
    u = noise(torch.full_like(groups, 11), torch.full_like(groups, 5), groups).double()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    assert (torch.corrcoef(u.T) - torch.eye(4)).abs().max() < 0.02, "the words of a counter are independent"
    spread = -math.log(-math.log(1 - 2.0**-24)) + math.log(-math.log(2.0**-24))
    assert spread < _MAX_GUMBEL_SPREAD, "entries that could win must not be left out"


def test_rows_of_all_kinds_mix_in_one_batch():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    logits[3, 10] = float("nan")
    tokens = sample_reference(
        logits,
        torch.tensor([0.0, 1.0, MIN_TEMPERATURE, 1.0]),
        torch.tensor([0, 1, 0, 0]),
        torch.tensor([1.0, 1.0, 1.0, 0.5]),
        torch.zeros(4),
        torch.arange(4),
        torch.arange(4),
    )
    best = logits.argmax(-1)
    assert tokens.tolist()[:3] == best.tolist()[:3], "greedy, top_k=1 and a vanishing temperature agree"
    assert tokens[3].item() == -1, "logits that are not numbers give no token"


def test_top_p_always_keeps_the_best_token():
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    kept = filter_logits(logits, torch.ones(1), torch.tensor([0]), torch.tensor([1e-9]), torch.tensor([0.0]))
    assert kept.isfinite().tolist() == [[False, True, False]]


def test_banned_tokens_are_not_sampled():
    sampler = Sampler(2, torch.device("cpu"))
    sampler.set_slot(1, SamplingParams(temperature=0.0, seed=1))
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    for banned, token in (([], 1), ([1], 2), ([1, 2], 3)):
        got = sampler(logits.clone(), np.array([1]), np.array([0]), np.array(banned, np.int64))
        assert got.tolist() == [token]


def test_a_slots_new_parameters_count_from_the_next_step_and_padding_rows_give_0():
    sampler = Sampler(3, torch.device("cpu"))
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    sampler.set_slot(2, SamplingParams(temperature=0.0, top_k=2, seed=1))
    assert not sampler.needs_filter(np.array([2, -1])), "a greedy row needs no filter"
    assert sampler(logits.clone(), np.array([2, -1]), np.array([0, 0])).tolist() == [1, 0]
    sampler.set_slot(2, SamplingParams(temperature=5.0, top_k=2, seed=2**64 - 1))
    assert sampler.needs_filter(np.array([0, 2])) and not sampler.needs_filter(np.array([0, 1]))
    tokens = {sampler(logits.clone(), np.array([2, 2]), np.array([i, i]))[0].item() for i in range(30)}
    assert tokens == {1, 2}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_the_vocabulary_give_the_tokens_of_all_of_it(ranks):
    def choose(best, slot_params, slots, out, last_tokens):
        return out.copy_(choose_among_reference(best).masked_fill(slots < 0, 0))

    check_shards(by_shards(best_of_shard, choose, ranks), torch.device("cpu"), 203)


@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_are_also_left_with_their_slots(filtered):
    check_last_tokens(sample_rows, torch.device("cpu"), 203, filtered=filtered)


def test_tokens_of_shards_are_also_left_with_their_slots():
    def launch(logits, slot_params, slots, positions, *, filtered, last_tokens):
        alone = 1  # what gather brings together is one rank's
        return sample_shards(
            logits, logits.shape[1], 0, slot_params, slots, positions, lambda best: best, alone, last_tokens
        )

    check_last_tokens(launch, torch.device("cpu"), 203, filtered=False)
