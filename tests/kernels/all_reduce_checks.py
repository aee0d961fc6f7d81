"""Ranks of an all-reduce that share one device and one process: their workspaces, what they put in, what must come out.

For Triton's interpreter, which runs one rank after another, and for one GPU, where each rank has a stream of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm_bento.kernels.all_reduce import EMPTY, Workspace, all_reduce_add_rms_norm_reference, all_reduce_reference

EPS = 1e-5
ITEM = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass
class Ranks:
    """Workspaces of ``size`` ranks whose inboxes all lie on ``device``."""

    workspaces: list[Workspace]
    inboxes: list[Tensor]  # of each rank: int32 [turn, row, source, word]

    @classmethod
    def on(cls, device: str, size: int, max_rows: int, row_bytes: int, max_programs: int = 0) -> "Ranks":
        shape = (2, max_rows, size, row_bytes // 4)
        inboxes = [torch.full(shape, EMPTY, dtype=torch.int32, device=device) for _ in range(size)]
        assert inboxes[0].numel() * 4 == Workspace.inbox_bytes(size, max_rows, row_bytes)
        addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], device=device)
        workspaces = [
            Workspace(
                rank,
                size,
                max_rows,
                row_bytes,
                addresses,
                torch.zeros(max_rows, dtype=torch.int32, device=device),
                max_polls=50_000_000,
                max_programs=max_programs,
            )
            for rank in range(size)
        ]
        return cls(workspaces, inboxes)

    def all_empty(self) -> bool:
        return all(bool((inbox == EMPTY).all()) for inbox in self.inboxes)


def parts_of(size: int, rows: int, n: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Each rank's part, on the CPU; with zeros of both signs, whose words look like those of an empty inbox."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, n, generator=generator).to(dtype) for _ in range(size)]
    for part in parts:
        part[:, : n // 4] = -0.0
        part[0, n // 4 : n // 2] = 0.0
    return parts


def check_sum(found: Tensor, parts: list[Tensor], *, truncates: bool = False) -> None:
    """To the bit, but for the interpreter, which truncates where it converts to bfloat16."""
    wanted = all_reduce_reference(parts)
    if truncates:
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-6)
    else:
        assert torch.equal(found.cpu(), wanted)


def check_norm(
    normed: Tensor, total: Tensor, parts: list[Tensor], residual: Tensor, weight: Tensor, *, truncates: bool = False
) -> None:
    """All given on the CPU but what was found."""
    wanted, wanted_total = all_reduce_add_rms_norm_reference(parts, residual.clone(), weight, EPS)
    coarse = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[normed.dtype]
    if truncates:
        torch.testing.assert_close(total.cpu(), wanted_total, rtol=2e-2, atol=2e-2)
        coarse *= 3
    else:
        assert torch.equal(total.cpu(), wanted_total)
    torch.testing.assert_close(normed.cpu(), wanted, rtol=coarse, atol=coarse)
