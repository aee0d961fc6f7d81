"""Which kernels compute the linears of a step on a GPU, by its number of rows.

skinny.py up to 16 rows, split_k.py up to 256 in a group of one, many_rows.py beyond; where none of them applies,
kernels/linear.py's.
"""

from typing import Protocol

import torch
from torch import Tensor

from nanovllm_bento.kernels import many_rows, skinny, split_k


class FusedProducts(Protocol):
    """A module of products with what is around them; each says what its functions compute.

    Weights are [out_features, in_features]; a residual is overwritten with the sum.
    """

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor: ...
    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor: ...
    def norm_gate_up(self, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor: ...


class FewRows(Protocol):
    """A module of products for decode steps, norms and residual adds left out."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def linear_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def gate_up(self, x: Tensor, weight: Tensor) -> Tensor: ...


class HeadProduct(Protocol):
    """A module with a product that can write its result where it is wanted."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor: ...


def choose_fused(
    rows: int, dtype: torch.dtype, device: torch.device, hidden_size: int, ranks: int
) -> FusedProducts | None:
    """In a group of several ranks sums must be exchanged before a residual is added: none."""
    if ranks > 1:
        return None
    if skinny.supports(rows, dtype, device, hidden_size):
        return skinny
    return many_rows if many_rows.supports(rows, device) else None


def choose_products(
    rows: int, dtype: torch.dtype, device: torch.device, hidden_size: int, ranks: int
) -> FewRows | None:
    """None: nothing better than kernels/linear.py. In a group of several ranks sums must be whole to be exchanged."""
    if skinny.supports(rows, dtype, device, hidden_size):
        return skinny
    return split_k if ranks == 1 and split_k.supports(rows, dtype, device) else None


def choose_head(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> HeadProduct | None:
    """For an LM head [n, k]. None: nothing better than kernels/linear.py."""
    if rows <= skinny.VECTOR_ROWS and skinny.supports(rows, dtype, device):
        return skinny
    tuned = split_k.supports(rows, dtype, device) and split_k.choose_config("linear", rows, n, k) is not None
    return split_k if tuned else None
