"""Triton source of kernels/decode_inputs.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl

if TYPE_CHECKING:
    from nanovllm_bento.kernels.decode_inputs import DecodeInputs


@triton.jit
def _decode_inputs(
    rows,
    block_tables,
    last_tokens,
    input_ids,
    positions,
    seq_lens,
    slot_mapping,
    block_table,
    slots,
    next_positions,
    tables_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(rows + row * 3).to(tl.int64)
    position = tl.load(rows + row * 3 + 1)
    block = tl.load(rows + row * 3 + 2)
    used = slot >= 0
    index = position // BLOCK_SIZE
    tl.store(slots + row, slot)
    tl.store(input_ids + row, tl.load(last_tokens + slot, mask=used, other=0))
    tl.store(positions + row, tl.where(used, position, 0).to(tl.int64))
    tl.store(next_positions + row, tl.where(used, position + 1, 0).to(tl.int64))
    tl.store(seq_lens + row, tl.where(used, position + 1, 0))
    tl.store(rows + row * 3 + 1, position + 1, mask=used)
    where = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    stores = used & (block >= 0)
    tl.store(slot_mapping + row, tl.where(stores, where, -1))
    tl.store(block_tables + slot * tables_stride + index, block, mask=stores)
    num_entries = tl.where(used, index + 1, 0)
    for start in range(0, num_entries, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        mask = entries < num_entries
        ids = tl.load(block_tables + slot * tables_stride + entries, mask=mask, other=0)
        ids = tl.where((entries == index) & stores, block, ids)  # whether or not the store above is seen yet
        tl.store(block_table + row.to(tl.int64) * table_stride + entries, ids, mask=mask)


def launch_decode_inputs(
    rows: Tensor, block_tables: Tensor, last_tokens: Tensor, out: "DecodeInputs", block_size: int
) -> None:
    pdl = use_pdl(rows.device)
    _decode_inputs[(rows.shape[0],)](
        rows,
        block_tables,
        last_tokens,
        out.input_ids,
        out.positions,
        out.seq_lens,
        out.slot_mapping,
        out.block_table,
        out.slots,
        out.next_positions,
        block_tables.stride(0),
        out.block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=128,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
