"""What every MLP of a decoder layer has: a plain forward, and forms of it for the few rows of a small decode step."""

from collections.abc import Iterator

from torch import Tensor, nn

from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.weight_spec import WeightSpec


class MLP(nn.Module):
    """A subclass gives ``forward`` (x: [num_tokens, hidden_size] -> this rank's partial sum of the same shape).

    It may give faster forms of the two below, which are called where ``skinny.supports`` the step.
    """

    def forward_fused(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden + mlp(norm(hidden)), in a group of one; hidden: [num_tokens, hidden_size], may be overwritten."""
        x, residual = norm(hidden, None)
        return residual.add_(self(x))

    def forward_skinny(self, x: Tensor) -> Tensor:
        """``forward``, in a group of several ranks, where the norm must come after the sum over all of them."""
        out: Tensor = self(x)
        return out

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        """Every checkpoint tensor of this MLP, whose names begin with ``prefix``."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Bring the loaded weights into the form that runs."""
