"""Mixtral: Mistral's decoder with a mixture of few large experts in every layer."""

from nanovllm_bento.layers.moe import ExpertNames
from nanovllm_bento.models.moe import MoEForCausalLM


class MixtralForCausalLM(MoEForCausalLM):
    expert_names = ExpertNames("block_sparse_moe", "w1", "w3", "w2")
