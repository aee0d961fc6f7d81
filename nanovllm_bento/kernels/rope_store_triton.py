"""qk_norm_rope_store in Triton: one program a token and group of heads. What it computes is said in rope_store.py.

A group is of query heads, or of key heads together with the value heads of the same numbers. A head is held as its two
halves, so that the pairs of the rotation sit in the same thread.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.rope_store import RopeStoreStep


@triton.jit
def _to_cache_dtype(x, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if dtype == tl.float8e4nv:
        return tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    else:
        return x.to(tl.float32).to(dtype)


@triton.jit
def _qk_norm_rope_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    table_ptr,
    positions_ptr,
    slot_mapping_ptr,
    norm_weight_ptr,  # None: no norm
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # head_dim / 2 rounded up to a power of two
    GROUP: tl.constexpr,  # heads of a program
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = HEAD_DIM // 2
    QUERY_GROUPS: tl.constexpr = (NUM_HEADS + GROUP - 1) // GROUP
    GROUPS: tl.constexpr = QUERY_GROUPS + (NUM_KV_HEADS + GROUP - 1) // GROUP
    dtype = qkv_ptr.dtype.element_ty
    program = tl.program_id(0)
    token = (program // GROUPS).to(tl.int64)
    group = program % GROUPS
    is_query = group < QUERY_GROUPS
    first = tl.where(is_query, group * GROUP, NUM_HEADS + (group - QUERY_GROUPS) * GROUP)
    end = tl.where(is_query, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
    heads = first + tl.arange(0, GROUP)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (heads < end) & (i < HALF)
    offsets = heads * HEAD_DIM + i
    if norm_weight_ptr is not None:
        weight1 = tl.load(norm_weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight2 = tl.load(norm_weight_ptr + HALF + offsets, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    # All loads come before the first use of what they bring, except that the table's wait for the position.
    position = tl.load(positions_ptr + token)
    slot = tl.load(slot_mapping_ptr + token)
    qkv_ptr += token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    x1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0)
    x2 = tl.load(qkv_ptr + HALF + offsets, mask=mask, other=0.0)
    v_mask = mask & (not is_query)
    v_offsets = offsets + NUM_KV_HEADS * HEAD_DIM
    v1 = tl.load(qkv_ptr + v_offsets, mask=v_mask, other=0.0)
    v2 = tl.load(qkv_ptr + HALF + v_offsets, mask=v_mask, other=0.0)
    table_ptr += position * HEAD_DIM
    columns = tl.broadcast_to(i, (GROUP, HALF_BLOCK))  # each head its own copy: so laid out as x1 and x2 are
    cos = tl.load(table_ptr + columns, mask=columns < HALF, other=0.0)
    sin = tl.load(table_ptr + HALF + columns, mask=columns < HALF, other=0.0)

    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    if norm_weight_ptr is not None:
        mean = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / HEAD_DIM
        scale = tl.rsqrt(mean + eps)
        x1 = ((x1 * scale).to(dtype).to(tl.float32) * weight1).to(dtype).to(tl.float32)
        x2 = ((x2 * scale).to(dtype).to(tl.float32) * weight2).to(dtype).to(tl.float32)
    y1 = (x1 * cos - x2 * sin).to(dtype)
    y2 = (x2 * cos + x1 * sin).to(dtype)

    if is_query:
        q_ptr += token * (NUM_HEADS * HEAD_DIM)
        tl.store(q_ptr + offsets, y1, mask=mask)
        tl.store(q_ptr + HALF + offsets, y2, mask=mask)
        return
    if KEEP:
        infinity: tl.constexpr = float("inf")
        finite = v_mask & (tl.abs(v1.to(tl.float32)) < infinity) & (tl.abs(v2.to(tl.float32)) < infinity)
        broken = tl.sum((v_mask & (finite == 0)).to(tl.int32), axis=1, keep_dims=True) > 0
        tl.store(qkv_ptr + offsets, tl.where(broken, float("nan"), y1), mask=mask)
        tl.store(qkv_ptr + HALF + offsets, tl.where(broken, float("nan"), y2), mask=mask)
        zero = tl.zeros_like(v1)
        tl.store(qkv_ptr + v_offsets, zero, mask=v_mask & broken)
        tl.store(qkv_ptr + HALF + v_offsets, zero, mask=v_mask & broken)
    if slot >= 0:
        cache_offsets = slot * (NUM_KV_HEADS * HEAD_DIM) + (offsets - NUM_HEADS * HEAD_DIM)  # int64, as slot is
        k_dtype = k_cache_ptr.dtype.element_ty
        tl.store(k_cache_ptr + cache_offsets, _to_cache_dtype(y1, k_scale, k_dtype), mask=mask)
        tl.store(k_cache_ptr + HALF + cache_offsets, _to_cache_dtype(y2, k_scale, k_dtype), mask=mask)
        v_dtype = v_cache_ptr.dtype.element_ty
        tl.store(v_cache_ptr + cache_offsets, _to_cache_dtype(v1, v_scale, v_dtype), mask=mask)
        tl.store(v_cache_ptr + HALF + cache_offsets, _to_cache_dtype(v2, v_scale, v_dtype), mask=mask)


def qk_norm_rope_store(
    qkv: Tensor,
    step: RopeStoreStep,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    keep: bool = False,
    heads_per_program: int | None = None,
    num_warps: int = 2,
) -> Tensor:
    """heads_per_program: a power of two; the default gives a thread 16 bytes of each half, in bf16.

    Neither may depend on num_tokens: the norm's sum is to run in the same order in every batch.
    """
    assert qkv.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = k_cache.shape[-2:]
    half_block = triton.next_power_of_2(head_dim // 2)
    group = heads_per_program or max(1, num_warps * 256 // half_block)
    programs = num_tokens * (triton.cdiv(num_heads, group) + triton.cdiv(num_kv_heads, group))
    q = qkv.new_empty((num_tokens, num_heads, head_dim))
    pdl = use_pdl(qkv.device)
    _qk_norm_rope_store_kernel[(programs,)](
        qkv,
        step.table,
        step.positions,
        step.slot_mapping,
        norm_weight,
        q,
        k_cache,
        v_cache,
        eps,
        k_scale,
        v_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF_BLOCK=half_block,
        GROUP=group,
        KEEP=keep,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return q
