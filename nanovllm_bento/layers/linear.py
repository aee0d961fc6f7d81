"""Linear layers: several checkpoint matrices over the same input merged into one product, or just one."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.kernels.products import FewRows
from nanovllm_bento.layers.weight_spec import Shard, WeightSpec, meta_parameter, whole


class MergedLinear(nn.Module):
    """y = x W^T + b with W [sum of out_features, in_features], the parts stacked in the order given.

    parts: checkpoint module name -> its out_features. A Shard instead of a number is what this rank holds of that
    dimension. Of out_features (column parallel): the results are this rank's columns. Of in_features (row parallel): x
    is this rank's columns, and the results are partial sums, to which one rank, the first, adds the bias.
    """

    weight: nn.Parameter | None

    def __init__(
        self, in_features: int | Shard, parts: Mapping[str, int | Shard], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.inputs = _shard(in_features)
        self.outputs = {name: _shard(part) for name, part in parts.items()}
        self.in_features = self.inputs.length
        out_features = sum(part.length for part in self.outputs.values())
        self.weight = meta_parameter(out_features, self.in_features, dtype=dtype)
        self.has_bias = bias
        self.bias = meta_parameter(out_features, dtype=dtype) if bias and self.inputs.start == 0 else None
        self.packed: Tensor | None = None
        self.batch_invariant = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]."""
        return linear(x, self.weight, self.bias, self.packed, batch_invariant=self.batch_invariant)

    def forward_by(self, products: FewRows, x: Tensor) -> Tensor:
        """The same for a decode step on a GPU that ``products`` supports."""
        assert self.weight is not None
        return products.linear(x, self.weight, self.bias)

    def parts_by(self, products: FewRows, x: Tensor) -> Tensor:
        """The same, or float32 [n, num_tokens, out_features], whose sum it is: what RMSNorm takes as its input."""
        assert self.weight is not None
        return products.linear_parts(x, self.weight, self.bias)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        row = 0
        for part, rows in self.outputs.items():
            yield WeightSpec.of(f"{prefix}{part}.weight", self, "weight", (rows, self.inputs), row)
            if self.has_bias:
                taken = rows if self.bias is not None else Shard(rows.size, 0, 0, 0)
                yield WeightSpec.of(f"{prefix}{part}.bias", self, "bias", (taken,), row)
            row += rows.length

    def finalize(self) -> None:
        """Pack the weight if that pays on this device, and drop the plain copy then."""
        assert self.weight is not None
        self.packed = pack_weight(self.weight.data)
        if self.packed is not None:
            self.weight = None


def _shard(size: int | Shard) -> Shard:
    return whole(size) if isinstance(size, int) else size
