"""Statements about kernels/decode_inputs.py, for any device."""

from typing import Any

import torch

from nanovllm_bento.kernels.decode_inputs import DecodeInputs, decode_inputs_reference

NUM_SLOTS, MAX_BLOCKS = 12, 300


def check_decode_inputs(launch: Any, device: torch.device, block_size: int) -> None:
    """``launch`` does what the reference does, rows of slot -1 included, and enters each row's block in its table."""
    generator = torch.Generator().manual_seed(block_size)
    tables = torch.randint(0, 10**6, (NUM_SLOTS, MAX_BLOCKS), generator=generator, dtype=torch.int32)
    last = torch.randint(0, 1000, (NUM_SLOTS,), generator=generator)
    longest = MAX_BLOCKS * block_size - 1
    rows = [(3, 0, 7), (11, block_size, 8), (-1, 5, 5), (0, longest, 99), (5, block_size * 140 + 3, 2**20), (-1, 0, 0)]
    rows.append((7, block_size * 20, -1))  # not stored
    rows_tensor = torch.tensor(rows, dtype=torch.int32)
    wanted, found = (DecodeInputs.allocate(len(rows), MAX_BLOCKS, d) for d in (torch.device("cpu"), device))
    found_tables = tables.to(device, copy=True)
    found_rows = rows_tensor.to(device, copy=True)
    launch(found_rows, found_tables, last.to(device), found, block_size)
    decode_inputs_reference(rows_tensor, tables, last, wanted, block_size)
    assert torch.equal(found_rows.cpu(), rows_tensor)
    assert rows_tensor.tolist() == [[slot, position + (slot >= 0), block] for slot, position, block in rows]
    for name in ("input_ids", "positions", "seq_lens", "slot_mapping", "slots", "next_positions", "block_table"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
    assert torch.equal(found_tables.cpu(), tables)
    assert wanted.slot_mapping.tolist()[3] == 99 * block_size + longest % block_size
    assert wanted.seq_lens.tolist() == [1, block_size + 1, 0, longest + 1, block_size * 140 + 4, 0, block_size * 20 + 1]
    assert wanted.slot_mapping.tolist()[-1] == -1
