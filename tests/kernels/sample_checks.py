"""Statements about sampling by slots, for any launcher with the arguments of ``sample_rows``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nanovllm_bento.kernels.sample import (
    join_shards,
    new_slot_table,
    noise,
    sample_rows_reference,
    seed_to_int64,
    slot_words,
)

Launch = Callable[..., torch.Tensor]


def table_of(rows: list[dict[str, Any]]) -> np.ndarray:
    """A slot table whose slot i has the parameters rows[i]; what they leave out is temperature 1 and no filter."""
    table = new_slot_table(len(rows))
    for i, row in enumerate(rows):
        values = {"temperature": 1.0, **row, "seed": seed_to_int64(row.get("seed", 1000 + i))}
        for name, value in values.items():
            table[name][i] = value
    return table


def assert_tokens(tokens: torch.Tensor, logits: torch.Tensor, table: np.ndarray, positions: torch.Tensor) -> None:
    """tokens [n] of slots 0..n-1 equal the reference's, but for rounding: where another token was chosen, the better of
    the two must lie at the very edge of the filter, or both must score the same."""
    slots = torch.arange(len(table))
    wanted = sample_rows_reference(logits, slot_words(table), slots, positions)
    for i in torch.nonzero(tokens != wanted).flatten().tolist():
        got, expected, row = int(tokens[i]), int(wanted[i]), table[i]
        assert got >= 0 and expected >= 0 and row["temperature"] > 0, (i, got, expected, row)
        x = logits[i].double()
        scaled = x / float(row["temperature"])
        pair = torch.tensor([got, expected])
        seed, position = torch.full((2,), int(row["seed"])), positions[i].expand(2)
        u = noise(seed, position, pair // 4).gather(1, pair[:, None] % 4).flatten().double()
        score = scaled[pair] - torch.log(-torch.log(u))
        same_score = abs(score[0] - score[1]) <= 1e-6 * score.abs().max()
        better = int(pair[score.argmax()])
        assert same_score or at_the_edge(scaled, better, row), (i, got, expected, score, row)


def at_the_edge(scaled: torch.Tensor, entry: int, row: Any) -> bool:
    """Whether float32 sums or one rounding may move ``entry`` in or out of its row's top-p or min-p set."""
    ahead = scaled > scaled[entry]
    ahead[:entry] |= scaled[:entry] == scaled[entry]
    if not ahead.any():
        return False  # the best stays in every set
    if row["min_p"] > 0 and abs(scaled[entry] - scaled.max() - np.log(row["min_p"])) < 1e-5:
        return True
    if row["top_p"] >= 1:
        return False
    probs = scaled.softmax(0)
    kept = probs.sum() if row["top_k"] <= 0 else probs.topk(min(int(row["top_k"]), len(probs))).values.sum()
    return abs(float(probs[ahead].sum() / kept) - float(row["top_p"])) < 1e-5


def check(
    launch: Launch,
    device: torch.device,
    logits: torch.Tensor,
    rows: list[dict[str, Any]],
    *,
    filtered: bool,
    reordered: bool = True,
) -> torch.Tensor:
    """``launch`` gives each row the reference's token; ``reordered``: also in other rows, among padding rows."""
    table = table_of(rows)
    positions = torch.arange(len(rows)) * 7 + 3
    on_device = slot_words(table).to(device)
    out = torch.full((len(rows),), -77, device=device)
    tokens = launch(
        logits.to(device),
        on_device,
        torch.arange(len(rows), dtype=torch.int32).to(device),
        positions.to(device),
        filtered=filtered,
        out=out,
    )
    assert tokens is out
    assert_tokens(tokens.cpu(), logits.float(), table, positions)
    if not reordered:
        return tokens.cpu()
    # The same rows, backwards, with padding between and int64 slots: slots say which parameters count.
    order = torch.arange(len(rows) - 1, -1, -1)
    slots = torch.stack([order, torch.full_like(order, -1)], dim=1).flatten()
    sources = order.repeat_interleave(2)
    again = launch(
        logits[sources].to(device), on_device, slots.to(device), positions[sources].to(device), filtered=filtered
    ).cpu()
    assert again[0::2].tolist() == tokens.cpu().flip(0).tolist()
    assert again[1::2].tolist() == [0] * len(rows), "padding rows give token 0"
    return tokens.cpu()


PLAIN = [
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "seed": 2**64 - 1},
    {"temperature": 1e-5},
    {"temperature": 50.0, "seed": 2**63},
]
FILTERS = [
    {"top_k": 1},
    {"top_k": 5, "top_p": 0.6},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.7},
    {"top_k": 10**9},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 2.0, "seed": 2**64 - 1},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 150, "temperature": 3.0},
    {"top_k": 150, "top_p": 0.7, "temperature": 3.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
]


def shapes_of_logits(n: int, vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows that sampling may meet, by name: float32 [n, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, vocab_size, generator=generator)
    peaked = normal * 2
    peaked.scatter_add_(1, torch.randint(0, vocab_size, (n, 6), generator=generator), torch.full((n, 6), 9.0))
    half = torch.where(torch.rand(n, vocab_size, generator=generator) < 0.5, normal, -torch.inf)
    return {
        "flat": normal * 0.6,
        "peaked": peaked,
        "banned": half,
        "ties": (normal * 2).round() / 2,
        "constant": torch.full((n, vocab_size), -0.0),
        "large": normal * 1e4 - 3e4,
    }


def check_invalid_rows(launch: Launch, device: torch.device, vocab_size: int, *, filtered: bool) -> None:
    """NaN anywhere, +inf or nothing but -inf give -1, and leave the other rows alone."""
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(9))
    logits[1, vocab_size - 1] = torch.nan
    logits[2, 0] = -torch.nan
    logits[3, vocab_size // 2] = torch.inf
    logits[4] = -torch.inf
    for row in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}):
        variant = filtered or "top_k" in row or "top_p" in row
        tokens = check(launch, device, logits, [row] * 6, filtered=variant, reordered=False)
        assert tokens[1:5].tolist() == [-1] * 4 and min(tokens[0], tokens[5]) >= 0


def check_last_tokens(launch: Launch, device: torch.device, vocab_size: int, *, filtered: bool) -> None:
    """Each row's token also goes to its slot, 0 where the logits are not numbers; nothing else is written."""
    rows = [{"temperature": 0.0}, {"top_k": 5} if filtered else {}, {"temperature": 0.6}]
    table = table_of([*rows, *rows])
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(10))
    logits[2, vocab_size // 2] = torch.nan
    for dtype in (torch.int64, torch.int32):
        slots = torch.tensor([4, -1, 0, 1, -1], dtype=dtype)
        last_tokens = torch.full((6,), 77, device=device)
        tokens = launch(
            logits.to(device),
            slot_words(table).to(device),
            slots.to(device),
            torch.arange(5).to(device),
            filtered=filtered,
            last_tokens=last_tokens,
        ).tolist()
        assert tokens[1:3] == [0, -1] and tokens[4] == 0 and min(tokens[0], tokens[3]) >= 0
        assert last_tokens.tolist() == [0, tokens[3], 77, 77, tokens[0], 77]


def check_rows_without_filters_do_not_depend_on_the_variant(
    launch: Launch, device: torch.device, logits: torch.Tensor
) -> None:
    tokens = [check(launch, device, logits, PLAIN, filtered=filtered) for filtered in (False, True)]
    assert tokens[0].tolist() == tokens[1].tolist()


def by_shards(best_of_shard: Callable[..., torch.Tensor], choose: Callable[..., torch.Tensor], ranks: int) -> Launch:
    """A launcher for rows without filters that does one rank after the other what ``sample_shards`` does on all.

    best_of_shard, choose: as kernels.sample's best_of_shard and sample_triton's choose_among.
    """

    def launch(  # type: ignore[no-untyped-def]
        logits, slot_params, slots, positions, *, filtered=False, out=None, last_tokens=None
    ):
        n, vocab_size = logits.shape
        length = -(-vocab_size // (8 * ranks)) * 8
        parts = []
        for first in range(0, ranks * length, length):
            shard = torch.full((n, length), 1e9, dtype=logits.dtype, device=logits.device)  # beyond the end: not read
            real = logits[:, first : first + length]
            shard[:, : real.shape[1]] = real
            ids = real.shape[1], min(first, vocab_size)
            parts.append(best_of_shard(shard, *ids, slot_params, slots, positions, ranks).view(n, -1))
        out = torch.full((n,), -77, device=logits.device) if out is None else out
        return choose(join_shards(torch.cat(parts, dim=1), ranks), slot_params, slots, out, last_tokens)

    return launch


def check_shards(launch: Launch, device: torch.device, vocab_size: int) -> None:
    """Tokens are those of the whole vocabulary, whichever shard they come from; so is what is no number."""
    for name, logits in shapes_of_logits(len(PLAIN), vocab_size, 6).items():
        check(launch, device, logits, PLAIN, filtered=False, reordered=name == "peaked")
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(9))
    logits[1, vocab_size - 1] = torch.nan
    logits[2, 0] = -torch.nan
    logits[3, vocab_size // 2] = torch.inf
    logits[4] = -torch.inf
    logits[5, : vocab_size - 2] = -torch.inf  # all that is left lies in the last shard
    for row in ({}, {"temperature": 0.0}):
        tokens = check(launch, device, logits, [row] * 6, filtered=False, reordered=False)
        assert tokens[1:5].tolist() == [-1] * 4 and tokens[0] >= 0 and tokens[5] >= vocab_size - 2


def p_value(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Of Pearson's chi-square test that tokens are drawn from probs [vocab]."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert (counts[probs == 0] == 0).all(), "an excluded token was drawn"
    expected = probs[probs > 0].double() * len(tokens)
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))
