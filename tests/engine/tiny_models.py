"""Tiny random Hugging Face checkpoints of every family, made by transformers, to compare the engine with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nanovllm_bento.hub import load_config_dict, resolve_model
from nanovllm_bento.models.config import ModelConfig

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 32}),
    "linear": ("Llama", {"rope_parameters": _LINEAR}),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_some": (
        "Qwen3Moe",
        {**_EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_bias": ("Qwen3", {"head_dim": 16, "attention_bias": True, "num_attention_heads": 6}),
}
"""Name -> (transformers' class prefix, what differs from the common shape)."""


def make_tiny(family: str, folder: str | Path, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """Write a random float32 checkpoint of ``family`` (a key of FAMILIES) into ``folder`` and return that.

    overrides: fields of the transformers config. A small max_shard_size ("100KB") gives a sharded checkpoint.
    Biases and norm weights, which transformers starts at 0 and 1, are random too, so that a model that ignores them
    differs.
    """
    import transformers

    prefix, differences = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SHAPE, **differences, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.3)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def load_reference(folder: str | Path) -> Any:
    """The checkpoint as a transformers model in float32, with plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def read_config(source: Path) -> ModelConfig:
    """The config of a checkpoint folder or a .gguf file, as the engine reads it."""
    return ModelConfig.from_dict(load_config_dict(resolve_model(str(source))))


@contextmanager
def computed_by(products: str | None) -> Iterator[None]:
    """Steps use that module of nanovllm_bento.kernels, as some do on a GPU, with its references; None: as on a CPU."""
    with ExitStack() as stack:
        if products is not None:
            stack.enter_context(patch(f"nanovllm_bento.kernels.{products}.supports", lambda rows, *_: True))
            for module in ("linear", "embedding"):
                stack.enter_context(patch(f"nanovllm_bento.layers.{module}.pack_weight", lambda weight: None))
        yield
