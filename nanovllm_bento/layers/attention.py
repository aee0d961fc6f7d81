"""Self-attention over the paged KV cache."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    FusingBackend,
    WholePromptBackend,
)
from nanovllm_bento.kernels.products import FewRows
from nanovllm_bento.kernels.rope_store import RopeStoreStep, qk_norm_rope_store
from nanovllm_bento.layers.linear import MergedLinear
from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup, split_heads
from nanovllm_bento.layers.weight_spec import Shard, WeightSpec


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings and, if ``qk_norm``, RMSNorm of each query and key head.

    Made with the model's numbers of heads; ``num_heads`` and ``num_kv_heads`` are those that this rank of ``group``
    holds, and its output is then a partial sum. Raises ConfigError if the heads cannot be split.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool,
        eps: float,
        dtype: torch.dtype,
        group: ParallelGroup = SINGLE,
    ) -> None:
        super().__init__()
        heads = split_heads(num_heads, num_kv_heads, group)
        self.num_heads = heads.num_heads
        self.num_kv_heads = heads.num_kv_heads
        self.eps = eps
        self.scale = head_dim**-0.5
        self.k_scale = self.v_scale = 1.0  # what a cached key or value is to be multiplied by
        self.checkpoint_scales: tuple[float, float] | None = None
        q = _heads_shard(num_heads, heads.first_head, heads.num_heads, head_dim)
        kv = _heads_shard(num_kv_heads, heads.first_kv_head, heads.num_kv_heads, head_dim)
        self.qkv = MergedLinear(hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=qkv_bias, dtype=dtype)
        self.out = MergedLinear(q, {"o_proj": hidden_size}, bias=o_bias, dtype=dtype)
        self.q_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.head_norm_weight: Tensor | None = None
        self.backend: AttentionBackend | None = None

    def forward(
        self,
        x: Tensor,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        last: Tensor | None = None,
    ) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape; with last as ``attend`` says."""
        out: Tensor = self.out(self.attend(self.qkv(x), step, kv_cache, meta, last))
        return out

    def forward_by(
        self,
        products: FewRows,
        x: Tensor,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
    ) -> Tensor:
        """``forward`` for a decode step; returns what ``MergedLinear.parts_by`` does."""
        return self.out.parts_by(products, self.attend(self.qkv.forward_by(products, x), step, kv_cache, meta))

    def attend(
        self,
        qkv: Tensor,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        last: Tensor | None = None,
    ) -> Tensor:
        """qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] -> [num_tokens, num_heads * head_dim].

        Writes this step's keys and values into kv_cache. With last, [num_rows], only these tokens attend, but all are
        written; last and meta are then what ``AttentionMetadata.last_tokens`` makes of the step's metadata.
        """
        assert self.backend is not None, "set_attention_backend comes first"
        k_cache, v_cache = kv_cache
        norm, scales = (self.head_norm_weight, self.eps), (self.k_scale, self.v_scale)
        if self.backend.fuses_decode and not meta.has_prefill_rows:
            fused = cast(FusingBackend, self.backend)
            out = fused.decode_from_qkv(qkv, step, k_cache, v_cache, meta, self.scale, self.num_heads, *norm, *scales)
            return out.flatten(1)
        whole = meta.whole_prompts and self.backend.reads_whole_prompts
        q = qk_norm_rope_store(qkv, step, k_cache, v_cache, self.num_heads, *norm, *scales, keep=whole)
        if last is not None:
            q = q.index_select(0, last)
        if whole:
            heads = qkv.view(len(qkv), -1, q.shape[-1])[:, self.num_heads :]
            k, v = heads.split(self.num_kv_heads, dim=1)
            out = cast(WholePromptBackend, self.backend).attend_whole_prompts(q, k, v, meta, self.scale)
        else:
            out = self.backend.forward(q, k_cache, v_cache, meta, self.scale, *scales)
        return out.flatten(1)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        yield from self.qkv.weight_specs(prefix)
        yield from self.out.weight_specs(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weight_specs(f"{prefix}q_norm")
            yield from self.k_norm.weight_specs(f"{prefix}k_norm")

    def finalize(self) -> None:
        """Pack the linear layers; lay the two norm weights out by head, as the kernel reads them."""
        self.qkv.finalize()
        self.out.finalize()
        if self.q_norm is not None and self.k_norm is not None:
            q_rows = self.q_norm.weight.data.expand(self.num_heads, -1)
            k_rows = self.k_norm.weight.data.expand(self.num_kv_heads, -1)
            self.head_norm_weight = torch.cat((q_rows, k_rows))


def _heads_shard(total: int, first: int, count: int, head_dim: int) -> Shard:
    return Shard(total * head_dim, first * head_dim, (first + count) * head_dim, count * head_dim)
