"""Our own kernels as a backend: it works on every NVIDIA GPU since Ampere, for every head_dim up to 256 and every block
size.

Imports without Triton; a TritonAttention does not come to be without it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.launch import has_triton, num_sms
from nanovllm_bento.kernels.rope_store import RopeStoreStep

if TYPE_CHECKING:
    from nanovllm_bento.kernels.attention.decode_triton import DecodeConfig
    from nanovllm_bento.kernels.attention.prefill_triton import PrefillConfig

MAX_HEAD_DIM = 256


class TritonAttention:
    """Implements PhaseBackend. batch_invariant: a token's output has the same bits however it was chunked or batched.

    decode_config, prefill_config: instead of the checked-in ones (tuning, tests). overlapping: as
    decode_triton.choose_config.
    """

    name = "triton"
    capturable = True
    captures_prefill = True
    reads_whole_prompts = False

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool = False,
        decode_config: "DecodeConfig | None" = None,
        prefill_config: "PrefillConfig | None" = None,
        overlapping: bool = False,
    ) -> None:
        from nanovllm_bento.kernels.attention import decode_triton, prefill_triton

        group = num_heads // num_kv_heads
        self.num_kv_heads = num_kv_heads
        self.batch_invariant, self.overlapping = batch_invariant, overlapping
        self.fuses_decode = not batch_invariant and head_dim % 2 == 0
        self.decode_config = decode_config
        self._case = (head_dim, kv_dtype, dtype)
        self.prefill_config = prefill_config or prefill_triton.choose_config(head_dim, group, kv_dtype, dtype)
        self._choose_config = decode_triton.choose_config
        self._choose_splits = decode_triton.choose_splits
        self._new_tokens = decode_triton.NewTokens
        self._paged_decode = decode_triton.paged_decode
        self._paged_prefill = prefill_triton.paged_prefill
        self._sms = num_sms(device) if device.type == "cuda" else 4  # any number serves Triton's interpreter
        self._workspace = decode_triton.DecodeWorkspace(num_heads, num_kv_heads, head_dim, device)

    @classmethod
    def supports(
        cls, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return "it needs an NVIDIA GPU"
        if not has_triton():
            return "the package triton is not installed"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {dtype} is none of float32, float16, bfloat16"
        if kv_dtype not in (dtype, torch.float8_e4m3fn):
            return f"the KV cache must have the model's dtype {dtype} or float8_e4m3fn, not {kv_dtype}"
        if kv_dtype == torch.float8_e4m3fn and capability < (8, 9):
            return f"float8_e4m3fn needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
        if head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
        return None

    def prepare(self, meta: AttentionMetadata) -> None:
        """Makes room for what the splits of long decode rows leave; computes nothing."""
        if meta.num_decode_rows and not self.batch_invariant:
            self._workspace.reserve(meta.num_decode_rows, self._plan(meta)[1][0])

    def forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        out = q.new_empty(q.shape)
        if meta.num_decode_rows:
            self.decode(q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        if meta.has_prefill_rows:
            self.prefill(q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        return out

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float,
        v_scale: float,
        out: Tensor,
    ) -> None:
        case = (q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        if self.batch_invariant:
            self._paged_prefill(*case, self.prefill_config, (0, meta.num_decode_rows), 1, True)
        else:
            self._paged_decode(*case, self._workspace, *self._plan(meta))

    def prefill(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        k_scale: float,
        v_scale: float,
        out: Tensor,
    ) -> None:
        case = (q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
        rows = (meta.num_decode_rows, meta.seq_lens.shape[0])
        self._paged_prefill(*case, self.prefill_config, rows, meta.max_query_len, self.batch_invariant)

    def decode_from_qkv(
        self,
        qkv: Tensor,
        step: RopeStoreStep,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        num_heads: int,
        norm_weight: Tensor | None,
        eps: float,
        k_scale: float,
        v_scale: float,
    ) -> Tensor:
        assert qkv.is_contiguous()
        head_dim = k_cache.shape[-1]
        out = qkv.new_empty((qkv.shape[0], num_heads, head_dim))
        self._paged_decode(
            qkv.view(qkv.shape[0], -1, head_dim),
            k_cache,
            v_cache,
            meta,
            scale,
            k_scale,
            v_scale,
            out,
            self._workspace,
            *self._plan(meta),
            self._new_tokens(step.table, step.slot_mapping, norm_weight, eps),
        )
        return out

    def _plan(self, meta: AttentionMetadata) -> "tuple[DecodeConfig, tuple[int, int]]":
        """The decode rows' configuration and splits."""
        rows, kv_heads = meta.num_decode_rows, self.num_kv_heads
        config = self.config_of(rows)
        return config, self._choose_splits(config, rows, kv_heads, meta.max_seq_len, self._sms)

    def config_of(self, rows: int) -> "DecodeConfig":
        """How a step of so many decode rows is cut."""
        case = (*self._case, rows, self.num_kv_heads, self._sms, self.overlapping)
        return self.decode_config or self._choose_config(*case)
