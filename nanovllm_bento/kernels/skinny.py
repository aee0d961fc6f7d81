"""Linears of a decode batch (1 to MAX_ROWS rows) fused with what is around them: norm, gate, residual add.

At this size a layer is a stream of weights with a little arithmetic, so what counts is bytes in flight and the gaps
between kernels. The Triton kernels (skinny_triton.py says how) overlap each weight stream with the kernels ahead by
programmatic dependent launch. Which module takes larger batches: kernels/products.py. The references compute in float32
and round once.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.kernels.launch import has_triton
from nanovllm_bento.kernels.norm import rms_norm_reference

MAX_ROWS = 16
"""Measured on an H100: from 17 rows on cuBLAS, with kernels for the norms and the activation, is faster."""
VECTOR_ROWS = 2
"""Up to so many rows float32 lanes beat tensor cores, which always compute 16 rows."""


class Config(NamedTuple):
    """How a kernel is cut. A program computes block_n columns (of both matrices of a gated one)."""

    block_n: int
    block_k: int  # width of a tile; with split, of one warp's part of it
    prefetch: int  # tiles in flight, asked for before the wait for the kernel ahead
    num_warps: int = 1
    split: int = 0  # 0: vector_kernel; else matrix_kernel with so many slices of the inner dimension, one a warp
    block_m: int = 16  # rows that matrix_kernel computes, at least those there are


TUNED: dict[tuple[str, int, int, int], Config] = {
    ("norm_linear", 1, 4096, 1024): Config(2, 512, 1, 2, 0, 16),
    ("norm_linear", 2, 4096, 1024): Config(2, 256, 2, 1, 0, 16),
    ("norm_linear", 4, 4096, 1024): Config(16, 128, 2, 4, 4, 4),
    ("norm_linear", 8, 4096, 1024): Config(16, 128, 2, 4, 4, 8),
    ("norm_linear", 16, 4096, 1024): Config(16, 128, 2, 4, 4, 16),
    ("linear_add", 1, 1024, 2048): Config(4, 256, 8, 1, 0, 16),
    ("linear_add", 2, 1024, 2048): Config(4, 1024, 2, 4, 0, 16),
    ("linear_add", 4, 1024, 2048): Config(16, 128, 4, 4, 4, 4),
    ("linear_add", 8, 1024, 2048): Config(16, 64, 4, 8, 8, 8),
    ("linear_add", 16, 1024, 2048): Config(16, 128, 4, 4, 4, 16),
    ("norm_gate_up", 1, 3072, 1024): Config(4, 256, 4, 1, 0, 16),
    ("norm_gate_up", 2, 3072, 1024): Config(8, 256, 4, 4, 0, 16),
    ("norm_gate_up", 4, 3072, 1024): Config(8, 128, 2, 4, 4, 4),
    ("norm_gate_up", 8, 3072, 1024): Config(16, 128, 2, 4, 4, 8),
    ("norm_gate_up", 16, 3072, 1024): Config(16, 64, 4, 4, 4, 16),
    ("linear_add", 1, 1024, 3072): Config(2, 512, 6, 2, 0, 16),
    ("linear_add", 2, 1024, 3072): Config(4, 1024, 3, 4, 0, 16),
    ("linear_add", 4, 1024, 3072): Config(8, 128, 6, 4, 4, 4),
    ("linear_add", 8, 1024, 3072): Config(8, 128, 3, 8, 8, 8),
    ("linear_add", 16, 1024, 3072): Config(8, 128, 3, 8, 8, 16),
    ("norm_linear", 1, 6144, 4096): Config(4, 1024, 4, 4, 0, 16),
    ("norm_linear", 2, 6144, 4096): Config(4, 1024, 4, 4, 0, 16),
    ("linear_add", 1, 4096, 4096): Config(4, 256, 8, 1, 0, 16),
    ("linear_add", 2, 4096, 4096): Config(16, 128, 3, 4, 4, 4),
    ("norm_gate_up", 1, 12288, 4096): Config(1, 256, 16, 4, 0, 16),
    ("norm_gate_up", 2, 12288, 4096): Config(2, 1024, 4, 4, 0, 16),
    ("linear_add", 1, 4096, 12288): Config(4, 512, 8, 2, 0, 16),
    ("linear_add", 2, 4096, 12288): Config(2, 1024, 12, 4, 0, 16),
    ("linear", 1, 3072, 4096): Config(8, 1024, 4, 4, 0, 16),
    ("linear", 2, 3072, 4096): Config(4, 1024, 4, 4, 0, 16),
    ("linear", 1, 4096, 2048): Config(4, 256, 8, 1, 0, 16),
    ("linear", 2, 4096, 2048): Config(16, 128, 2, 8, 8, 4),
    ("gate_up", 1, 6144, 4096): Config(1, 256, 16, 4, 0, 16),
    ("gate_up", 2, 6144, 4096): Config(1, 1024, 4, 4, 0, 16),
    ("linear", 1, 4096, 6144): Config(4, 256, 8, 1, 0, 16),
    ("linear", 2, 4096, 6144): Config(1, 1024, 6, 4, 0, 16),
}
"""(operation, rows rounded up to a power of two, n, k) -> measured best, 16-bit dtypes.

0.6B's: in the engine, beside attention, as benchmarks/decode_tune.py does (by hand, no file kept). Others:
benchmarks/skinny_tune.py; those without a norm are of one of two tensor-parallel ranks, on an H200."""


def supports(rows: int, dtype: torch.dtype, device: torch.device, hidden_size: int = 0) -> bool:
    """Whether these kernels take ``rows`` rows of ``dtype`` on ``device``, and in a model so wide are worth it."""
    # Measured on an H100: with a hidden size of 4096 cuBLAS and kernels for the rest are as fast from 3 rows on.
    most = 2 if hidden_size >= 4096 else MAX_ROWS
    return (
        1 <= rows <= most
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and has_triton()
    )


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    config: Config | None = None,
) -> Tensor:
    """rms_norm(x) @ weight.T + bias; x: [rows, k], norm_weight: [k], weight: [n, k], bias: [n]. Returns [rows, n]."""
    if not x.is_cuda:
        return norm_linear_reference(x, norm_weight, eps, weight, bias)
    from nanovllm_bento.kernels.skinny_triton import launch

    out = x.new_empty(x.shape[0], weight.shape[0])
    return launch("norm_linear", x, weight, out, config, norm_weight, eps, bias)


def norm_gate_up(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, *, config: Config | None = None) -> Tensor:
    """silu(g) * u of [g | u] = rms_norm(x) @ weight.T; x: [rows, k], weight: [2n, k]. Returns [rows, n]."""
    if not x.is_cuda:
        return norm_gate_up_reference(x, norm_weight, eps, weight)
    from nanovllm_bento.kernels.skinny_triton import launch

    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return launch("norm_gate_up", x, weight, out, config, norm_weight, eps)


def gate_up(x: Tensor, weight: Tensor, *, config: Config | None = None) -> Tensor:
    """silu(g) * u of [g | u] = x @ weight.T; x: [rows, k], weight: [2n, k]. Returns [rows, n]."""
    if not x.is_cuda:
        return gate_up_reference(x, weight)
    from nanovllm_bento.kernels.skinny_triton import launch

    return launch("gate_up", x, weight, x.new_empty(x.shape[0], weight.shape[0] // 2), config)


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, config: Config | None = None
) -> Tensor:
    """residual += x @ weight.T + bias, in place, rounded once; x: [rows, k], residual: [rows, n], which is returned."""
    if not x.is_cuda:
        return residual.copy_(linear_add_reference(x, weight, bias, residual))
    from nanovllm_bento.kernels.skinny_triton import launch

    return launch("linear_add", x, weight, residual, config, bias=bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, config: Config | None = None, out: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias; x: [rows, k], weight: [n, k], bias: [n]. Returns [rows, n], in ``out`` if given."""
    if not x.is_cuda:
        found = linear_reference(x, weight, bias)
        return found if out is None else out.copy_(found)
    from nanovllm_bento.kernels.skinny_triton import launch

    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    return launch("linear", x, weight, out, config, bias=bias)


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear``: at this size nothing is left apart (split_k.py has a function of this name that may)."""
    return linear(x, weight, bias)


def norm_linear_reference(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_reference(rms_norm_reference(x, norm_weight, eps), weight, bias)


def norm_gate_up_reference(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    return gate_up_reference(rms_norm_reference(x, norm_weight, eps), weight)


def gate_up_reference(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = _linear_float32(x, weight, None).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def linear_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return (residual.float() + _linear_float32(x, weight, bias)).to(x.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear_float32(x, weight, bias).to(x.dtype)


def _linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def is_gated(operation: str) -> bool:
    """Whether the weight is two matrices, gate over up."""
    return operation.endswith("gate_up")


@cache
def choose_config(operation: str, rows: int, n: int, k: int, itemsize: int) -> Config:
    """The measured configuration of a shape, or one in whose spirit: weights of a whole program in flight, one wave."""
    bucket = 1 << (rows - 1).bit_length()
    if itemsize == 2 and (operation, bucket, n, k) in TUNED:
        return TUNED[operation, bucket, n, k]
    matrices = 2 if is_gated(operation) else 1
    if rows <= VECTOR_ROWS or itemsize == 4:  # float32 would lose its precision, or its speed, on tensor cores
        return _vector_config(rows, n, k, itemsize, matrices, normed=operation.startswith("norm"))
    return _matrix_config(n, k, matrices)


def _vector_config(rows: int, n: int, k: int, itemsize: int, matrices: int, normed: bool) -> Config:
    """16 KB of weight a warp is 128 registers a lane; sums of more rows, 8 registers a row and column, share them."""
    # One warp needs no barriers to add up; but with a norm each holds all of x, which must leave room for weights.
    num_warps = 1 if k <= (2048 if normed else 4096) else 4
    block_k = 256 * num_warps
    elements = num_warps * 32768 // (itemsize * matrices * (1 << rows.bit_length()))  # the warps' share of one matrix
    block_n = min(8, _floor_power_of_two(max(1, elements // k)))
    prefetch = min(-(-k // block_k), max(1, elements // (block_n * block_k)))
    return Config(block_n, block_k, prefetch, num_warps)


def _matrix_config(n: int, k: int, matrices: int) -> Config:
    """8 warps of 16 columns; 32 where there are several waves anyway, since each program reads and norms all of x."""
    split = 8 if k >= 1024 else 4
    block_n = 32 if matrices == 1 and n >= 4096 else 16
    tiles = -(-k // (split * 128))
    return Config(block_n, 128, min(tiles, 32 // (block_n * matrices)), split, split)


def _floor_power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)
