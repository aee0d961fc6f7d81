"""Llama 2, 3 and its many look-alikes (SmolLM2, TinyLlama): the plain decoder; biases as the config says."""

from nanovllm_bento.models.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    """Nothing differs from the shared decoder but what its config says."""
