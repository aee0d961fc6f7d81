"""The MLP of a mixture of experts: a router and the experts it asks, each a gated MLP (Shazeer et al., 2017).

Ranks share the experts' work in one of two ways. By tensor parallelism each holds a part of every expert's inner size;
by expert parallelism each holds whole experts. Either way the router is on every rank, takes the same decisions there,
and the output is a partial sum, as that of any row-parallel product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.moe import experts_mlp, route
from nanovllm_bento.kernels.products import FusedProducts
from nanovllm_bento.layers.linear import MergedLinear
from nanovllm_bento.layers.mlp import MLP
from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.weight_spec import Shard, WeightSpec, meta_parameter, split, whole


class ExpertNames(NamedTuple):
    """What a checkpoint calls the block and the three matrices of an expert."""

    block: str
    gate: str
    up: str
    down: str


class MoEMLP(MLP):
    """gate_up: [local experts, 2 * inner, hidden], gate over up; down: [local experts, hidden, inner].

    In a checkpoint the weights are ``{block}.experts.{e}.{name}.weight``, that of the router ``{block}.gate.weight``.
    expert_parallel: ranks hold whole experts; where their number does not divide, some hold one more than others.

    Raises ConfigError if there are more ranks than experts to give to them.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool,
        dtype: torch.dtype,
        names: ExpertNames,
        group: ParallelGroup = SINGLE,
        expert_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.renormalize, self.names = num_experts, top_k, renormalize, names
        self.hidden = whole(hidden_size)
        if expert_parallel:
            if group.size > num_experts:
                raise ConfigError(
                    f"tensor_parallel_size={group.size} with enable_expert_parallel is more than the model's "
                    f"{num_experts} experts. Use fewer ranks, or leave enable_expert_parallel out."
                )
            bounds = [rank * num_experts // group.size for rank in (group.rank, group.rank + 1)]
            self.experts = range(*bounds)
            self.inner = whole(inner_size)
        else:
            self.experts = range(num_experts)
            self.inner = split(inner_size, group)
        self.router = MergedLinear(hidden_size, {"gate": num_experts}, bias=False, dtype=dtype)
        local, inner = len(self.experts), self.inner.length
        self.gate_up = meta_parameter(local, 2 * inner, hidden_size, dtype=dtype)
        self.down = meta_parameter(local, hidden_size, inner, dtype=dtype)
        self.batch_invariant = False

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> this rank's partial sum of the same shape."""
        return self._experts(x, None)

    def forward_fused(self, products: FusedProducts, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden + mlp(norm(hidden)), the addition inside the experts' sum; in a group of one."""
        x, residual = norm(hidden, None)
        return self._experts(x, residual)

    def _experts(self, x: Tensor, residual: Tensor | None) -> Tensor:
        invariant = self.batch_invariant
        if not invariant and skinny.supports(len(x), x.dtype, x.device, self.hidden.size):
            logits = self.router.forward_by(skinny, x)
        else:
            logits = self.router(x)
        weights, ids = route(logits, self.top_k, renormalize=self.renormalize)
        return experts_mlp(
            x,
            self.gate_up,
            self.down,
            weights,
            ids,
            expert_start=self.experts.start,
            residual=residual,
            batch_invariant=invariant,
        )

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        prefix = f"{prefix.removesuffix('mlp.')}{self.names.block}."
        yield from self.router.weight_specs(prefix)
        for expert in range(self.num_experts):
            held = expert in self.experts
            inner = self.inner if held else Shard(self.inner.size, 0, 0, 0)
            place = self.experts.index(expert) if held else 0
            first, rows = place * 2 * self.inner.length, (inner, self.hidden)
            name = f"{prefix}experts.{expert}."
            yield WeightSpec.of(f"{name}{self.names.gate}.weight", self, "gate_up", rows, first)
            yield WeightSpec.of(f"{name}{self.names.up}.weight", self, "gate_up", rows, first + inner.length)
            columns, first = (self.hidden, inner), place * self.hidden.size
            yield WeightSpec.of(f"{name}{self.names.down}.weight", self, "down", columns, first)

    def finalize(self) -> None:
        self.router.finalize()
