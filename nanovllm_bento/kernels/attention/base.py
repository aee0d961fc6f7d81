"""What every attention backend takes and promises."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch

if TYPE_CHECKING:
    from nanovllm_bento.kernels.rope_store import RopeStoreStep


@dataclass(slots=True)
class AttentionMetadata:
    """One step's rows: a row is one sequence's share of the step; decode rows (one token each) come first.

    query_start_loc: int32 [num_rows + 1], cumulative query tokens, so row r owns tokens [loc[r], loc[r+1]).
    seq_lens: int32 [num_rows], tokens the row attends to, this step's included (its context length). A decode row of
    length 0 is padding: its output is zeros.
    block_table: int32 [num_rows, max_blocks], KV block ids in order; entries beyond seq_lens are unspecified.
    slot_mapping: int64 [num_tokens], where each token's key and value go (block * block_size + offset); -1: no store.
    max_query_len, max_seq_len: maxima over rows, in tokens (under a CUDA graph: bounds that hold at every replay).
    num_decode_rows: how many rows are decode rows; row r of them owns token r.
    whole_prompts: there are no decode rows, and every row's query tokens are all it attends to.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int
    whole_prompts: bool = False

    @property
    def has_prefill_rows(self) -> bool:
        return self.seq_lens.shape[0] > self.num_decode_rows

    def last_tokens(self) -> "tuple[torch.Tensor, AttentionMetadata]":
        """Each row's last token of the step, int32 [num_rows] (any of a row without tokens), and the metadata of these
        alone, as prefill rows of one token whose key and value are in the cache."""
        starts, ends = self.query_start_loc[:-1], self.query_start_loc[1:]
        counts = (ends > starts).cumsum(0, dtype=torch.int32)
        meta = replace(
            self,
            query_start_loc=torch.nn.functional.pad(counts, (1, 0)),
            slot_mapping=self.slot_mapping.new_full((len(counts),), -1),
            max_query_len=1,
            num_decode_rows=0,
            whole_prompts=False,
        )
        return (ends - 1).clamp(min=0), meta


class AttentionBackend(Protocol):
    """Attention over the paged KV cache; k_cache and v_cache are [num_blocks, block_size, num_kv_heads, head_dim].

    Cache slots past a row's end may hold anything, NaN included; nothing of it reaches the output.
    """

    name: str
    capturable: bool
    """Whether forward may be captured in a CUDA graph for steps of decode rows only; prepare then never waits for the
    device. A replay reads the tensors of the captured metadata again; what is host-known of it stays as captured."""
    captures_prefill: bool
    """Whether the same holds for steps of prefill rows only; padding rows have no query tokens and length 0."""
    fuses_decode: bool
    """Whether it is a FusingBackend."""
    reads_whole_prompts: bool
    """Whether it is a WholePromptBackend."""

    def prepare(self, meta: AttentionMetadata) -> None:
        """Once per step, outside any graph: derive what all layers share."""

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> torch.Tensor:
        """q: [num_tokens, num_heads, head_dim]; keys and values of this step are in the cache already.

        A row's query token at position p attends to positions 0..p. The true key is k_cache * k_scale, the true value
        v_cache * v_scale. Returns [num_tokens, num_heads, head_dim] in q's dtype.
        """


class PhaseBackend(AttentionBackend, Protocol):
    """A backend whose two phases can be had one by one; each fills its own rows of ``out`` and leaves the others."""

    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float,
        v_scale: float,
        out: torch.Tensor,
    ) -> None:
        """q, out: [num_tokens, num_heads, head_dim] of the whole step."""

    def prefill(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float,
        v_scale: float,
        out: torch.Tensor,
    ) -> None:
        """q, out: [num_tokens, num_heads, head_dim] of the whole step."""


class FusingBackend(AttentionBackend, Protocol):
    """A backend that takes a step of decode rows only from the packed projection on, in one kernel."""

    def decode_from_qkv(
        self,
        qkv: torch.Tensor,
        step: "RopeStoreStep",
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        num_heads: int,
        norm_weight: torch.Tensor | None,
        eps: float,
        k_scale: float,
        v_scale: float,
    ) -> torch.Tensor:
        """qk_norm_rope_store (see there) and forward in one, for a meta without prefill rows.

        qkv: contiguous [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]. A row's position is its seq_len - 1. Its
        new key and value are attended to as they would be stored, also where slot_mapping is -1 and they are not.
        Returns [num_rows, num_heads, head_dim].
        """


class WholePromptBackend(AttentionBackend, Protocol):
    """A backend that can take a step of whole prompts from its own keys and values, past the cache's pages."""

    def attend_whole_prompts(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        """``forward`` of a meta with whole_prompts. k, v: [num_tokens, num_kv_heads, head_dim], contiguous in the last
        dimension, as qk_norm_rope_store with ``keep`` leaves them. A NaN of one row may reach another row by v alone.
        """


class PhasedAttention:
    """Implements AttentionBackend with one backend for decode rows and another for prefill rows."""

    def __init__(self, prefill: PhaseBackend, decode: PhaseBackend) -> None:
        self.name = f"{prefill.name}+{decode.name}"
        self.capturable = decode.capturable
        self.captures_prefill = prefill.captures_prefill
        self.fuses_decode = decode.fuses_decode
        self.reads_whole_prompts = prefill.reads_whole_prompts
        self._prefill = prefill
        self._decode = decode

    def prepare(self, meta: AttentionMetadata) -> None:
        if meta.has_prefill_rows:
            self._prefill.prepare(meta)
        if meta.num_decode_rows:
            self._decode.prepare(meta)

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> torch.Tensor:
        if not meta.has_prefill_rows:
            return self._decode.forward(q, k_cache, v_cache, meta, scale, k_scale, v_scale)
        if not meta.num_decode_rows:
            return self._prefill.forward(q, k_cache, v_cache, meta, scale, k_scale, v_scale)
        out = q.new_empty(q.shape)
        self._decode.decode(q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        self._prefill.prefill(q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        return out

    def decode_from_qkv(
        self,
        qkv: torch.Tensor,
        step: "RopeStoreStep",
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        num_heads: int,
        norm_weight: torch.Tensor | None,
        eps: float,
        k_scale: float,
        v_scale: float,
    ) -> torch.Tensor:
        return cast("FusingBackend", self._decode).decode_from_qkv(
            qkv, step, k_cache, v_cache, meta, scale, num_heads, norm_weight, eps, k_scale, v_scale
        )

    def attend_whole_prompts(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        return cast("WholePromptBackend", self._prefill).attend_whole_prompts(q, k, v, meta, scale)
