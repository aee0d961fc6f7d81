"""Linear layers: several checkpoint matrices over the same input merged into one product, or just one."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.layers.weight_spec import WeightSpec, meta_parameter


class MergedLinear(nn.Module):
    """y = x W^T + b with W [sum of out_features, in_features], the parts stacked in the order given.

    parts: checkpoint module name -> its out_features. shard_dim: which dimension of each part's weight
    tensor-parallel ranks will split: 0 (column parallel) or 1 (row parallel, then the bias is not split).
    """

    weight: nn.Parameter | None

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype, shard_dim: int = 0
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.shard_dim = shard_dim
        out_features = sum(parts.values())
        self.weight = meta_parameter(out_features, in_features, dtype=dtype)
        self.bias = meta_parameter(out_features, dtype=dtype) if bias else None
        self.packed: Tensor | None = None
        self.batch_invariant = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]."""
        return linear(x, self.weight, self.bias, self.packed, batch_invariant=self.batch_invariant)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        row = 0
        for part, rows in self.parts.items():
            name = f"{prefix}{part}"
            yield WeightSpec(f"{name}.weight", self, "weight", (rows, self.in_features), row, self.shard_dim)
            if self.bias is not None:
                yield WeightSpec(f"{name}.bias", self, "bias", (rows,), row, 0 if self.shard_dim == 0 else None)
            row += rows

    def finalize(self) -> None:
        """Pack the weight if that pays on this device, and drop the plain copy then."""
        assert self.weight is not None
        self.packed = pack_weight(self.weight.data)
        if self.packed is not None:
            self.weight = None
