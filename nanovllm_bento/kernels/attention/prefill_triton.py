"""Paged causal attention of rows with any number of query tokens as a Triton kernel (FlashAttention-2, Dao 2023).

One program takes one KV head of one row and a tile of its queries: the tile's lines are query tokens times the query
heads that share the KV head. It walks the keys from position 0 to the last that the tile sees; tiles of keys that all
its queries see whole need no mask.

Batch-invariant use (BATCH_INVARIANT): every row, decode rows too, comes through here with one tile shape and one loop.
A line's arithmetic then is the same wherever its token stands in a tile, chunk or batch: its keys come in the same
tiles from position 0, nothing is split, and a tile past its position changes no bit of its state.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.attention.common_triton import LOG2E, dot_dtype, dot_precision
from nanovllm_bento.kernels.launch import use_pdl


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """block_m: lines (query tokens times heads) a tile; block_n: keys a tile. num_warps, num_stages: Triton's."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3


def choose_config(head_dim: int, group: int, kv_dtype: torch.dtype, dtype: torch.dtype) -> PrefillConfig:
    wide = head_dim > 128
    if dtype == torch.float32:
        lines = max(16 if wide else 32, triton.next_power_of_2(group))
        return PrefillConfig(lines, 16 if wide else 32, num_warps=4, num_stages=2)
    if wide:
        return PrefillConfig(128, 32, num_warps=8, num_stages=2)
    return PrefillConfig()


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: Tensor,
    config: PrefillConfig,
    rows: tuple[int, int],
    max_query_len: int,
    batch_invariant: bool = False,
) -> None:
    """Fills the tokens of rows[0] <= row < rows[1] in out. q, out: [num_tokens, num_heads, head_dim].

    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]. max_query_len: a bound for those rows.
    """
    _, block_size, kv_heads, head_dim = k_cache.shape
    group = q.shape[1] // kv_heads
    tiles = -(-max_query_len // (config.block_m // group))
    pdl = use_pdl(q.device)
    paged_prefill_kernel[(tiles, kv_heads, rows[1] - rows[0])](
        out,
        q,
        k_cache,
        v_cache,
        meta.block_table,
        meta.query_start_loc,
        meta.seq_lens,
        scale * k_scale * LOG2E,
        v_scale,
        rows[0],
        out.stride(0),
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        meta.block_table.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        DOT_DTYPE=dot_dtype(q.dtype, k_cache.dtype == torch.float8_e4m3fn, q.device),
        PRECISION=dot_precision(q.dtype),
        BATCH_INVARIANT=batch_invariant,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    q,
    acc,
    m,
    total,
    blocks,
    tile,
    limit,
    q_position,
    k_ptr,
    v_ptr,
    table_ptr,
    qk_scale,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys into the running softmax; blocks: the tile's block ids, returned for the next tile."""
    d = tl.arange(0, DIM_PAD)
    position = tile + tl.arange(0, BLOCK_N)
    offset = position % BLOCK_SIZE
    k_rows = k_ptr + (blocks.to(tl.int64) * stride_kb + offset * stride_kt)[:, None] + d[None, :]
    v_rows = v_ptr + (blocks.to(tl.int64) * stride_vb + offset * stride_vt)[:, None] + d[None, :]
    if MASKED or HEAD_DIM != DIM_PAD:
        mask = (position < limit)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_rows, mask=mask, other=0.0)
        v = tl.load(v_rows, mask=mask, other=0.0)
    else:
        k = tl.load(k_rows)
        v = tl.load(v_rows)
    ahead = position + BLOCK_N
    blocks = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < limit, other=0)
    scores = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision=PRECISION) * qk_scale
    if MASKED:
        scores = tl.where(position[None, :] <= q_position[:, None], scores, float("-inf"))
    # every line sees key 0, so from the first tile on m is finite
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    rescale = tl.exp2(m - m_new)
    p = tl.exp2(scores - m_new[:, None])
    total = total * rescale + tl.sum(p, axis=1)
    acc = tl.dot(p.to(DOT_DTYPE), v.to(DOT_DTYPE), acc * rescale[:, None], input_precision=PRECISION)
    return acc, m_new, total, blocks


@triton.jit(do_not_specialize=["first_row"])
def paged_prefill_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    lens_ptr,
    qk_scale,  # turns q.k into a power of two's exponent
    v_scale,
    first_row,
    stride_out,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    PDL: tl.constexpr,
):
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    row = first_row + tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    q_start = tl.load(query_start_ptr + row)
    q_len = tl.load(query_start_ptr + row + 1) - q_start
    # the last tiles see most keys: they go first, so that the short ones fill the end
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_QUERIES
    if first_query >= q_len:
        return
    length = tl.load(lens_ptr + row)
    prefix = length - q_len

    d = tl.arange(0, DIM_PAD)
    line = tl.arange(0, BLOCK_M)
    query = first_query + line // GROUP
    head = kv_head * GROUP + line % GROUP
    real = ((line < TILE_QUERIES * GROUP) & (query < q_len))[:, None] & (d < HEAD_DIM)[None, :]
    token = (q_start + query).to(tl.int64)
    q = tl.load(q_ptr + token[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :], mask=real, other=0.0)
    q = q.to(DOT_DTYPE)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    table_ptr += row.to(tl.int64) * stride_table

    q_position = prefix + query
    limit = tl.minimum(prefix + first_query + TILE_QUERIES, length)
    seen_by_all = 0  # keys, in whole tiles
    if not BATCH_INVARIANT:
        seen_by_all = tl.maximum(prefix + first_query + 1, 0) // BLOCK_N * BLOCK_N
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    n = tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < limit, other=0)
    if not BATCH_INVARIANT:
        for tile in range(0, seen_by_all, BLOCK_N):
            acc, m, total, blocks = _attend_tile(
                q, acc, m, total, blocks, tile, limit, q_position, k_ptr, v_ptr, table_ptr, qk_scale,
                stride_kb, stride_kt, stride_vb, stride_vt,
                HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_N, DOT_DTYPE, PRECISION, MASKED=False,
            )  # fmt: skip
    for tile in range(seen_by_all, limit, BLOCK_N):
        acc, m, total, blocks = _attend_tile(
            q, acc, m, total, blocks, tile, limit, q_position, k_ptr, v_ptr, table_ptr, qk_scale,
            stride_kb, stride_kt, stride_vb, stride_vt,
            HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_N, DOT_DTYPE, PRECISION, MASKED=True,
        )  # fmt: skip
    acc = acc * (v_scale / tl.where(total > 0, total, 1.0))[:, None]  # zeros where a row has no keys
    tl.store(
        out_ptr + token[:, None] * stride_out + head[:, None] * HEAD_DIM + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real,
    )
