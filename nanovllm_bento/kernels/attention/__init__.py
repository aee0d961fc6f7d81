"""Attention backends and the choice among them; imports torch only when one is selected."""

from typing import TYPE_CHECKING, Literal

from nanovllm_bento.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from nanovllm_bento.kernels.attention.base import AttentionBackend, PhaseBackend

BACKENDS = ("flash_attn", "triton", "torch")
AUTO_DECODE: Literal["triton", "flash_attn"] = "triton"
"""What "auto" takes for decode rows on a GPU where both work; benchmarks/attention_tune.py measures them.

For prefill rows it takes flash_attn where that works."""


def select_backend(
    name: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: "torch.dtype",
    kv_dtype: "torch.dtype",
    block_size: int,
    device: "torch.device",
    batch_invariant: bool = False,
    overlapping: bool = False,
) -> "AttentionBackend":
    """The backend called ``name``, or for "auto" the fastest that works, maybe one for each phase.

    batch_invariant: a token's output must have the same bits however it was chunked or batched. overlapping: all
    kernels of a decode step divide a multiprocessor's memory alike (kernels/shared_memory.py). On a GPU this may wait
    for the device (flash_attn is tried out). Raises ConfigError for an unknown name, or one that does not work here,
    with the reason.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"attention_backend={name!r} is unknown; known: auto, {', '.join(BACKENDS)}.")
    case = _Case(num_heads, num_kv_heads, head_dim, dtype, kv_dtype, block_size, device, batch_invariant, overlapping)
    if name != "auto":
        backend, reason = case.make(name)
        if backend is None:
            raise ConfigError(f"attention backend {name!r} does not work here: {reason}.")
        return backend
    if device.type == "cuda":
        from nanovllm_bento.kernels.attention.base import PhasedAttention

        triton, flash = case.make_triton()[0], case.make_flash()[0]
        if triton is not None and flash is not None:
            return PhasedAttention(prefill=flash, decode=triton) if AUTO_DECODE == "triton" else flash
        if triton is not None or flash is not None:
            return triton or flash  # type: ignore[return-value]
    backend, reason = case.make_torch()
    if backend is None:
        raise ConfigError(f"attention backend 'torch' does not work here: {reason}.")
    return backend


def explain_backends(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: "torch.dtype",
    kv_dtype: "torch.dtype",
    block_size: int,
    device: "torch.device",
    batch_invariant: bool = False,
) -> list[tuple[str, str | None]]:
    """(name, None if it works here or else the reason why not) of every backend."""
    case = _Case(num_heads, num_kv_heads, head_dim, dtype, kv_dtype, block_size, device, batch_invariant)
    return [(name, case.make(name)[1]) for name in BACKENDS]


class _Case:
    """What a backend is asked to serve. make_* return (backend, None) or (None, reason)."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: "torch.dtype",
        kv_dtype: "torch.dtype",
        block_size: int,
        device: "torch.device",
        batch_invariant: bool,
        overlapping: bool = False,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dtype, self.kv_dtype, self.block_size, self.device = dtype, kv_dtype, block_size, device
        self.batch_invariant, self.overlapping = batch_invariant, overlapping
        self.supports_args = (head_dim, dtype, kv_dtype, block_size, device)

    def make(self, name: str) -> "tuple[AttentionBackend | None, str | None]":
        if name == "flash_attn":
            return self.make_flash()
        return self.make_triton() if name == "triton" else self.make_torch()

    def make_flash(self) -> "tuple[PhaseBackend | None, str | None]":
        from nanovllm_bento.kernels.attention.flash_backend import LIBRARIES, FlashAttention
        from nanovllm_bento.kernels.attention.flash_probe import probe

        reason = FlashAttention.supports(*self.supports_args)
        if reason is None and self.batch_invariant:
            reason = "it is not batch-invariant"
        if reason is not None:
            return None, reason
        backend = FlashAttention(self.block_size, self.device)
        module = "flash_attn_3._C" if backend.version == 3 else LIBRARIES[backend.version]
        reason = probe(module, self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, self.block_size)
        return (backend, None) if reason is None else (None, reason)

    def make_triton(self) -> "tuple[PhaseBackend | None, str | None]":
        from nanovllm_bento.kernels.attention.triton_backend import TritonAttention

        reason = TritonAttention.supports(*self.supports_args)
        if reason is not None:
            return None, reason
        backend = TritonAttention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            self.kv_dtype,
            self.device,
            self.batch_invariant,
            overlapping=self.overlapping,
        )
        return backend, None

    def make_torch(self) -> "tuple[AttentionBackend | None, str | None]":
        from nanovllm_bento.kernels.attention.torch_backend import TorchAttention

        reason = TorchAttention.supports(*self.supports_args)
        if reason is None and self.batch_invariant:
            reason = "it is not batch-invariant"
        return (TorchAttention(self.block_size, self.dtype), None) if reason is None else (None, reason)
