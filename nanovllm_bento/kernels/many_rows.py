"""Linears of more rows than split_k.py's, prompts above all, with what is around them: norm, activation, residual add.

Such products are bound by the tensor cores, and what is around them by memory. The library's product adds the residual
as it stores its result, which then is rounded once; the norm after it reads one tensor instead of two, and writes one.
"""

import torch
from torch import Tensor

from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.norm import rms_norm

MIN_ROWS = split_k.MAX_ROWS + 1


def supports(rows: int, device: torch.device) -> bool:
    """Whether these are worth it for ``rows`` rows. They compute any number, and on any device."""
    return rows >= MIN_ROWS and device.type == "cuda"


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rms_norm(x) @ weight.T + bias; x: [rows, k], norm_weight: [k], weight: [n, k], bias: [n]. Returns [rows, n]."""
    return torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual += x @ weight.T + bias, in place; x: [rows, k], residual: [rows, n], which is returned."""
    if bias is not None:
        residual += bias
    return residual.addmm_(x, weight.t())


def norm_gate_up(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """silu(g) * u of [g | u] = rms_norm(x) @ weight.T; x: [rows, k], weight: [2n, k]. Returns [rows, n]."""
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight, None))
