"""Qwen2 and Qwen2.5: biases on q, k and v, always (ModelConfig.from_dict sets them)."""

from nanovllm_bento.models.decoder import DecoderForCausalLM


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Nothing differs from the shared decoder but what its config says."""
