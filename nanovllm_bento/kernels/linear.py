"""Matrix products with weights [out_features, in_features].

On a CPU a weight is packed once, after loading, into oneDNN's blocked layout, which small batches mostly stream faster
than the plain one (docs/performance.md has both, matrix by matrix).
"""

from functools import cache

import torch
from torch import Tensor

PACK_ROWS = 32
"""Batch size that the packed layout is chosen for; the same layout serves every batch."""


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias; x: [rows, in_features]. ``packed``, from pack_weight, is used instead of weight if given.

    batch_invariant (GPU only): a row's result is bit-equal whatever rows are beside it. out: where to write the result,
    [rows, out_features] (GPU only, without bias).
    """
    if packed is not None:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product
    assert weight is not None
    if batch_invariant:
        from nanovllm_bento.kernels.linear_triton import invariant_linear

        return invariant_linear(x, weight, bias, out)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    return torch.nn.functional.linear(x, weight, bias)


def pack_weight(weight: Tensor) -> Tensor | None:
    """The opaque packed form of a [out, in] weight, or None where packing does not work or does not pay."""
    if weight.device.type != "cpu" or not _packing_works(weight.dtype):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return packed


def best_cpu_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it natively (AVX512-BF16 or AMX), else float32."""
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether this build and CPU multiply by a packed weight of ``dtype``: tried once on a small product."""
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64).to(dtype)
    weight = torch.linspace(-1, 1, 32 * 64).view(32, 64).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(found.float(), x.float() @ weight.float().T, rtol=1e-2, atol=1e-1)
