"""Static inputs of a step of prompts, which its CUDA graph reads."""

import numpy as np
import torch
from torch import Tensor

from nanovllm_bento.engine.cuda_graphs import PromptShape
from nanovllm_bento.engine.step_inputs import TokenStep


class PromptBuffers:
    """tokens: int64 [3, max_num_tokens], ids, positions and slot mapping. query_start_loc: int32 [max_rows + 1].
    seq_lens: int32 [max_rows]. tables: int32 [max_rows, max_blocks].

    A padding token belongs to no row and is not stored; a padding row has no tokens and no context.
    """

    def __init__(self, max_num_tokens: int, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.tokens = torch.zeros(3, max_num_tokens, dtype=torch.int64, device=device)
        self.tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self._rows = torch.zeros(2 * max_rows + 1, dtype=torch.int32, device=device)
        self.query_start_loc, self.seq_lens = self._rows.split((max_rows + 1, max_rows))

    def clear(self) -> None:
        """Enqueue that all tokens and rows become padding."""
        self.tokens[:2].zero_()
        self.tokens[2].fill_(-1)
        self._rows.zero_()

    def fill(self, inputs: TokenStep, shape: PromptShape, tables: Tensor) -> None:
        """Enqueue the copy of a step's inputs, padded to ``shape``. tables: inputs.tables on the device."""
        num_tokens, num_rows = len(inputs.positions), len(inputs.seq_lens)
        tokens = np.zeros((3, shape[0]), np.int64)
        tokens[0, :num_tokens], tokens[1, :num_tokens] = inputs.prompt_ids, inputs.positions
        tokens[2, :num_tokens], tokens[2, num_tokens:] = inputs.slot_mapping, -1
        self.tokens[:, : shape[0]].copy_(put(tokens, self.tokens.device), non_blocking=True)
        max_rows = len(self.seq_lens)
        rows = np.zeros(2 * max_rows + 1, np.int32)
        rows[: num_rows + 1], rows[num_rows + 1 : max_rows + 1] = inputs.query_start_loc, num_tokens
        rows[max_rows + 1 : max_rows + 1 + num_rows] = inputs.seq_lens
        self._rows.copy_(put(rows, self.tokens.device), non_blocking=True)
        self.tables[:num_rows, : tables.shape[1]].copy_(tables)


def put(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, enqueued from pinned memory; on a CPU the very memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
