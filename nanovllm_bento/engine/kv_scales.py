"""Scales of an fp8 KV cache: a cached value times its layer's scale is the true one.

From the checkpoint if it brings them for every layer; otherwise each layer's largest key and value over a run of
random tokens, on whichever rank, with room above. e4m3 keeps its relative precision over four orders of magnitude, so
the room costs nothing and the scale only has to keep large values from clamping at 448.
"""

import math

import torch

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.attention.torch_backend import TorchAttention
from nanovllm_bento.kernels.rope_store import FP8_MAX
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.decoder import DecoderForCausalLM

NUM_TOKENS = 512
ROOM = 2.0
"""How many times the largest value seen still fits."""


def set_kv_scales(
    model: DecoderForCausalLM, model_config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Set k_scale and v_scale of every layer, from the checkpoint or calibrated.

    Raises ConfigError if they cannot be calibrated. Call it before the model gets its attention backend: calibration
    runs with one of its own. All ranks of the model's group call it together.
    """
    if all(attention.checkpoint_scales is not None for attention in model.attentions):
        for attention in model.attentions:
            assert attention.checkpoint_scales is not None
            attention.k_scale, attention.v_scale = attention.checkpoint_scales
        return
    num_tokens = min(NUM_TOKENS, model.rotary.table.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model_config.vocab_size, (num_tokens,), generator=generator).to(device)
    positions = torch.arange(num_tokens, device=device)
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        slot_mapping=positions,
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
        num_decode_rows=0,
    )
    backend = TorchAttention(num_tokens, dtype)
    model.set_attention_backend(backend)
    caches = []
    for attention in model.attentions:
        shape = (1, num_tokens, attention.num_kv_heads, model_config.head_dim)
        caches.append((torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)))
    with torch.inference_mode():
        backend.prepare(meta)
        model(ids, positions, caches, meta)
        largest = torch.stack([cache.abs().amax().float() for layer in caches for cache in layer]).view(-1, 2)
        largest = largest.nan_to_num(math.inf, posinf=math.inf)  # a maximum over ranks may pass over what is no number
        model.group.maximum(largest)
    if not largest.isfinite().all():
        raise ConfigError(
            f"kv_cache_dtype='fp8_e4m3' cannot be calibrated: in {dtype} this model has keys or values that are not "
            "finite."
        )
    for attention, pair in zip(model.attentions, largest.tolist(), strict=True):
        attention.k_scale, attention.v_scale = (max(value * ROOM / FP8_MAX, 1e-8) for value in pair)
