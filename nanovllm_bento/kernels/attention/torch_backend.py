"""Paged attention from PyTorch's own operations: the backend on CPUs and the reference for every other.

Decode rows are gathered and attended in groups of similar length, so that one long row does not make all others pay for
its padding, and small enough that gathered keys stay in the cache of the CPU. Prefill rows go one by one.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm_bento.kernels.attention.base import AttentionMetadata

GROUP_TOKENS = 4096
"""Padded key tokens in one group of decode rows, at most (one row may have more)."""
QUERY_CHUNK = 512
"""Query tokens of one product where a mask is needed, which bounds the mask's memory."""


@dataclass(slots=True)
class _DecodeGroup:
    rows: Tensor | None  # int64 [n], rows in the batch; None: all tokens of the step, in order
    blocks: Tensor  # int64 [n * num_blocks]
    stale: Tensor | None  # int64, which of the n * num_blocks * block_size gathered slots hold no key of their row
    length: int  # keys, from the front, that at least one row attends to
    mask: Tensor | None  # [n, 1, 1, length], 0 or -inf; None: all rows attend to all keys


@dataclass(slots=True)
class _PrefillRow:
    start: int  # first query token in the batch
    end: int
    blocks: Tensor  # int64 [num_blocks]
    length: int  # keys
    chunks: list[tuple[int, int, int, Tensor | None]]  # query range, keys seen, mask (None: plain causal)


class TorchAttention:
    """Implements AttentionBackend for any head_dim and float dtype, on any device, with kv_dtype equal to dtype."""

    name = "torch"
    capturable = False
    captures_prefill = False
    reads_whole_prompts = False
    fuses_decode = False

    def __init__(self, block_size: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self._decode: list[_DecodeGroup] = []
        self._prefill: list[_PrefillRow] = []

    @classmethod
    def supports(
        cls, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, device: torch.device
    ) -> str | None:
        if not dtype.is_floating_point:
            return f"dtype {dtype} is not a float type"
        if kv_dtype != dtype:
            return f"the KV cache must have the model's dtype {dtype}, not {kv_dtype}"
        return None

    def prepare(self, meta: AttentionMetadata) -> None:
        seq_lens: list[int] = meta.seq_lens.tolist()
        starts: list[int] = meta.query_start_loc.tolist()
        num_decode = meta.num_decode_rows
        self._decode = self._decode_groups(meta, seq_lens[:num_decode])
        self._prefill = [
            self._prefill_row(meta.block_table[row], starts[row], starts[row + 1], seq_lens[row])
            for row in range(num_decode, len(seq_lens))
        ]

    def forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        out = self._forward(q, k_cache, v_cache, meta, scale * k_scale)
        return out if v_scale == 1.0 else out * v_scale

    def _forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        if not self._prefill and len(self._decode) == 1 and self._decode[0].rows is None:
            return self._decode_group(self._decode[0], q, k_cache, v_cache, scale)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # padding rows are in no group
        for group in self._decode:
            rows = slice(0, meta.num_decode_rows) if group.rows is None else group.rows
            out[rows] = self._decode_group(group, q[rows], k_cache, v_cache, scale)
        for row in self._prefill:
            keys, values = _gather(k_cache, row.blocks, 1), _gather(v_cache, row.blocks, 1)
            for start, end, seen, mask in row.chunks:
                queries = q[start:end].unsqueeze(0).transpose(1, 2)
                found = scaled_dot_product_attention(
                    queries,
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=True,
                )
                out[start:end] = found[0].transpose(0, 1)
        return out

    def _decode_groups(self, meta: AttentionMetadata, lengths: list[int]) -> list[_DecodeGroup]:
        """Rows, longest first, cut where a row is at most half as long as its group's longest or the group is full."""
        num_blocks = [ceil(length / self.block_size) for length in lengths]
        members: list[list[int]] = []
        real = [row for row in range(len(lengths)) if lengths[row]]
        for row in sorted(real, key=lambda row: -lengths[row]):
            longest = num_blocks[members[-1][0]] if members else 0
            full = bool(members) and (len(members[-1]) + 1) * longest * self.block_size > GROUP_TOKENS
            if not members or full or 2 * num_blocks[row] <= longest:
                members.append([row])
            else:
                members[-1].append(row)
        one = len(members) == 1 and len(real) == len(lengths)
        return [self._make_group(meta, sorted(rows), lengths, every=one) for rows in members]

    def _make_group(self, meta: AttentionMetadata, rows: list[int], lengths: list[int], every: bool) -> _DecodeGroup:
        device = meta.block_table.device
        index = torch.tensor(rows, device=device)
        length = max(lengths[row] for row in rows)
        num_blocks = ceil(length / self.block_size)
        table = meta.block_table[: len(rows)] if every else meta.block_table[index]
        blocks = table[:, :num_blocks].long()
        mask = stale = None
        if any(lengths[row] != length for row in rows):
            row_lens = [lengths[row] for row in rows]
            lens = torch.tensor(row_lens, device=device).unsqueeze(1)
            # Past a row's end the table is unspecified, and slots of the last block may hold anything, NaN too, which
            # no weight of 0 takes away. So a block that is full of keys stands in, and those slots are zeroed.
            full = blocks[row_lens.index(length), 0]
            blocks = blocks.where(torch.arange(num_blocks, device=device) * self.block_size < lens, full)
            ends = [(r * num_blocks * self.block_size + n, -n % self.block_size) for r, n in enumerate(row_lens)]
            stale = torch.tensor([slot + i for slot, count in ends for i in range(count)], device=device)
            mask = torch.zeros(len(rows), 1, 1, length, dtype=self.dtype, device=device)
            mask.masked_fill_((torch.arange(length, device=device) >= lens)[:, None, None], float("-inf"))
        return _DecodeGroup(None if every else index, blocks.flatten(), stale, length, mask)

    def _prefill_row(self, table: Tensor, start: int, end: int, length: int) -> _PrefillRow:
        blocks = table[: ceil(length / self.block_size)].long()
        prefix = length - (end - start)
        chunks: list[tuple[int, int, int, Tensor | None]] = [(start, end, length, None)]
        if prefix:
            chunks = []
            for first in range(start, end, QUERY_CHUNK):
                last = min(first + QUERY_CHUNK, end)
                seen = prefix + last - start
                mask = torch.full((last - first, seen), float("-inf"), dtype=self.dtype, device=table.device)
                chunks.append((first, last, seen, mask.triu_(prefix + first - start + 1)))
        return _PrefillRow(start, end, blocks, length, chunks)

    def _decode_group(self, group: _DecodeGroup, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """q: [n, num_heads, head_dim], one token a row; returns the same shape."""
        keys = _gather(k_cache, group.blocks, len(q), group.stale)[:, :, : group.length]
        values = _gather(v_cache, group.blocks, len(q), group.stale)[:, :, : group.length]
        found = scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, attn_mask=group.mask, scale=scale, enable_gqa=True
        )
        return found.squeeze(2)


def _gather(cache: Tensor, blocks: Tensor, num_rows: int, stale: Tensor | None = None) -> Tensor:
    """Blocks of a cache as [num_rows, num_kv_heads, tokens, head_dim] (a view of one copy, tokens outermost).

    stale: int64, slots among the gathered ones that are set to 0.
    """
    picked = cache.flatten(1).index_select(0, blocks)
    if stale is not None and stale.numel():
        picked.view(-1, cache.shape[2] * cache.shape[3]).index_fill_(0, stale, 0)
    return picked.view(num_rows, -1, *cache.shape[2:]).transpose(1, 2)
