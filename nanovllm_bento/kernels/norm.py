"""RMSNorm, alone and with the residual add before it (Zhang and Sennrich 2019). Statistics in float32.

The normalised value is rounded to x's dtype before the weight, as the models were trained; a sum with the residual is
rounded first and then normalised. A row's result does not depend on the other rows or on how many there are.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., n], weight: [n]. Returns x's dtype.

    On CUDA: x contiguous, n at most 16384 or so (a row is one program's registers).
    """
    if x.is_cuda:
        from nanovllm_bento.kernels.norm_triton import rms_norm as on_cuda

        return on_cuda(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x, residual: [..., n] of one dtype, weight: [n].

    x and residual may be overwritten: use only what is returned. (On CUDA nothing is allocated: the norm is returned
    in x, the sum in residual; both must be contiguous.)
    """
    if x.is_cuda:
        from nanovllm_bento.kernels.norm_triton import add_rms_norm as on_cuda

        return on_cuda(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def sum_add_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` of an x that lies in parts, to be added up in their order: float32 [n_parts, ..., n].

    Parts and residual are rounded once, as a sum. residual may be overwritten, as there.
    """
    if parts.is_cuda:
        from nanovllm_bento.kernels.norm_triton import sum_add_rms_norm as on_cuda

        return on_cuda(parts, residual, weight, eps)
    return sum_add_rms_norm_reference(parts, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    normed = torch.nn.functional.rms_norm(x.float(), weight.shape, None, eps)
    return normed.to(x.dtype) * weight


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x.add_(residual)
    return rms_norm_reference(residual, weight, eps), residual


def sum_add_rms_norm_reference(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = (residual.float() + parts.sum(0)).to(residual.dtype)
    return rms_norm_reference(residual, weight, eps), residual
