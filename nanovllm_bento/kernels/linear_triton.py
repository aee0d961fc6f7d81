"""The batch-invariant matrix product: one tile shape per weight, one order of summation, whatever the number of rows.

A library's product picks its kernel, and with it the order in which a row's products are summed, by the number of rows;
so the same token can get other logits when other requests run beside it (He et al., "Defeating Nondeterminism in LLM
Inference", 2025).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl

BLOCK_M, BLOCK_K = 64, 64


@triton.jit(do_not_specialize=["num_rows"])
def _invariant_linear(
    x,
    weight,
    bias,
    out,
    num_rows,
    n,
    k,
    out_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    row_ok, column_ok = rows < num_rows, columns < n
    x_at = x + rows[:, None].to(tl.int64) * k + ks[None, :]
    w_at = weight + columns[None, :].to(tl.int64) * k + ks[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        k_ok = start + ks < k
        a = tl.load(x_at + start, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        b = tl.load(w_at + start, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [rows, k] @ weight [n, k].T + bias; each row's result depends on that row alone, bit for bit."""
    (num_rows, k), n = x.shape, weight.shape[0]
    if out is None:
        out = x.new_empty(num_rows, n)
    # By the weight's shape alone: narrow products get narrow tiles, so that few rows still fill the GPU.
    block_n = 128 if n >= 16384 else 64 if n >= 4096 else 32
    pdl = use_pdl(x.device)
    _invariant_linear[(triton.cdiv(num_rows, BLOCK_M), triton.cdiv(n, block_n))](
        x,
        weight,
        bias,
        out,
        num_rows,
        n,
        k,
        out.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        PDL=pdl,
        num_warps=4,
        num_stages=3 if x.element_size() == 2 else 2,
        launch_pdl=pdl,
    )
    return out
