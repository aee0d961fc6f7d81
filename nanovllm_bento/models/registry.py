"""Which architectures are supported, by the name in a checkpoint's ``architectures``.

Imports no torch: the classes are looked up when a model is built. A further family is a module beside the others and
one line here.
"""

import importlib
from typing import TYPE_CHECKING

from nanovllm_bento.errors import ConfigError, UnsupportedArchitectureError

if TYPE_CHECKING:
    import torch

    from nanovllm_bento.layers.parallel import ParallelGroup
    from nanovllm_bento.models.config import ModelConfig
    from nanovllm_bento.models.decoder import DecoderForCausalLM

_PACKAGE = "nanovllm_bento.models"
SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Architecture -> module of this package that holds the class of the same name."""


def check_architecture(architecture: str) -> None:
    """Raises UnsupportedArchitectureError, which lists the supported ones, unless ``architecture`` is one of them."""
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}."
        )


def build_model(
    config: "ModelConfig",
    *,
    dtype: "torch.dtype",
    group: "ParallelGroup | None" = None,
    expert_parallel: bool = False,
) -> "DecoderForCausalLM":
    """The model of ``config.architecture`` with parameters of ``dtype`` on the meta device (shapes, no memory).

    group: builds its rank's part; None: the whole model. expert_parallel: ranks hold whole experts instead of a part of
    each. Raises UnsupportedArchitectureError, and ConfigError if the model cannot be split or has no experts.
    """
    from nanovllm_bento.layers.parallel import SINGLE

    check_architecture(config.architecture)
    if expert_parallel and not config.num_experts:
        raise ConfigError(f"enable_expert_parallel=True, but {config.architecture} has no experts. Leave it out.")
    module = importlib.import_module(f"{_PACKAGE}.{SUPPORTED_ARCHITECTURES[config.architecture]}")
    family = getattr(module, config.architecture)
    options = {"expert_parallel": expert_parallel} if config.num_experts else {}
    model: DecoderForCausalLM = family(config, dtype=dtype, group=group or SINGLE, **options)
    return model
