"""Sampling by slots in Triton's interpreter: a vocabulary of a few groups, tiles and splits stands for a large one."""

from functools import partial
from typing import Any

import pytest
import torch

from nanovllm_bento.kernels import sample_triton
from tests.kernels.sample_checks import (
    FILTERS,
    PLAIN,
    by_shards,
    check,
    check_invalid_rows,
    check_last_tokens,
    check_rows_without_filters_do_not_depend_on_the_variant,
    check_shards,
    shapes_of_logits,
)

CPU = torch.device("cpu")
VOCAB = 331  # 6 groups of 64, 3 tiles, the last of each cut short


def launch(
    logits: torch.Tensor, *args: torch.Tensor, filtered: bool, out: Any = None, last_tokens: Any = None, **config: Any
) -> torch.Tensor:
    out = torch.full((len(logits),), -77) if out is None else out
    config = {"block": 128, "programs": 2 * len(logits), "choose_block": 256, "candidates": 128, "narrow": 2, **config}
    args = (logits, *args, out, last_tokens)
    return sample_triton.sample_rows(*args, filtered=filtered, pdl=False, fast=False, **config)


@pytest.mark.parametrize("shape", ["flat", "peaked", "banned", "ties", "constant", "large"])
def test_filtered_rows_equal_the_reference(shape: str) -> None:
    logits = shapes_of_logits(len(FILTERS), VOCAB, 1)[shape]
    check(launch, CPU, logits, FILTERS, filtered=True, reordered=shape == "peaked")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_as_they_are(dtype: torch.dtype) -> None:
    rows = [PLAIN[0], PLAIN[1], FILTERS[1], FILTERS[4]]
    check(launch, CPU, shapes_of_logits(len(rows), VOCAB, 2)["peaked"].to(dtype), rows, filtered=True)


@pytest.mark.parametrize("shape", ["peaked", "ties"])
def test_rows_without_filters_do_not_depend_on_the_variant(shape: str) -> None:
    logits = shapes_of_logits(len(PLAIN), VOCAB, 3)[shape]
    check_rows_without_filters_do_not_depend_on_the_variant(launch, CPU, logits)


def test_both_ways_through_a_filtered_row_give_the_same_tokens() -> None:
    """Candidates may decide every row, or none but those whose set is tiny."""
    logits = shapes_of_logits(len(FILTERS), VOCAB, 4)["flat"]
    tokens = []
    for config in ({"candidates": 512, "narrow": 8}, {"candidates": 2, "narrow": 1}):
        configured = partial(launch, **config)
        tokens.append(check(configured, CPU, logits, FILTERS, filtered=True, reordered=False).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("filtered", [False, True])
def test_rows_that_are_not_numbers_give_no_token(filtered: bool) -> None:
    check_invalid_rows(launch, CPU, 150, filtered=filtered)


@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_are_also_left_with_their_slots(filtered: bool) -> None:
    check_last_tokens(launch, CPU, 150, filtered=filtered)


def test_tokens_of_shards_are_also_left_with_their_slots() -> None:
    scan = partial(sample_triton.scan_shard, pdl=False, fast=False, block=64, programs=12)
    shards = by_shards(scan, partial(sample_triton.choose_among, pdl=False), 2)
    check_last_tokens(shards, CPU, 150, filtered=False)


@pytest.mark.parametrize(("ranks", "block"), [(2, 64), (3, 64), (2, 256)])  # 256: a shard is read in one part
def test_shards_of_the_vocabulary_give_the_tokens_of_all_of_it(ranks: int, block: int) -> None:
    scan = partial(sample_triton.scan_shard, pdl=False, fast=False, block=block, programs=12)
    check_shards(by_shards(scan, partial(sample_triton.choose_among, pdl=False), ranks), CPU, VOCAB)
