"""Sums over the ranks of a tensor-parallel group, alone and fused with the residual add and RMSNorm after them.

The parts are summed in the order of the ranks, in float32 where they are narrower, and rounded once: the same bits on
every rank, and a row's result does not depend on the other rows or on how many there are.

A ``Workspace`` is the memory through which the ranks' kernels exchange small messages (all_reduce_triton.py says how);
``takes`` tells which those are. Larger ones belong to NCCL (layers/parallel.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_bento.kernels.norm import add_rms_norm_reference

EMPTY = -0x7FFF8000
"""What a word of an inbox holds while nothing has come: 0x80008000."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_BYTES = {2: 8 << 20, 3: 2 << 20, 4: 2 << 20, 5: 1 << 20, 6: 1 << 20, 7: 512 << 10, 8: 512 << 10}
"""World size -> the largest message for which one shot is taken. Each rank sends all of its part to every other, so
what pays shrinks with their number; of two ranks no way sends less."""


@dataclass(slots=True, eq=False)
class Workspace:
    """Inboxes of one group, for rows of up to row_bytes (a multiple of 16) and messages of up to max_rows rows.

    Only one stream may use it at a time, and every rank makes the same calls in the same order.
    """

    rank: int
    size: int
    max_rows: int
    row_bytes: int
    inboxes: Tensor  # int64 [size]: the address, on this device, of each rank's inboxes
    turns: Tensor  # int32 [max_rows], zeros at first
    max_polls: int = 2**31 - 1  # looks into an inbox (0.1 to 0.6 µs each) after which a kernel traps
    max_programs: int = 0  # 0: as many as the device has SMs; all must be able to run at once

    @staticmethod
    def inbox_bytes(size: int, max_rows: int, row_bytes: int) -> int:
        """Memory that each rank gives, all of it filled with EMPTY at first."""
        return 2 * max_rows * size * row_bytes

    def takes(self, x: Tensor) -> bool:
        """Whether x: [..., n] can go through this workspace."""
        row = x.shape[-1] * x.element_size() if x.dim() else 0
        return (
            0 < row <= self.row_bytes
            and row % 16 == 0
            and x.numel() <= self.max_rows * x.shape[-1]
            and x.dtype in DTYPES
            and x.is_contiguous()
            and x.data_ptr() % 16 == 0
        )


def all_reduce(x: Tensor, workspace: Workspace) -> Tensor:
    """The sum of all ranks' x: [..., n], which ``workspace.takes``; in x's memory. CUDA only."""
    from nanovllm_bento.kernels.all_reduce_triton import all_reduce as on_cuda

    return on_cuda(x, workspace)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """norm.add_rms_norm of ``all_reduce(x)``, without another trip to memory; the same arguments and results."""
    from nanovllm_bento.kernels.all_reduce_triton import all_reduce_add_rms_norm as on_cuda

    return on_cuda(x, residual, weight, eps, workspace)


def all_reduce_reference(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' parts, given in the ranks' order."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def all_reduce_add_rms_norm_reference(
    parts: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_rms_norm_reference(all_reduce_reference(parts), residual, weight, eps)
