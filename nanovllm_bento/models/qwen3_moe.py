"""Qwen3 with a mixture of experts (30B-A3B, 235B-A22B): Qwen3's attention, and a router before many small MLPs."""

from nanovllm_bento.layers.moe import ExpertNames
from nanovllm_bento.models.moe import MoEForCausalLM


class Qwen3MoeForCausalLM(MoEForCausalLM):
    qk_norm = True
    expert_names = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
