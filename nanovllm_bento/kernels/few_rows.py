"""Which kernels compute the linears of a decode step: skinny.py up to 16 rows, split_k.py up to 256, else cuBLAS."""

from typing import Protocol

import torch
from torch import Tensor

from nanovllm_bento.kernels import skinny, split_k


class FewRows(Protocol):
    """A module of such products; each says what its functions compute. Weights are [out_features, in_features]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def linear_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def gate_up(self, x: Tensor, weight: Tensor) -> Tensor: ...


def choose_products(
    rows: int, dtype: torch.dtype, device: torch.device, hidden_size: int, ranks: int
) -> FewRows | None:
    """None: nothing better than cuBLAS. In a group of several ranks sums must be whole before they are exchanged."""
    if skinny.supports(rows, dtype, device, hidden_size):
        return skinny
    return split_k if ranks == 1 and split_k.supports(rows, dtype, device) else None
