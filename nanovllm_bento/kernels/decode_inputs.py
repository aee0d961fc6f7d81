"""The start of a decode step on the device: from slots to the step's inputs.

It keeps the host out of a decode step, which names each row's slot, position and newest block, and nothing else. The
tokens fed are those that sampling left with the slots (``sample_rows``).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(slots=True)
class DecodeInputs:
    """What a decode step computes on, one row a sequence; made once and overwritten each step (CUDA graphs read it).

    input_ids, positions, slot_mapping, slots, next_positions: int64 [num_rows]; seq_lens: int32 [num_rows];
    block_table: int32 [num_rows, max_blocks]. A padding row has slot -1, no context (seq_lens 0) and stores nothing.
    """

    input_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    slots: Tensor
    next_positions: Tensor

    @classmethod
    def allocate(cls, num_rows: int, max_blocks: int, device: torch.device) -> Self:
        """For up to num_rows sequences of up to max_blocks blocks; all of them padding at first."""
        ids, positions, mapping, slots, following = (
            torch.full((num_rows,), fill, dtype=torch.int64, device=device) for fill in (0, 0, -1, -1, 0)
        )
        lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        table = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        return cls(ids, positions, lens, mapping, table, slots, following)

    def rows(self, num_rows: int) -> "DecodeInputs":
        """Views of the first num_rows rows."""
        return DecodeInputs(
            self.input_ids[:num_rows],
            self.positions[:num_rows],
            self.seq_lens[:num_rows],
            self.slot_mapping[:num_rows],
            self.block_table[:num_rows],
            self.slots[:num_rows],
            self.next_positions[:num_rows],
        )


def decode_inputs(rows: Tensor, block_tables: Tensor, last_tokens: Tensor, out: DecodeInputs, block_size: int) -> None:
    """Fill ``out`` for the decode rows named in ``rows``.

    rows: int32 [num_rows, 3], each (slot, position of the token to feed, block that its key and value go to); slot -1:
    padding; block -1: they are not stored. block_tables: int32 [num_slots, max_blocks], by slot; the row's block is
    entered at its place first. Positions are advanced by one: rows are then right for the next token, if it goes into
    the same block.
    last_tokens: int64 [num_slots], the token to feed.
    """
    if rows.is_cuda:
        from nanovllm_bento.kernels.decode_inputs_triton import launch_decode_inputs

        launch_decode_inputs(rows, block_tables, last_tokens, out, block_size)
    else:
        decode_inputs_reference(rows, block_tables, last_tokens, out, block_size)


def decode_inputs_reference(
    rows: Tensor, block_tables: Tensor, last_tokens: Tensor, out: DecodeInputs, block_size: int
) -> None:
    for row, (slot, position, block) in enumerate(rows.tolist()):
        used = slot >= 0
        index = position // block_size
        out.slots[row] = slot
        if used:
            rows[row, 1] = position + 1
        out.input_ids[row] = last_tokens[slot] if used else 0
        out.positions[row] = position if used else 0
        out.next_positions[row] = position + 1 if used else 0
        out.seq_lens[row] = position + 1 if used else 0
        out.slot_mapping[row] = block * block_size + position % block_size if used and block >= 0 else -1
        if used:
            if block >= 0:
                block_tables[slot, index] = block
            out.block_table[row, : index + 1] = block_tables[slot, : index + 1]
