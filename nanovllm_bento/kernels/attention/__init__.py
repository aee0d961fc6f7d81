"""Attention backends and the choice among them; imports torch only when one is selected."""

from typing import TYPE_CHECKING

from nanovllm_bento.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from nanovllm_bento.kernels.attention.base import AttentionBackend

BACKENDS = ("torch",)
"""Names, fastest first: "auto" takes the first that supports the case."""


def select_backend(
    name: str,
    *,
    head_dim: int,
    dtype: "torch.dtype",
    kv_dtype: "torch.dtype",
    block_size: int,
    device: "torch.device",
) -> "AttentionBackend":
    """The backend called ``name``, or for "auto" the fastest that works.

    Raises ConfigError for an unknown name, or one that does not work here, with the reason.
    """
    from nanovllm_bento.kernels.attention.torch_backend import TorchAttention

    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"attention_backend={name!r} is unknown; known: auto, {', '.join(BACKENDS)}.")
    reason = TorchAttention.supports(head_dim, dtype, kv_dtype, block_size, device)
    if reason is not None:
        raise ConfigError(f"attention backend 'torch' does not work here: {reason}.")
    return TorchAttention(block_size, dtype)
