"""Sampling: distributions, reproducibility and every filter."""

import math

import numpy as np
import pytest
import torch

from nanovllm_bento.kernels.sample import _MAX_GUMBEL_SPREAD, filter_logits, philox_uniform, sample, seed_to_int64
from nanovllm_bento.layers.sampler import Sampler
from nanovllm_bento.sampling_params import SamplingParams


def draw(logits: torch.Tensor, n: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=None):
    """n draws from one row of logits, at n positions."""
    return sample(
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
    together = sample(logits, *arguments, seeds, positions)
    for i in range(8):
        alone = sample(logits[i : i + 1], *(a[i : i + 1] for a in (*arguments, seeds, positions)))
        assert alone.item() == together[i].item()
    flat = torch.zeros(1, 5000)
    tokens = {draw(flat, 1, seed=s, position=p).item() for s in range(6) for p in range(6)}
    assert len(tokens) > 30, "seed and position both matter"


def test_philox_matches_the_published_vectors():
    """Random123's known answer of philox4x32-10 for a counter and a key of zeros begins with 6627e8d5."""
    u = philox_uniform(torch.tensor(0), torch.tensor(0), torch.tensor(0))
    assert u.item() == ((0x6627E8D5 >> 9) + 0.5) * 2.0**-23


def test_the_noise_is_uniform_and_never_leaves_its_bounds():
    u = philox_uniform(torch.tensor(11), torch.tensor(5), torch.arange(200_000)).double()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.001
    spread = -math.log(-math.log(1 - 2.0**-24)) + math.log(-math.log(2.0**-24))
    assert spread < _MAX_GUMBEL_SPREAD, "entries that could win must not be left out"


def test_rows_of_all_kinds_mix_in_one_batch():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    logits[3, 10] = float("nan")
    tokens = sample(
        logits,
        torch.tensor([0.0, 1.0, 1e-6, 1.0]),
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
    kept = filter_logits(logits, torch.tensor([0]), torch.tensor([1e-9]), torch.tensor([0.0]))
    assert kept.isfinite().tolist() == [[False, True, False]]


def test_banned_tokens_are_not_sampled():
    sampler = Sampler(2, torch.device("cpu"))
    sampler.set_slot(1, SamplingParams(temperature=0.0, seed=1))
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    for banned, token in (([], 1), ([1], 2), ([1, 2], 3)):
        got = sampler(logits.clone(), np.array([1]), np.array([0]), [(0, banned)] if banned else [])
        assert got.tolist() == [token]
