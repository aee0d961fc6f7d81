"""RMSNorm, alone and with the residual add before it (Zhang and Sennrich 2019). Computed in float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., n], weight: [n]. Returns x's dtype."""
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x, residual: [..., n], weight: [n]. x may be overwritten."""
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    normed = torch.nn.functional.rms_norm(x.float(), weight.shape, None, eps)
    return normed.to(x.dtype) * weight  # rounds before the weight, as the models were trained


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x.add_(residual)
    return rms_norm_reference(residual, weight, eps), residual
