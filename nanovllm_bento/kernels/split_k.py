"""Linears of a decode batch of 17 to MAX_ROWS rows: tensor-core tiles, the inner dimension shared among programs.

At these sizes cuBLAS takes 6 to 9 µs for a matrix whose bytes take 1 to 4: each product waits for the kernel ahead of
it before it asks for its first weight, and a product of few columns has work for few multiprocessors. The Triton kernel
(split_k_triton.py says how) does neither. Where its programs share the inner dimension it leaves their sums apart, to
be added by the norm that follows (kernels/norm.py), which has to read the result anyway.

Used where a measured configuration beats cuBLAS, TUNED says which; all else is left to cuBLAS. A row's result does not
vary from run to run, but may with the number of rows.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.launch import has_triton
from nanovllm_bento.kernels.skinny import is_gated

MIN_ROWS, MAX_ROWS = 17, 256
ROWS = (32, 40, 64, 96, 128, 224, 240, 256)
"""What numbers of rows are rounded up to.

A tile has as many rows as the next power of two. Far below that cuBLAS, whose tiles have other heights, is faster: in
the engine by 0.4 ms of 3.4 a step at 80 rows; at 40 rows for two products of the four."""


class Config(NamedTuple):
    """How a product is cut. A program computes block_m rows by block_n columns (of both matrices of a gated one)."""

    block_m: int
    block_n: int
    block_k: int
    splits: int  # programs that share the inner dimension; more than one: their sums stay apart
    stages: int
    num_warps: int
    prefetch: bool  # whether weights are called into L2 before the wait for the kernel ahead


TUNED: dict[tuple[str, int, int, int], Config] = {
    ("linear", 32, 4096, 1024): Config(32, 32, 128, 1, 4, 4, True),
    ("linear_parts", 32, 1024, 2048): Config(32, 64, 64, 4, 4, 4, True),
    ("gate_up", 32, 3072, 1024): Config(32, 64, 128, 1, 3, 4, True),
    ("linear_parts", 32, 1024, 3072): Config(32, 32, 128, 4, 4, 4, True),
    ("linear_parts", 40, 1024, 2048): Config(64, 64, 64, 4, 6, 4, True),
    ("linear_parts", 40, 1024, 3072): Config(64, 64, 64, 8, 6, 4, True),
    ("linear", 64, 4096, 1024): Config(64, 32, 128, 1, 4, 4, True),
    ("linear_parts", 64, 1024, 2048): Config(64, 32, 128, 2, 4, 4, True),
    ("gate_up", 64, 3072, 1024): Config(64, 32, 128, 1, 4, 4, True),
    ("linear_parts", 64, 1024, 3072): Config(64, 32, 128, 3, 4, 4, True),
    ("linear", 64, 151936, 1024): Config(64, 128, 64, 1, 6, 8, False),
    ("linear", 128, 4096, 1024): Config(64, 64, 64, 1, 6, 4, False),
    ("linear_parts", 128, 1024, 2048): Config(128, 32, 64, 4, 6, 8, False),
    ("gate_up", 128, 3072, 1024): Config(64, 64, 64, 1, 6, 4, False),
    ("linear_parts", 128, 1024, 3072): Config(128, 32, 64, 4, 6, 8, True),
    ("linear_parts", 240, 1024, 2048): Config(128, 64, 64, 4, 6, 4, False),
    ("linear_parts", 240, 1024, 3072): Config(128, 64, 64, 4, 6, 8, False),
    ("linear", 256, 4096, 1024): Config(128, 64, 64, 1, 6, 8, True),
    ("linear_parts", 256, 1024, 2048): Config(128, 64, 64, 4, 6, 4, False),
    ("linear_parts", 256, 1024, 3072): Config(128, 64, 64, 4, 6, 8, False),
}
"""(operation, rows rounded up to one of ROWS, n, k) -> measured best.

16-bit numbers, an H100: from 65 rows on in a chain of layers (benchmarks/split_k_tune.py), 128's "linear" and "gate_up"
in the engine, beside attention (benchmarks/decode_tune.py); up to 64 rows there too, by hand (no file kept), like ROWS,
256's "linear", the LM head."""


def supports(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``rows`` rows may have a configuration here."""
    return (
        MIN_ROWS <= rows <= MAX_ROWS
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and has_triton()
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, config: Config | None = None, out: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias, rounded once; x: [rows, k], its rows may be apart, weight: [n, k], bias: [n].

    Returns [rows, n], in ``out`` (contiguous) if given. config (with one split) is chosen by the shape if not given.
    """
    config = config or choose_config("linear", x.shape[0], *weight.shape)
    if config is None:
        found = torch.nn.functional.linear(x, weight, bias)
        return found if out is None else out.copy_(found)
    return _launch("linear", x, weight, bias, config, out)[0]


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, *, config: Config | None = None) -> Tensor:
    """``linear``, or float32 [splits, rows, n], to be summed over the first dimension."""
    config = config or choose_config("linear_parts", x.shape[0], *weight.shape)
    if config is None:
        return torch.nn.functional.linear(x, weight, bias)
    return _launch("linear_parts", x, weight, bias, config)


def gate_up(x: Tensor, weight: Tensor, *, config: Config | None = None) -> Tensor:
    """silu(g) * u of [g | u] = x @ weight.T; x: [rows, k], weight: [2n, k]. Returns [rows, n]."""
    config = config or choose_config("gate_up", x.shape[0], weight.shape[0] // 2, weight.shape[1])
    if config is None:
        return silu_and_mul(torch.nn.functional.linear(x, weight))
    return _launch("gate_up", x, weight, None, config)[0]


def _launch(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, out: Tensor | None = None
) -> Tensor:
    from nanovllm_bento.kernels.split_k_triton import launch

    n = weight.shape[0] // 2 if is_gated(operation) else weight.shape[0]
    dtype = torch.float32 if operation == "linear_parts" else x.dtype
    parts = x.new_empty(config.splits, x.shape[0], n, dtype=dtype) if out is None else out[None]
    return launch(operation, x, weight, parts, config, bias)


def suits(config: Config, n: int, k: int) -> bool:
    """Whether ``config`` cuts a weight [n, k] without rest."""
    return n % config.block_n == 0 and k % (config.splits * config.block_k) == 0


@cache
def choose_config(operation: str, rows: int, n: int, k: int) -> Config | None:
    """How to compute an operation of this module; None: leave it to cuBLAS."""
    return TUNED.get((operation, next((bound for bound in ROWS if bound >= rows), 0), n, k))
