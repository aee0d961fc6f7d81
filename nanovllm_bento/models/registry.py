"""Which architectures are supported, by the name in a checkpoint's ``architectures``.

Imports no torch: the classes are looked up when a model is built. A further family is a module beside the others and
one line here.
"""

import importlib
from typing import TYPE_CHECKING

from nanovllm_bento.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    import torch

    from nanovllm_bento.models.config import ModelConfig
    from nanovllm_bento.models.decoder import DecoderForCausalLM

_PACKAGE = "nanovllm_bento.models"
SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture -> module of this package that holds the class of the same name."""


def check_architecture(architecture: str) -> None:
    """Raises UnsupportedArchitectureError, which lists the supported ones, unless ``architecture`` is one of them."""
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}."
        )


def build_model(config: "ModelConfig", *, dtype: "torch.dtype") -> "DecoderForCausalLM":
    """The model of ``config.architecture`` with parameters of ``dtype`` on the meta device (shapes, no memory)."""
    check_architecture(config.architecture)
    module = importlib.import_module(f"{_PACKAGE}.{SUPPORTED_ARCHITECTURES[config.architecture]}")
    model: DecoderForCausalLM = getattr(module, config.architecture)(config, dtype=dtype)
    return model
