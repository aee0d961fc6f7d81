"""What kernels/embedding.py is to do, for any device: the launcher in the interpreter, the dispatch elsewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[..., Tensor]


def check_embedding(op: Op, num_rows: int, n: int, dtype: torch.dtype, device: str) -> None:
    """Each token's row, bit by bit, in any order and more than once."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(num_rows, n, generator=generator).to(dtype)
    ids = torch.cat([torch.randint(num_rows, (6,), generator=generator), torch.tensor([num_rows - 1, 0, 0])])
    found = op(ids.to(device), weight.to(device), 0)
    assert found.dtype == dtype and torch.equal(found.cpu(), weight[ids])


def check_ids_without_a_row(op: Op, device: str) -> None:
    """They take the nearest row; ``first`` may be negative, as a first rank's row of zeros is."""
    weight = torch.arange(5 * 40.0).view(5, 40)
    for first in (-1, 8, 15):
        ids = torch.tensor([first - 1, first, first + 3, first + 4, first + 5, 0, 2**40, -(2**40)])
        found = op(ids.to(device), weight.to(device), first)
        assert torch.equal(found.cpu(), weight[(ids - first).clamp(0, 4)])


def check_ids_at_any_address(op: Op, device: str) -> None:
    """Ids are views into a step's static tensors."""
    weight, ids = torch.randn(30, 48), torch.randint(30, (3, 11))
    for row, on_device in zip(ids, ids.to(device), strict=True):
        assert torch.equal(op(on_device, weight.to(device), 0).cpu(), weight[row])


def check_no_tokens(op: Op, device: str) -> None:
    ids = torch.empty(0, dtype=torch.int64, device=device)
    assert op(ids, torch.ones(3, 8, device=device), 0).shape == (0, 8)
