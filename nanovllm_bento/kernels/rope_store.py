"""Per-head RMSNorm of q and k, rotary embedding, and the write of k and v into the paged cache, as one operation.

What all layers of a step share (its tokens' positions, and where they are stored) is a RopeStoreStep, made once a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0  # the largest finite float8_e4m3fn


@dataclass(slots=True)
class ReferenceRows:
    """What the reference looks up once a step.

    cos, sin: float32 [num_tokens, 1, head_dim], the sine's first half negated (see rotate below).
    slots: int64 [num_stored], flat cache slots. tokens: int64 [num_stored], which token each slot takes its key and
    value from; None: all of them in order.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    tokens: Tensor | None


@dataclass(slots=True)
class RopeStoreStep:
    """The arguments of make_step, and on the CPU the reference's rows of them."""

    table: Tensor
    positions: Tensor
    slot_mapping: Tensor
    rows: ReferenceRows | None


def make_step(table: Tensor, positions: Tensor, slot_mapping: Tensor) -> RopeStoreStep:
    """table: float32 [num_positions, head_dim], the rotary table, cosines in the first half, sines in the second.

    positions: int64 [num_tokens]. slot_mapping: int64 [num_tokens], flat cache slots; -1: that token's key and value
    are not stored. On CUDA nothing is launched and nothing is copied: the kernel reads these very tensors.
    """
    rows = None if table.is_cuda else _reference_rows(table, positions, slot_mapping)
    return RopeStoreStep(table, positions, slot_mapping, rows)


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
) -> Tensor:
    """qkv: contiguous [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], heads of q, then k, then v.

    k_cache, v_cache: contiguous [num_blocks, block_size, num_kv_heads, head_dim] of any floating dtype, written at
    slot_mapping. If it is float8_e4m3fn, k / k_scale and v / v_scale are stored, clamped to ±448 and rounded to
    nearest; the scales have no meaning otherwise. norm_weight: None or [num_heads + num_kv_heads, head_dim], the
    RMSNorm weight of each query and key head. Rotation pairs element i with i + head_dim / 2 (GPT-NeoX order).
    Returns q [num_tokens, num_heads, head_dim] in qkv's dtype; qkv's value part is untouched.

    keep: qkv then also holds the keys, as they were before they got the cache's dtype, of all tokens. A head's values
    that are not all finite become zeros there, and its key NaN: attention that multiplies other prompts' values by
    zero must not meet a NaN, and the token's own prompt must (see WholePromptBackend).

    Rounded to qkv's dtype: the normalised value, its product with the weight, and the rotated value.
    """
    if qkv.is_cuda:
        from nanovllm_bento.kernels.rope_store_triton import qk_norm_rope_store as on_cuda

        return on_cuda(qkv, step, k_cache, v_cache, num_heads, norm_weight, eps, k_scale, v_scale, keep=keep)
    return qk_norm_rope_store_reference(
        qkv, step, k_cache, v_cache, num_heads, norm_weight, eps, k_scale, v_scale, keep=keep
    )


def qk_norm_rope_store_reference(
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
) -> Tensor:
    assert step.rows is not None, "the reference wants a step made of CPU tensors"
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if norm_weight is not None:
        qk = torch.nn.functional.rms_norm(qk.float(), (head_dim,), None, eps).to(qkv.dtype).mul_(norm_weight)
    qk = qk.float()
    # rotate: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); the roll swaps the halves, sin carries the sign
    qk = torch.addcmul(qk * step.rows.cos, qk.roll(head_dim // 2, -1), step.rows.sin).to(qkv.dtype)
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    _store(k, step.rows, k_cache, k_scale)
    _store(v, step.rows, v_cache, v_scale)
    if keep:
        broken = ~v.isfinite().all(-1, keepdim=True)
        heads[:, num_heads : num_heads + num_kv_heads] = k.masked_fill(broken, torch.nan)
        v.masked_fill_(broken, 0)
    return q


def _reference_rows(table: Tensor, positions: Tensor, slot_mapping: Tensor) -> ReferenceRows:
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    tokens = None
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[tokens]
    return ReferenceRows(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), slot_mapping, tokens)


def _store(x: Tensor, rows: ReferenceRows, cache: Tensor, scale: float) -> None:
    if rows.tokens is not None:
        x = x[rows.tokens]
    if cache.dtype == torch.float8_e4m3fn:
        x = (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)  # index_copy_ knows no float8
    cache.view(-1, *cache.shape[-2:]).index_copy_(0, rows.slots, x.to(cache.dtype))
