"""What the families with a mixture of experts share: which layers have one, and how its weights are called."""

import torch

from nanovllm_bento.layers.mlp import MLP
from nanovllm_bento.layers.moe import ExpertNames, MoEMLP
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.decoder import DecoderForCausalLM


class MoEForCausalLM(DecoderForCausalLM):
    """expert_parallel: the ranks of the group hold whole experts instead of a part of each."""

    expert_names: ExpertNames

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        group: ParallelGroup = SINGLE,
        expert_parallel: bool = False,
    ) -> None:
        self.expert_parallel = expert_parallel  # the decoder's constructor makes the MLPs
        super().__init__(config, dtype=dtype, group=group)

    def make_mlp(self, config: ModelConfig, layer_index: int, *, dtype: torch.dtype, group: ParallelGroup) -> MLP:
        if not config.is_sparse(layer_index):
            return super().make_mlp(config, layer_index, dtype=dtype, group=group)
        return MoEMLP(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            dtype=dtype,
            names=self.expert_names,
            group=group,
            expert_parallel=self.expert_parallel,
        )

    def set_batch_invariant(self) -> None:
        super().set_batch_invariant()
        for module in self.modules():
            if isinstance(module, MoEMLP):
                module.batch_invariant = True
