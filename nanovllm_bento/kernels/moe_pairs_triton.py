"""Triton side of moe.py for a handful of tokens: every pair of token and expert streams its weights by itself.

As skinny_triton.py's vector kernel: with so few rows a layer is a stream of weights, float32 lanes keep up with it, and
what counts is how many bytes are asked for at once. Two kernels do everything: the second goes through a token's
experts, so its sum over them needs no kernel of its own, and nothing between gate_up and the result is rounded but h.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.moe import PairTile


@triton.jit(do_not_specialize=["expert_start", "num_local"])
def gate_up_pairs_kernel(
    x,  # [num_tokens, K]
    weight,  # [num_local, 2n, K]
    ids,  # [num_tokens, TOP_K]
    out,  # [num_tokens * TOP_K, n]; rows of pairs that are not held here are not set
    expert_start,
    num_local,
    n,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = (n + BLOCK_N - 1) // BLOCK_N
    pair = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = col < n
    ks = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(ids + pair) - expert_start
    if (expert >= 0) & (expert < num_local):
        x += (pair // TOP_K).to(tl.int64) * K
        weight += expert.to(tl.int64) * (2 * n * K)
        at = weight + col[:, None] * K + ks[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            if EVEN_N and start + BLOCK_K <= K:
                w = tl.load(at + start)
                w_up = tl.load(at + n * K + start)
            else:
                ok = n_ok[:, None] & (start + ks < K)[None, :]
                w = tl.load(at + start, mask=ok, other=0.0)
                w_up = tl.load(at + n * K + start, mask=ok, other=0.0)
            v = tl.load(x + start + ks, mask=start + ks < K, other=0.0).to(tl.float32)[None, :]
            gate += w.to(tl.float32) * v
            up += w_up.to(tl.float32) * v
        g = tl.sum(gate, 1)
        h = g / (1.0 + tl.exp(-g)) * tl.sum(up, 1)
        tl.store(out + pair.to(tl.int64) * n + col, h.to(out.dtype.element_ty), mask=n_ok)


@triton.jit(do_not_specialize=["expert_start", "num_local"])
def down_pairs_kernel(
    h,  # [num_tokens * TOP_K, K]
    weight,  # [num_local, n, K]
    scale,  # [num_tokens, TOP_K]
    ids,  # [num_tokens, TOP_K]
    out,  # [num_tokens, n]; with ADD also the residual
    expert_start,
    num_local,
    n,
    TOP_K: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = (n + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_TOP_K)
    ks = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pair = token * TOP_K + place
    expert = tl.load(ids + pair, mask=place < TOP_K, other=-1) - expert_start
    held = (place < TOP_K) & (expert >= 0) & (expert < num_local)
    share = tl.load(scale + pair, mask=held, other=0.0)
    w_at = weight + expert.to(tl.int64)[:, None, None] * (n * K) + col[None, :, None] * K + ks[None, None, :]
    h_at = h + pair.to(tl.int64)[:, None, None] * K + ks[None, None, :]
    held3 = held[:, None, None]
    w_ok = held3 & (col < n)[None, :, None]
    y = tl.zeros([BLOCK_TOP_K, BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k_ok = (start + ks < K)[None, None, :]
        w = tl.load(w_at + start, mask=w_ok & k_ok, other=0.0)
        v = tl.load(h_at + start, mask=held3 & k_ok, other=0.0)
        y += w.to(tl.float32) * v.to(tl.float32)
    total = tl.sum(tl.sum(y, 2) * share[:, None], 0)
    at = out + token.to(tl.int64) * n + col
    if ADD:
        total += tl.load(at, mask=col < n, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=col < n)


def gate_up_pairs(x: Tensor, weight: Tensor, ids: Tensor, expert_start: int, tile: PairTile) -> Tensor:
    """silu(gate) * up of every pair: [num_tokens * top_k, inner]; rows of pairs that are not held here are not set."""
    assert x.is_contiguous() and weight.is_contiguous() and ids.is_contiguous() and weight.shape[2] == x.shape[1]
    num_local, n, k = weight.shape[0], weight.shape[1] // 2, weight.shape[2]
    out = x.new_empty(ids.numel(), n)
    pdl = use_pdl(x.device)
    gate_up_pairs_kernel[(ids.numel() * triton.cdiv(n, tile.block_n),)](
        *(x, weight, ids, out, expert_start, num_local, n),
        TOP_K=ids.shape[1],
        K=k,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EVEN_N=n % tile.block_n == 0,
        PDL=pdl,
        num_warps=tile.num_warps,
        launch_pdl=pdl,
    )
    return out


def down_pairs(
    h: Tensor,
    weight: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_start: int,
    tile: PairTile,
    residual: Tensor | None = None,
) -> Tensor:
    """Each token's sum of weight * (row of h) @ weight[expert].T, and the residual, which is returned then."""
    assert h.is_contiguous() and weight.is_contiguous() and weights.is_contiguous() and weight.shape[2] == h.shape[1]
    num_local, n, k = weight.shape
    num_tokens, top_k = ids.shape
    out = h.new_empty(num_tokens, n) if residual is None else residual
    assert out.is_contiguous()
    pdl = use_pdl(h.device)
    down_pairs_kernel[(num_tokens * triton.cdiv(n, tile.block_n),)](
        *(h, weight, weights, ids, out, expert_start, num_local, n),
        TOP_K=top_k,
        BLOCK_TOP_K=triton.next_power_of_2(top_k),
        K=k,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=tile.num_warps,
        launch_pdl=pdl,
    )
    return out
