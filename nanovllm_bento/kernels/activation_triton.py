"""silu(gate) * up in Triton: one program a block of columns of one row. What it computes is said in activation.py."""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl


@triton.jit
def _silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # One grid dimension, the blocks of a row side by side: the other dimensions hold 65535 programs at most.
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    cols = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    x_ptr += row * (2 * N)
    gate = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + N + cols, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * N + cols, (silu * up).to(dtype), mask=mask)


def silu_and_mul(x: Tensor, *, block: int = 1024, num_warps: int = 4) -> Tensor:
    """The defaults give a thread one 16-byte load of gate and one of up, in bf16."""
    assert x.is_contiguous()
    n = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], n))
    pdl = use_pdl(x.device)
    _silu_and_mul_kernel[(out.numel() // n * triton.cdiv(n, block),)](
        x, out, N=n, BLOCK=block, PDL=pdl, num_warps=num_warps, launch_pdl=pdl
    )
    return out
