"""Linears of a step of prompts with what is around them: norm, gated activation, residual add.

Such products are bound by the tensor cores, and what is around them by memory: a norm, an activation or an add that is
a kernel of its own takes a quarter of the time of the product beside it. The library's product adds the residual as it
stores its result, which then is rounded once; the norm after it reads one tensor instead of two and writes one less.
The gated activation is computed where the two halves of its input are, in registers (gate_up_triton.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.launch import has_triton
from nanovllm_bento.kernels.norm import rms_norm

MIN_ROWS = split_k.MAX_ROWS + 1


class Config(NamedTuple):
    """How gate_up_triton's kernel is cut: tiles of block_m rows by block_n columns of both halves of the weight."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    pieces: int  # that a tile is stored in
    band: int  # rows of tiles that are worked on side by side
    num_warps: int = 8


FUSE = False
CONFIG = Config(128, 128, 64, 4, 2, 8)


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
    return gate_up(rms_norm(x, norm_weight, eps), weight)


def gate_up(x: Tensor, weight: Tensor) -> Tensor:
    """silu(g) * u of [g | u] = x @ weight.T; x: [rows, k], weight: [2n, k]. Returns [rows, n]."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    if x.is_cuda and is_fused(x.shape[0], n, k, x.dtype):
        from nanovllm_bento.kernels.gate_up_triton import launch

        return launch(x, weight, x.new_empty(x.shape[0], n), CONFIG)
    return silu_and_mul(torch.nn.functional.linear(x, weight))


def is_fused(rows: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether gate_up_triton's kernel takes the shape and beats the library's product and an activation."""
    return FUSE and rows >= MIN_ROWS and k <= 1024 and dtype == torch.bfloat16 and has_triton()
