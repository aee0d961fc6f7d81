"""The gated activation of the MLP: silu(gate) * up (Shazeer 2020, SwiGLU)."""

import torch
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up with x = [gate | up]: [num_tokens, 2 * n]. Returns [num_tokens, n] in x's dtype.

    silu is computed in float32 and rounded to x's dtype before the product. On CUDA x is contiguous.
    """
    if x.is_cuda:
        from nanovllm_bento.kernels.activation_triton import silu_and_mul as on_cuda

        return on_cuda(x)
    return silu_and_mul_reference(x)


def silu_and_mul_reference(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]).mul_(x[..., half:])
