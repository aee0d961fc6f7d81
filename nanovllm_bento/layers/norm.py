"""RMSNorm, with or without the residual add before it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.norm import add_rms_norm, rms_norm
from nanovllm_bento.layers.weight_spec import WeightSpec, meta_parameter


class RMSNorm(nn.Module):
    """forward(x, residual) returns (normed, new residual); all [num_tokens, size]; statistics in float32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = meta_parameter(size, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """With a residual: normalises x + residual, which is the new residual (x may be overwritten); else x."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        yield WeightSpec(f"{name}.weight", self, "weight", tuple(self.weight.shape))
