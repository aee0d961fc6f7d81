"""Per-head RMSNorm of q and k, rotary embedding, and the write of k and v into the paged cache, as one operation.

What all layers of a step share (cos and sin of its positions, where its tokens are stored) is a RopeStoreStep, made
once a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RopeStoreStep:
    """cos, sin: float32 [num_tokens, 1, head_dim], the sine's first half negated (see rotate below).

    slots: int64 [num_stored], flat cache slots. tokens: int64 [num_stored], which token each slot takes its key and
    value from; None: all of them in order.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    tokens: Tensor | None


def make_step(cos_sin: Tensor, slot_mapping: Tensor) -> RopeStoreStep:
    """cos_sin: float32 [num_tokens, head_dim], the step's rows of the rotary cache, cosines in the first half.

    slot_mapping: int64 [num_tokens]; -1: that token's key and value are not stored.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    tokens = None
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[tokens]
    return RopeStoreStep(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), slot_mapping, tokens)


def qk_norm_rope_store(
    qkv: Tensor,
    step: RopeStoreStep,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], heads of q, then k, then v.

    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], written at step.slots. norm_weight: None or
    [num_heads + num_kv_heads, head_dim], the RMSNorm weight of each query and key head. Rotation pairs element i with
    i + head_dim / 2 (GPT-NeoX order). Returns q [num_tokens, num_heads, head_dim] in qkv's dtype; qkv's value part is
    untouched.
    """
    return qk_norm_rope_store_reference(qkv, step, k_cache, v_cache, num_heads, norm_weight, eps)


def qk_norm_rope_store_reference(
    qkv: Tensor,
    step: RopeStoreStep,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if norm_weight is not None:
        qk = torch.nn.functional.rms_norm(qk.float(), (head_dim,), None, eps).to(qkv.dtype).mul_(norm_weight)
    qk = qk.float()
    # rotate: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); the roll swaps the halves, sin carries the sign
    qk = torch.addcmul(qk * step.cos, qk.roll(head_dim // 2, -1), step.sin).to(qkv.dtype)
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    if step.tokens is not None:
        k, v = k[step.tokens], v[step.tokens]
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, step.slots, k.to(k_cache.dtype))
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, step.slots, v.to(v_cache.dtype))
    return q
