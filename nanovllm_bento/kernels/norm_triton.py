"""RMSNorm in Triton: one program a row, the row in registers. What it computes is said in norm.py.

The block and the number of warps follow from the row's width alone, never from the number of rows, so that a row is
summed in the same order in every batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl


@triton.jit(do_not_specialize=["part_stride"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # None: no add; else the sum is written back here
    weight_ptr,
    out_ptr,  # may be x_ptr
    part_stride,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # x is the sum of so many, part_stride apart
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    offsets = tl.program_id(0).to(tl.int64) * N + cols
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total = (x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + offsets, total, mask=mask)
        x = total.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (normed * weight).to(dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, num_warps: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    _launch(x, None, weight, out, eps, num_warps=num_warps)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Overwrites x with the norm and residual with the sum, and returns the two."""
    _launch(x, residual, weight, x, eps, num_warps=num_warps)
    return x, residual


def sum_add_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Overwrites residual with the sum; returns the norm, which is new, and residual."""
    out = torch.empty_like(residual)
    _launch(parts, residual, weight, out, eps, num_parts=len(parts))
    return out, residual


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    *,
    num_parts: int = 1,
    num_warps: int | None = None,
) -> None:
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    n = weight.shape[0]
    block = max(32, triton.next_power_of_2(n))
    # A thread loads 16 bytes of bf16 at a time. Never more threads than elements: Triton would give one element to two
    # threads, and in place one could read what the other has written.
    warps = min(num_warps or min(16, block // 256), block // 32) or 1
    pdl = use_pdl(x.device)
    _rms_norm_kernel[(out.numel() // n,)](
        x,
        residual,
        weight,
        out,
        out.numel(),
        eps,
        N=n,
        BLOCK=block,
        PARTS=num_parts,
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )
