"""RMSNorm, with or without the residual add before it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.norm import rms_norm, sum_add_rms_norm
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.weight_spec import WeightSpec, meta_parameter


class RMSNorm(nn.Module):
    """forward(x, residual) returns (normed, new residual); all [num_tokens, size]; statistics in float32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, group: ParallelGroup = SINGLE) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        self.weight = meta_parameter(size, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without a residual: normalises x, which is the residual from then on.

        With one: x is a partial sum of each rank of the group, as a row-parallel product leaves it; their sum with the
        residual is the new one and is normalised. x and residual may be overwritten. In a group of one x may be the
        parts of a sum, [n, num_tokens, size].
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        if x.dim() > residual.dim():
            return sum_add_rms_norm(x, residual, self.weight, self.eps)
        return self.group.all_reduce_add_rms_norm(x, residual, self.weight, self.eps)

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        yield WeightSpec(f"{name}.weight", self, "weight", tuple(self.weight.shape))
