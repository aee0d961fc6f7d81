"""Qwen3 (dense): RMSNorm of each query and key head before the rotary embedding."""

from nanovllm_bento.models.decoder import DecoderForCausalLM


class Qwen3ForCausalLM(DecoderForCausalLM):
    qk_norm = True
