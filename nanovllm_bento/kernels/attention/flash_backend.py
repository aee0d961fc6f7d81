"""FlashAttention's own kernels (Dao-AILab) as a backend: version 3, 2 or 4, the first that is installed and fits.

The three differ in what they call things and in what they take: 3 is for Hopper and pages of any size that is no
multiple of 64, 2 wants pages of a multiple of 256 tokens, 4 has one function for everything. Of 3 the extension is
loaded and its operator called: the Python around it registers operators for tracing, which costs time at import and
with each call. A build may lack a head_dim and say so only at launch, so a selection ends with one (flash_probe.py).
An fp8 cache is not served: version 3 wants q in e4m3 too.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanovllm_bento.kernels.attention.base import AttentionMetadata

MAX_HEAD_DIM = 256
LIBRARIES = {3: "flash_attn_interface", 2: "flash_attn", 4: "flash_attn.cute"}
"""Version -> module, in the order of preference."""
FWD3 = {"q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "page_table", "softmax_scale", "is_causal"}
"""What we give to version 3's operator; all else stays at its default."""
WHOLE3 = {"cu_seqlens_k", "max_seqlen_k", "num_splits", "pack_gqa"}
"""And what we give to it besides for whole prompts."""


@dataclass(slots=True)
class _PrefillStep:
    """What all layers of a step share about its prefill rows, as query_start_loc counts from the first of them."""

    cu_seqlens_q: Tensor  # int32 [num_rows + 1]
    cu_seqlens_k: Tensor | None  # int32 [num_rows + 1], where the version asks for it
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int


class FlashAttention:
    """Implements PhaseBackend with whichever version ``find_library`` takes.

    Capturable: splits are chosen from shapes and the block table's width, on the host, so at capture.
    """

    name = "flash_attn"
    capturable = True
    fuses_decode = False

    def __init__(self, block_size: int, device: torch.device) -> None:
        found, reason = find_library(block_size, device)
        if found is None:
            raise ValueError(reason)
        self.version, self._module = found
        self.captures_prefill = self.version in (2, 3)
        self.reads_whole_prompts = self.version == 3 and self._module.is_operator
        self._prefill_call: Callable[..., Tensor] = {2: self._prefill2, 3: self._prefill3, 4: self._prefill4}[
            self.version
        ]
        self._step: _PrefillStep | None = None

    @classmethod
    def supports(
        cls, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return "it needs an NVIDIA GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {dtype} is neither float16 nor bfloat16"
        if kv_dtype != dtype:
            return f"the KV cache must have the model's dtype {dtype}, not {kv_dtype}"
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            return f"head_dim {head_dim} is above {MAX_HEAD_DIM} or no multiple of 8"
        return find_library(block_size, device)[1]

    def trial(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
    ) -> str | None:
        """None if one small step of each kind runs here, else the reason why not. Waits for the device.

        Some builds end the process where they lack a case: flash_probe.py calls this in one of its own.
        """
        meta = AttentionMetadata(
            query_start_loc=torch.tensor([0, 1, 4], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([5, 6], dtype=torch.int32, device=device),
            block_table=torch.arange(16, dtype=torch.int32, device=device).view(2, 8),
            slot_mapping=torch.full((4,), -1, device=device),
            max_query_len=3,
            max_seq_len=6,
            num_decode_rows=1,
        )
        q = torch.ones(4, num_heads, head_dim, dtype=dtype, device=device)
        cache = torch.ones(16, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
        whole = replace(
            meta,
            query_start_loc=torch.tensor([0, 3, 4], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([3, 1], dtype=torch.int32, device=device),
            num_decode_rows=0,
            whole_prompts=True,
        )
        try:
            self.prepare(meta)
            right = bool((self.forward(q, cache, cache, meta, 0.1) - 1).abs().max() < 0.01)
            if self.reads_whole_prompts:
                self.prepare(whole)
                k = q[:, :num_kv_heads]
                right &= bool((self.attend_whole_prompts(q, k, k, whole, 0.1) - 1).abs().max() < 0.01)
        except Exception as error:  # whatever a foreign library raises
            lines = str(error).strip().splitlines()
            return f"FlashAttention-{self.version} fails on a trial: {lines[0] if lines else type(error).__name__}"
        return None if right else f"FlashAttention-{self.version} computes a trial wrongly"

    def prepare(self, meta: AttentionMetadata) -> None:
        self._step = None
        if not meta.has_prefill_rows:
            return
        first = meta.num_decode_rows
        seq_lens = meta.seq_lens[first:]
        cu_seqlens_k = None
        if self.version == 2:
            cu_seqlens_k = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._step = _PrefillStep(
            # decode row r owns token r: as many tokens as rows come before
            meta.query_start_loc[first:] - first,
            cu_seqlens_k,
            seq_lens,
            meta.block_table[first:],
            meta.max_query_len,
            meta.max_seq_len,
        )

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
        if not meta.has_prefill_rows:
            return self._decode(q, k_cache, v_cache, meta, scale * k_scale, v_scale)
        if not meta.num_decode_rows:
            return self._prefill(q, k_cache, v_cache, scale * k_scale, v_scale)
        out = q.new_empty(q.shape)
        self.decode(q, k_cache, v_cache, meta, scale, k_scale, v_scale, out)
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
        rows = meta.num_decode_rows
        out[:rows] = self._decode(q[:rows], k_cache, v_cache, meta, scale * k_scale, v_scale)

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
        first = meta.num_decode_rows
        if self.version == 3 and v_scale == 1.0:
            assert self._step is not None, "prepare comes first"
            self._prefill3(q[first:], k_cache, v_cache, self._step, scale * k_scale, out[first:])
        else:
            out[first:] = self._prefill(q[first:], k_cache, v_cache, scale * k_scale, v_scale)

    def attend_whole_prompts(self, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
        assert self._step is not None, "prepare comes first"
        step = self._step
        found: Tensor = self._module(
            q,
            k,
            v,
            cu_seqlens_q=step.cu_seqlens_q,
            cu_seqlens_k=step.cu_seqlens_q,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_query_len,
            softmax_scale=scale,
            num_splits=1,
            pack_gqa=False,  # prompts fill tiles without it; with it 11% slower at 512 tokens and two heads a KV head
        )
        return found

    def _decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, v_scale: float
    ) -> Tensor:
        rows = meta.num_decode_rows
        seq_lens, table = meta.seq_lens[:rows], meta.block_table[:rows]
        found: Tensor
        if self.version == 4:
            found, _ = self._module.flash_attn_varlen_func(
                q.unsqueeze(1), k_cache, v_cache, seqused_k=seq_lens, page_table=table, softmax_scale=scale, causal=True
            )
        elif self.version == 3:
            found = self._module(
                q.unsqueeze(1), k_cache, v_cache, seqused_k=seq_lens, page_table=table, softmax_scale=scale
            )
        else:
            found = self._module.flash_attn_with_kvcache(
                q.unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=seq_lens,
                softmax_scale=scale,
                causal=True,
                block_table=table,
            )
        found = found.squeeze(1)
        return found if v_scale == 1.0 else found * v_scale

    def _prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, v_scale: float) -> Tensor:
        assert self._step is not None, "prepare comes first"
        found = self._prefill_call(q, k_cache, v_cache, self._step, scale)
        return found if v_scale == 1.0 else found * v_scale

    def _prefill3(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: _PrefillStep,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        found: Tensor = self._module(
            q,
            k_cache,
            v_cache,
            out=out,
            cu_seqlens_q=step.cu_seqlens_q,
            seqused_k=step.seq_lens,
            max_seqlen_q=step.max_query_len,
            page_table=step.block_table,
            softmax_scale=scale,
        )
        return found

    def _prefill2(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: _PrefillStep, scale: float) -> Tensor:
        found: Tensor = self._module.flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=step.cu_seqlens_q,
            cu_seqlens_k=step.cu_seqlens_k,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            softmax_scale=scale,
            causal=True,
            block_table=step.block_table,
        )
        return found

    def _prefill4(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: _PrefillStep, scale: float) -> Tensor:
        found: Tensor
        found, _ = self._module.flash_attn_varlen_func(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            seqused_k=step.seq_lens,
            page_table=step.block_table,
            softmax_scale=scale,
            causal=True,
        )
        return found


class _Forward3:
    """Version 3's forward, taking FWD3's arguments: its operator, or the Python around it if they do not agree.

    is_operator: which; the operator takes WHOLE3's arguments too.
    """

    def __init__(self) -> None:
        self.is_operator = False
        with suppress(ImportError, OSError, AttributeError):
            importlib.import_module("flash_attn_3._C")  # registers the operator
            self._function = torch.ops.flash_attn_3.fwd.default
            names = {argument.name for argument in self._function._schema.arguments}
            self.is_operator = names >= FWD3 | WHOLE3
        if not self.is_operator:
            self._function = importlib.import_module(LIBRARIES[3]).flash_attn_with_kvcache

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        found: Tensor
        if self.is_operator:
            found = self._function(q, k, v, **options, is_causal=True)[0]
            return found
        out = options.pop("out", None)
        found = self._function(q, k, v, cache_seqlens=options.pop("seqused_k"), causal=True, **options)
        return found if out is None else out.copy_(found)


@cache
def find_library(block_size: int, device: torch.device) -> tuple[tuple[int, Any] | None, str | None]:
    """((version, module), None) of the first version that fits, or (None, why none does). Of 3 its forward alone."""
    capability = torch.cuda.get_device_capability(device)
    reasons = []
    for version, module in LIBRARIES.items():
        if version == 3 and capability[0] != 9:
            reasons.append("FlashAttention-3 is for compute capability 9.0")
        elif version == 3 and block_size % 64 == 0:
            # it then loads whole pages by TMA; a weight of 0 times the NaN of a slot past the row's end is NaN
            reasons.append(f"FlashAttention-3 with block_size {block_size} reads past a sequence's end")
        elif version == 2 and block_size % 256:
            reasons.append(f"FlashAttention-2 needs a block_size that is a multiple of 256, not {block_size}")
        else:
            try:
                return (version, _Forward3() if version == 3 else importlib.import_module(module)), None
            except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
                reasons.append(f"FlashAttention-{version} cannot be imported ({error})")
    return None, "; ".join(reasons)
