"""Mistral: the plain decoder without biases; a sliding window bounds ModelConfig.max_context."""

from nanovllm_bento.models.decoder import DecoderForCausalLM


class MistralForCausalLM(DecoderForCausalLM):
    """Nothing differs from the shared decoder but what its config says."""
