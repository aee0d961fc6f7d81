"""A mixture of experts: routing each token to its top_k experts, and the gated MLPs of those, added up.

The experts' work is a grouped product: the pairs (token, expert) are sorted by expert into blocks of block_m rows, and
each block meets the weights of one expert. No step waits for the device, and every shape follows from the number of
tokens alone, so all of it can be captured in a CUDA graph. A handful of tokens skips the sorting: each pair streams its
expert's weights by itself. Results are the same from run to run: every sum has one order.

A rank may hold a range of the experts only (expert parallelism); the pairs of others contribute nothing, and the
results are partial sums.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.kernels.activation import silu_and_mul_reference


class Tile(NamedTuple):
    """How a grouped product is cut: a program computes block_m rows by block_n columns (gate_up: of both matrices)."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 1  # blocks of rows that share their weights' way through the L2 cache
    swap: bool = False  # weights take the larger side of the tensor cores' tile


class PairTile(NamedTuple):
    """How a product by pairs is cut: a program computes block_n columns of one row."""

    block_n: int
    block_k: int
    num_warps: int = 4


class GroupedConfig(NamedTuple):
    """Pairs sorted by expert into blocks of block_m rows, at least 16."""

    block_m: int
    gate_up: Tile
    down: Tile


class PairConfig(NamedTuple):
    """No sorting: each pair by itself."""

    gate_up: PairTile
    down: PairTile


Config = GroupedConfig | PairConfig


class SortedPairs(NamedTuple):
    """Pairs by expert. A pair's number is token * top_k + its place among the token's experts.

    pairs: int32 [max_blocks * block_m]: each block's pairs in rising order, then the number of all pairs as a filler.
    experts: int32 [max_blocks]: each block's expert, counted from the first that is held here.
    num_blocks: int32 [1]: how many blocks there are; what lies behind them is not set.
    """

    pairs: Tensor
    experts: Tensor
    num_blocks: Tensor
    block_m: int


PAIR_TOKENS = 4
"""Up to so many tokens each pair is computed by itself: they share few experts, and nothing has to be sorted."""

INVARIANT = GroupedConfig(64, Tile(64, 64, 4, 3, 8), Tile(64, 64, 4, 3, 8))
"""For any number of tokens the same order of summation."""

FLOAT32 = GroupedConfig(16, Tile(32, 32, 4, 2, 8), Tile(32, 32, 4, 2, 8))
"""float32 keeps its precision and so runs without tensor cores."""

TUNED: dict[tuple[int, int, int, int, int], Config] = {
    (128, 8, 768, 2048, 1): PairConfig(PairTile(2, 1024, 2), PairTile(8, 256, 8)),
    (128, 8, 768, 2048, 2): PairConfig(PairTile(2, 1024, 2), PairTile(2, 256, 4)),
    (128, 8, 768, 2048, 4): PairConfig(PairTile(2, 1024, 2), PairTile(2, 256, 4)),
    (128, 8, 768, 2048, 16): GroupedConfig(16, Tile(64, 128, 4, 3, 1, True), Tile(64, 128, 4, 3, 1, True)),
    (128, 8, 768, 2048, 64): GroupedConfig(16, Tile(64, 128, 4, 3, 1, True), Tile(128, 128, 4, 3, 1, True)),
    (128, 8, 768, 2048, 256): GroupedConfig(32, Tile(64, 128, 4, 3, 1, False), Tile(128, 128, 4, 3, 1, False)),
    (128, 8, 768, 2048, 1024): GroupedConfig(64, Tile(64, 64, 4, 4, 4, False), Tile(128, 64, 4, 4, 4, False)),
    (128, 8, 768, 2048, 8192): GroupedConfig(128, Tile(128, 64, 8, 3, 4, False), Tile(256, 64, 8, 3, 4, False)),
    (128, 8, 384, 2048, 1): PairConfig(PairTile(8, 1024, 4), PairTile(8, 128, 4)),
    (128, 8, 384, 2048, 2): PairConfig(PairTile(2, 1024, 2), PairTile(8, 128, 4)),
    (128, 8, 384, 2048, 4): PairConfig(PairTile(4, 2048, 4), PairTile(8, 128, 4)),
    (128, 8, 384, 2048, 16): GroupedConfig(16, Tile(64, 128, 4, 3, 1, True), Tile(64, 64, 4, 4, 1, True)),
    (128, 8, 384, 2048, 64): GroupedConfig(16, Tile(64, 128, 4, 3, 1, True), Tile(128, 128, 4, 3, 1, False)),
    (128, 8, 384, 2048, 256): GroupedConfig(32, Tile(64, 128, 4, 3, 1, False), Tile(64, 64, 4, 4, 1, True)),
    (128, 8, 384, 2048, 1024): GroupedConfig(128, Tile(128, 64, 8, 4, 16, False), Tile(256, 64, 8, 3, 8, False)),
    (128, 8, 384, 2048, 8192): GroupedConfig(128, Tile(128, 64, 8, 4, 8, False), Tile(256, 64, 8, 3, 8, False)),
}
"""(experts held, top_k, inner, hidden, tokens) -> measured best (benchmarks/moe.py), for 16-bit dtypes.

A number of tokens between two entries takes the upper one's.
"""


def route(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Each token's top_k experts by softmax(logits): weights float32 and ids int32, both [num_tokens, top_k].

    logits: [num_tokens, num_experts], on CUDA contiguous. The larger logit first, the lower id among equals.
    renormalize: the weights of a token add up to one. A token with a NaN among its logits has NaN weights.
    """
    if logits.is_cuda:
        from nanovllm_bento.kernels.moe_triton import route as on_cuda

        return on_cuda(logits, top_k, renormalize)
    return route_reference(logits, top_k, renormalize=renormalize)


def experts_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    expert_start: int = 0,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
    config: Config | None = None,
) -> Tensor:
    """For each row of x: the sum over its experts e of weight * down[e] (silu(gate[e] x) * (up[e] x)).

    x: [num_tokens, hidden]; gate_up: [num_local, 2 * inner, hidden], gate over up; down: [num_local, hidden, inner];
    weights, ids: as of ``route``. The experts held here are [expert_start, expert_start + num_local); others' pairs are
    left out. residual: [num_tokens, hidden], added in the same sum, which is returned in its memory then.
    batch_invariant (GPU): a row's result is bit-equal whatever rows are beside it. Returns [num_tokens, hidden].
    """
    if x.is_cuda:
        from nanovllm_bento.kernels.moe_triton import experts_mlp as on_cuda

        config = config or choose_config(*gate_up.shape, ids.shape[1], len(x), x.element_size(), batch_invariant)
        return on_cuda(x, gate_up, down, weights, ids, expert_start, residual, config)
    y = experts_mlp_reference(x, gate_up, down, weights, ids, expert_start)
    return y if residual is None else residual.add_(y)


@cache
def choose_config(
    num_local: int, inner2: int, hidden: int, top_k: int, tokens: int, itemsize: int, batch_invariant: bool = False
) -> Config:
    """The measured configuration of a shape, or one in its spirit; inner2: rows of an expert's gate_up."""
    inner = inner2 // 2
    if itemsize == 4:
        return FLOAT32
    if batch_invariant:
        return INVARIANT
    measured = [key[-1] for key in TUNED if key[:-1] == (num_local, top_k, inner, hidden)]
    if measured:
        nearest = min((t for t in measured if t >= tokens), default=max(measured))
        return TUNED[num_local, top_k, inner, hidden, nearest]
    if tokens <= PAIR_TOKENS:
        return pair_config(inner, hidden, top_k)
    rows = tokens * top_k / num_local  # of an expert, if all are asked alike
    if rows <= 24:  # a stream of weights: few columns and deep tiles keep many bytes in flight
        return GroupedConfig(16, Tile(32, 128, 4, 4), Tile(64, 128, 4, 4))
    if rows <= 48:
        return GroupedConfig(32, Tile(64, 64, 4, 4), Tile(64, 128, 4, 3))
    if rows <= 128:
        return GroupedConfig(64, Tile(64, 64, 4, 4, 4), Tile(128, 64, 4, 4, 4))
    return GroupedConfig(128, Tile(128, 64, 8, 4, 8), Tile(256, 64, 8, 3, 8))


def pair_config(inner: int, hidden: int, top_k: int) -> PairConfig:
    """Tiles by pairs: all of a program's loads can be asked for at once, some 32 KB of weights."""
    wide = min(2048, max(32, _power_of_two(hidden)))
    deep = min(256, max(32, inner & -inner if inner % 64 == 0 else _power_of_two(inner)))
    columns = 8192 // (deep * _power_of_two(top_k))
    return PairConfig(PairTile(max(1, min(8, 8192 // wide)), wide), PairTile(max(1, min(16, columns)), deep))


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks that so many pairs fill at most: each expert that is asked may leave block_m - 1 rows of its last one."""
    return (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m


def route_reference(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    values = logits.float()
    probabilities = values.softmax(-1)
    keys = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    ids = keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.int()


def experts_mlp_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, expert_start: int = 0
) -> Tensor:
    """Expert by expert over those that are asked; a token's sum goes through its experts in rising order, in float32.

    A row's result depends on the others only as far as a library's product of more rows rounds otherwise.
    """
    top_k, num_local = ids.shape[1], len(gate_up)
    local = ids.flatten() - expert_start
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    order = local.argsort(stable=True)
    tokens = order.div(top_k, rounding_mode="floor")
    scale = weights.flatten()[order].unsqueeze(1)
    total = x.new_zeros(x.shape, dtype=torch.float32)
    begin = 0
    for expert, count in enumerate(local.bincount(minlength=num_local)[:num_local].tolist()):
        if count:
            end = begin + count
            rows = tokens[begin:end]
            y = silu_and_mul_reference(torch.nn.functional.linear(x[rows], gate_up[expert]))
            y = torch.nn.functional.linear(y, down[expert])
            total.index_add_(0, rows, y.float().mul_(scale[begin:end]))
            begin = end
    return total.to(x.dtype)


def sort_pairs_reference(ids: Tensor, expert_start: int, num_local: int, block_m: int) -> SortedPairs:
    num_pairs = ids.numel()
    size = max_blocks(num_pairs, num_local, block_m)
    pairs = torch.full((size * block_m,), num_pairs, dtype=torch.int32, device=ids.device)
    experts = torch.zeros(size, dtype=torch.int32, device=ids.device)
    flat, block = ids.flatten() - expert_start, 0
    for expert in range(num_local):
        mine = (flat == expert).nonzero().flatten().int()
        pairs[block * block_m : block * block_m + len(mine)] = mine
        blocks = -(-len(mine) // block_m)
        experts[block : block + blocks] = expert
        block += blocks
    return SortedPairs(pairs, experts, torch.tensor([block], dtype=torch.int32, device=ids.device), block_m)


def grouped_gate_up_reference(x: Tensor, weight: Tensor, found: SortedPairs, top_k: int) -> Tensor:
    """silu(gate) * up of every row of every block: [max_blocks * block_m, inner], zeros for fillers, rounded once."""
    out = x.new_zeros(len(found.pairs), weight.shape[1] // 2)
    for rows, pairs, expert in _rows_of_blocks(found, len(x) * top_k):
        gate, up = torch.nn.functional.linear(x[pairs // top_k].float(), weight[expert].float()).chunk(2, -1)
        out[rows] = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return out


def grouped_down_reference(h: Tensor, weight: Tensor, found: SortedPairs, weights: Tensor) -> Tensor:
    """Each pair's weight * (row of h) @ weight[expert].T: [num_pairs, hidden]; zeros for pairs in no block."""
    out = h.new_zeros(weights.numel(), weight.shape[1])
    for rows, pairs, expert in _rows_of_blocks(found, weights.numel()):
        y = torch.nn.functional.linear(h[rows].float(), weight[expert].float())
        out[pairs] = (y * weights.flatten()[pairs].unsqueeze(1)).to(h.dtype)
    return out


def combine_reference(
    y: Tensor, ids: Tensor, expert_start: int, num_local: int, residual: Tensor | None = None
) -> Tensor:
    """The sum over each token's pairs that are held here, in their order, and the residual: [num_tokens, hidden]."""
    held = (ids >= expert_start) & (ids < expert_start + num_local)
    parts = torch.where(held.unsqueeze(-1), y.view(*ids.shape, -1).float(), 0.0)
    total = parts.sum(1) if residual is None else parts.sum(1) + residual.float()
    return total.to(y.dtype)


def _rows_of_blocks(found: SortedPairs, num_pairs: int) -> list[tuple[Tensor, Tensor, int]]:
    """Of each block: the numbers of its rows that are no fillers, their pairs, and its expert."""
    blocks = []
    for block in range(int(found.num_blocks)):
        rows = torch.arange(block * found.block_m, (block + 1) * found.block_m, device=found.pairs.device)
        rows = rows[found.pairs[rows] < num_pairs]
        blocks.append((rows, found.pairs[rows].long(), int(found.experts[block])))
    return blocks


def _power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()
