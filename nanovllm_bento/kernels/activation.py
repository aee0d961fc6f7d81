"""The gated activation of the MLP: silu(gate) * up (Shazeer 2020, SwiGLU)."""

import torch
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up with x = [gate | up]: [num_tokens, 2 * n]. Returns [num_tokens, n] in x's dtype."""
    return silu_and_mul_reference(x)


def silu_and_mul_reference(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]).mul_(x[..., half:])
