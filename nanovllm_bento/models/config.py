"""ModelConfig: what the engine needs to know of a model, from a Hugging Face ``config.json`` or a GGUF file.

Imports neither torch nor transformers. Whatever would make the model compute something else than it was trained to is
refused here by name (a rope type, an activation, a quantisation), before any weight is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from nanovllm_bento.errors import CheckpointError, UnsupportedArchitectureError
from nanovllm_bento.layers.rope_config import RopeConfig
from nanovllm_bento.models.registry import SUPPORTED_ARCHITECTURES, check_architecture

DType = Literal["float32", "bfloat16", "float16"]
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_UNSUPPORTED_EXPERTS = ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "n_group")
"""Fields of other mixtures of experts (DeepSeek's, Qwen2's): set, they would change what is computed."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's shape. Sizes are numbers of elements; positions and windows are in tokens.

    head_dim may differ from hidden_size / num_attention_heads. attention_bias, o_bias and mlp_bias say which linear
    layers (q, k and v; the attention's output; gate, up and down) have a bias.

    Mixture of experts: num_experts of moe_intermediate_size, num_experts_per_tok of them for each token, whose weights
    add up to one if norm_topk_prob; ``is_sparse`` says in which layers. num_experts 0: in none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    hidden_act: str
    dtype: DType
    sliding_window: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer_index: int) -> bool:
        """Whether the layer's MLP is a mixture of experts, not one MLP of intermediate_size."""
        if not self.num_experts or layer_index in self.mlp_only_layers:
            return False
        return (layer_index + 1) % self.decoder_sparse_step == 0

    @property
    def max_context(self) -> int:
        """Longest context, in tokens, that this engine computes exactly as the model defines it.

        Scaled rope (linear, yarn) stretches the trained length by its factor. Attention here is always full, which
        equals sliding-window attention as long as the context fits in the window; so a model that has one is limited
        to it.
        """
        limit = self.max_position_embeddings
        if self.rope.type == "linear":
            limit = int(limit * self.rope.factor)
        elif self.rope.type == "yarn":
            limit = max(limit, int(self.rope.original_max_position * self.rope.factor))
        return limit if self.sliding_window is None else min(limit, self.sliding_window)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """From the contents of a config.json, in the style of transformers 4 or 5.

        Raises UnsupportedArchitectureError for an architecture that is not in the registry, CheckpointError for
        missing or impossible fields and for features that are not supported.
        """
        architectures = d.get("architectures") or []
        known = [a for a in architectures if a in SUPPORTED_ARCHITECTURES]
        if not architectures:
            raise UnsupportedArchitectureError(
                f"the config names no architectures; supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}."
            )
        check_architecture(known[0] if known else str(architectures[0]))
        architecture = known[0]
        if architecture == "Qwen3MoeForCausalLM":  # read only where a layer is dense
            d = {"intermediate_size": 6144, **d}
        missing = [name for name in _REQUIRED if d.get(name) is None]
        if missing:
            raise CheckpointError(f"the config of this {architecture} lacks {', '.join(missing)}.")
        sizes: dict[str, Any] = {name: _positive_int(d, name) for name in _REQUIRED}
        heads = sizes["num_attention_heads"]
        kv_heads = heads if d.get("num_key_value_heads") is None else _positive_int(d, "num_key_value_heads")
        if heads % kv_heads:
            raise CheckpointError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}.")
        if d.get("head_dim") is None and architecture == "Qwen3ForCausalLM":
            head_dim = 128
        elif d.get("head_dim") is None:
            head_dim = sizes["hidden_size"] // heads
        else:
            head_dim = _positive_int(d, "head_dim")
        if head_dim % 2:
            raise CheckpointError(f"head_dim={head_dim} is odd; rotary embeddings need an even one.")
        act = d.get("hidden_act", "silu")
        if act != "silu":
            raise CheckpointError(f"hidden_act={act!r} is not supported; only 'silu' is.")
        if d.get("quantization_config"):
            method = dict(d["quantization_config"]).get("quant_method", "unknown")
            raise CheckpointError(
                f"the checkpoint is quantised (quantization_config: {method}), which is not supported; use the "
                "unquantised checkpoint or a GGUF file."
            )
        qwen2 = architecture == "Qwen2ForCausalLM"
        bias = bool(d.get("attention_bias", False)) and architecture not in ("MistralForCausalLM", "MixtralForCausalLM")
        return cls(
            architecture=architecture,
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(d.get("rms_norm_eps", 1e-6)),
            rope=_rope(d, architecture, sizes["max_position_embeddings"], head_dim),
            tie_word_embeddings=bool(d.get("tie_word_embeddings", False)),
            attention_bias=qwen2 or bias,
            o_bias=bias and not qwen2,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(d.get("mlp_bias", False)),
            hidden_act=act,
            dtype=_dtype(d.get("dtype") or d.get("torch_dtype") or "bfloat16"),
            sliding_window=_sliding_window(d, architecture, sizes["num_hidden_layers"]),
            **_experts(d, architecture, sizes["num_hidden_layers"]),
        )


def _positive_int(d: Mapping[str, Any], name: str) -> int:
    value = d[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{name}={value!r} in the config must be a whole number of at least 1.")
    return value


def _dtype(value: Any) -> DType:
    name = str(value).removeprefix("torch.")
    if name == "float32" or name == "bfloat16" or name == "float16":
        return name  # type: ignore[return-value]
    raise CheckpointError(f"dtype={value!r} in the config is not supported; use float32, bfloat16 or float16.")


def _sliding_window(d: Mapping[str, Any], architecture: str, num_layers: int) -> int | None:
    """The window in tokens if any layer uses one. Defaults are those of each family's transformers config."""
    if architecture == "MistralForCausalLM":
        window = d.get("sliding_window", 4096)
    elif architecture == "MixtralForCausalLM":
        window = d.get("sliding_window")
    elif architecture == "Qwen3MoeForCausalLM":  # unlike the dense ones: in all layers or in none
        window = d.get("sliding_window", 4096) if d.get("use_sliding_window") else None
    elif architecture.startswith("Qwen") and d.get("use_sliding_window"):
        kinds = d.get("layer_types")
        in_use = "sliding_attention" in kinds if kinds else d.get("max_window_layers", 28) < num_layers
        window = d.get("sliding_window", 4096) if in_use else None
    else:
        window = None
    return None if window is None else _positive_int({"sliding_window": window}, "sliding_window")


def _experts(d: Mapping[str, Any], architecture: str, num_layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts; none for a dense architecture. Defaults are those of transformers."""
    if architecture not in ("Qwen3MoeForCausalLM", "MixtralForCausalLM"):
        return {}
    unknown = [name for name in _UNSUPPORTED_EXPERTS if d.get(name)]
    if unknown:
        raise CheckpointError(f"{unknown[0]}={d[unknown[0]]!r} in the config of this {architecture} is not supported.")
    mixtral = architecture == "MixtralForCausalLM"
    own = {"num_experts": 8, "num_experts_per_tok": 2} if mixtral else {"num_experts": 128, "num_experts_per_tok": 8}
    given = {name: d[name] for name in own if d.get(name) is not None}
    if d.get("num_local_experts") is not None:  # Mixtral's name for it, and transformers 5's for all
        given["num_experts"] = d["num_local_experts"]
    counts = {name: _positive_int(own | given, name) for name in own}
    if counts["num_experts_per_tok"] > counts["num_experts"]:
        raise CheckpointError(
            f"num_experts_per_tok={counts['num_experts_per_tok']} is above num_experts={counts['num_experts']}."
        )
    if mixtral:
        inner = _positive_int(d, "intermediate_size")
        return {**counts, "moe_intermediate_size": inner, "norm_topk_prob": True}
    if d.get("moe_intermediate_size") is None:
        raise CheckpointError(f"the config of this {architecture} lacks moe_intermediate_size.")
    dense = d.get("mlp_only_layers") or []
    wrong = [i for i in dense if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_layers]
    if wrong:
        raise CheckpointError(f"mlp_only_layers names {wrong[0]!r}; layers are numbered 0 to {num_layers - 1}.")
    step = {"decoder_sparse_step": 1 if d.get("decoder_sparse_step") is None else d["decoder_sparse_step"]}
    return {
        **counts,
        "moe_intermediate_size": _positive_int(d, "moe_intermediate_size"),
        "norm_topk_prob": bool(d.get("norm_topk_prob", False)),
        "decoder_sparse_step": _positive_int(step, "decoder_sparse_step"),
        "mlp_only_layers": tuple(sorted(set(dense))),
    }


def _rope(d: Mapping[str, Any], architecture: str, max_position: int, head_dim: int) -> RopeConfig:
    """Rope settings from rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    p: dict[str, Any] = {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}
    kind = p.get("rope_type") or p.get("type") or "default"
    if float(p.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor below 1 is not supported: rotary embeddings must cover the head.")
    usual = 1e6 if architecture == "MixtralForCausalLM" else 1e4
    theta = float(p.get("rope_theta") or d.get("rope_theta") or usual)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "factors":
        factors = tuple(float(f) for f in p["factors"])
        if len(factors) != head_dim // 2 or any(not f > 0 for f in factors):
            raise CheckpointError(f"rope factors must be {head_dim // 2} positive numbers, found {len(factors)}.")
        return RopeConfig(type="factors", theta=theta, factors=factors)
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn.")
    wanted = {"linear": ["factor"], "yarn": ["factor"]}.get(kind)
    wanted = wanted or ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in wanted if p.get(name) is None]
    if missing:
        raise CheckpointError(f"the {kind} rope settings of this {architecture} lack {', '.join(missing)}.")
    factor = float(p["factor"])
    original = int(p.get("original_max_position_embeddings") or max_position)
    if kind == "linear":
        return RopeConfig(type="linear", theta=theta, factor=factor, original_max_position=original)
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return RopeConfig(
            "llama3", theta, factor, original_max_position=original, low_freq_factor=low, high_freq_factor=high
        )
    return RopeConfig(
        type="yarn",
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        truncate=bool(p.get("truncate", True)),
        attention_factor=_yarn_attention_factor(p, factor),
    )


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    """Scale of cos and sin: as given, or 0.1 ln(factor) + 1 (YaRN, section 3.4), weighted by mscale where present."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(float(p["mscale"])) / mscale(float(p["mscale_all_dim"]))
    return mscale(1.0)
