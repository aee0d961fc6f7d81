"""What every MLP of a decoder layer has: a plain forward, and forms of it with a step's own products."""

from collections.abc import Iterator

from torch import Tensor, nn

from nanovllm_bento.kernels.products import FewRows, FusedProducts
from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.weight_spec import WeightSpec


class MLP(nn.Module):
    """A subclass gives ``forward`` (x: [num_tokens, hidden_size] -> this rank's partial sum of the same shape).

    It may give faster forms of the two below, for steps that kernels/products.py has kernels for.
    """

    def forward_fused(self, products: FusedProducts, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden + mlp(norm(hidden)), in a group of one; hidden: [num_tokens, hidden_size], may be overwritten."""
        x, residual = norm(hidden, None)
        return residual.add_(self(x))

    def forward_by(self, products: FewRows, x: Tensor) -> Tensor:
        """``forward``; what is returned may be parts of the sum, as ``MergedLinear.parts_by`` gives them."""
        out: Tensor = self(x)
        return out

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """Every checkpoint tensor of this MLP, whose names begin with ``prefix``."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Bring the loaded weights into the form that runs."""
