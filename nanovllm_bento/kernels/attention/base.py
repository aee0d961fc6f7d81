"""What every attention backend takes and promises."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class AttentionMetadata:
    """One step's rows: a row is one sequence's share of the step; decode rows (one token each) come first.

    query_start_loc: int32 [num_rows + 1], cumulative query tokens, so row r owns tokens [loc[r], loc[r+1]).
    seq_lens: int32 [num_rows], tokens the row attends to, this step's included (its context length).
    block_table: int32 [num_rows, max_blocks], KV block ids in order; entries beyond seq_lens are unspecified.
    slot_mapping: int64 [num_tokens], where each token's key and value go (block * block_size + offset); -1: no store.
    max_query_len, max_seq_len: maxima over rows, in tokens. num_decode_rows: how many rows are decode rows.
    """

    query_start_loc: "torch.Tensor"
    seq_lens: "torch.Tensor"
    block_table: "torch.Tensor"
    slot_mapping: "torch.Tensor"
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int


class AttentionBackend(Protocol):
    """Attention over the paged KV cache; k_cache and v_cache are [num_blocks, block_size, num_kv_heads, head_dim]."""

    name: str

    @classmethod
    def supports(
        cls,
        head_dim: int,
        dtype: "torch.dtype",
        kv_dtype: "torch.dtype",
        block_size: int,
        device: "torch.device",
    ) -> str | None:
        """None if this backend works for these, else the reason why not."""

    def prepare(self, meta: AttentionMetadata) -> None:
        """Once per step, outside any graph: derive what all layers share."""

    def forward(
        self,
        q: "torch.Tensor",
        k_cache: "torch.Tensor",
        v_cache: "torch.Tensor",
        meta: AttentionMetadata,
        scale: float,
    ) -> "torch.Tensor":
        """q: [num_tokens, num_heads, head_dim]; keys and values of this step are in the cache already.

        A row's query token at position p attends to positions 0..p. Returns [num_tokens, num_heads, head_dim].
        """
