"""A Hugging Face style config from a GGUF file's metadata, without torch."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm_bento.errors import CheckpointError, UnsupportedArchitectureError
from nanovllm_bento.gguf_file import GGUFArray, GGUFFile, open_gguf

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def read_gguf_config(path: str | Path) -> dict[str, Any]:
    """The config of a GGUF file, as a dict in the style of a Hugging Face config.json.

    Raises what open_gguf raises, UnsupportedArchitectureError, and CheckpointError for a missing or unsupported value.
    """
    return gguf_config(open_gguf(path))


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """read_gguf_config for a file that is open already."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"{file.path} holds a model of GGUF architecture {arch!r}; supported: {', '.join(sorted(_ARCHITECTURES))}."
        )
    if meta.get(f"{arch}.expert_count"):
        raise UnsupportedArchitectureError(f"{file.path} holds a mixture of experts, which is not supported.")

    def need(key: str) -> Any:
        value = meta.get(f"{arch}.{key}")
        if value is None or isinstance(value, GGUFArray):
            raise CheckpointError(f"{file.path} lacks a single value {arch}.{key} in its metadata.")
        return value

    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight.")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = meta.get(f"{arch}.attention.key_length") or hidden // heads
    if meta.get(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: keys and values of different lengths are not supported.")
    rotary_dim = meta.get(f"{arch}.rope.dimension_count") or head_dim
    rope = _rope(file, meta, arch)
    rope["partial_rotary_factor"] = rotary_dim / head_dim
    return {
        "architectures": [_ARCHITECTURES[arch]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "rope_parameters": rope,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
        **_sliding_window(meta, arch),
    }


def _sliding_window(meta: Mapping[str, Any], arch: str) -> dict[str, Any]:
    if not meta.get(f"{arch}.attention.sliding_window"):
        return {}
    raise CheckpointError(f"{arch}.attention.sliding_window is not supported in a GGUF file; use the safetensors one.")


def _rope(file: GGUFFile, meta: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Rope settings; Llama 3's scaling is stored as one divisor per frequency, in the tensor rope_freqs.weight."""
    theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
    scaling = f"{arch}.rope.scaling."
    kind = meta.get(f"{scaling}type", "none")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        if kind not in ("none", "llama3") or factors.kind != 0:
            raise CheckpointError(f"{file.path}: rope_freqs.weight together with {scaling}type={kind!r}.")
        count = math.prod(factors.shape)
        values = struct.unpack_from(f"<{count}f", file.data, factors.offset)
        return {"rope_type": "factors", "rope_theta": theta, "factors": list(values)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": meta.get(f"{scaling}factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": meta.get(f"{scaling}factor"),
            "original_max_position_embeddings": meta.get(f"{scaling}original_context_length"),
            "beta_fast": meta.get(f"{scaling}yarn_beta_fast"),
            "beta_slow": meta.get(f"{scaling}yarn_beta_slow"),
        }
    raise CheckpointError(f"{file.path}: {scaling}type={kind!r} is not supported; supported: none, linear, yarn.")
