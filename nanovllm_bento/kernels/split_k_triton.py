"""Triton side of split_k.py: tiles of tensor cores whose weights are on their way before their input is there.

A program computes rows x block_n columns over its share of the inner dimension. Before it waits for the kernel ahead
(programmatic dependent launch; no kernel writes weights) it calls its weights into the L2 cache, which costs a few
instructions; after the wait it streams both operands through shared memory. Shares of the inner dimension let a narrow
product use every multiprocessor. Their sums are not added here: that would need atomics, whose order varies, or a wait
for the slowest. They are stored in float32, and the norm that follows adds them up in their order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.skinny import is_gated
from nanovllm_bento.kernels.split_k import Config


@triton.jit
def _call_into_l2(
    weight, row, column, K: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr, PIECES: tl.constexpr, PTX
):
    """Ask for columns column .. column + SHARE of BLOCK_N rows of weight, each row in PIECES pieces, a thread each."""
    i = tl.arange(0, BLOCK_N * PIECES)
    start = weight + (row + i // PIECES).to(tl.int64) * K + column + (i % PIECES) * (SHARE // PIECES)
    tl.inline_asm_elementwise(PTX, "=r,l", [start.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["m", "n"])
def _tile_kernel(
    x,  # [m, K], rows x_stride apart
    weight,  # [n, K], or [2n, K] = gate over up
    bias,  # [n], or None
    out,  # [SPLITS, m, n]
    m,
    n,
    x_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    PIECES: tl.constexpr,
    PREFETCH: tl.constexpr,  # PTX; None: the weights are not called early
    PDL: tl.constexpr,
):
    SHARE: tl.constexpr = K // SPLITS
    split = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_N
    if PREFETCH is not None:
        _call_into_l2(weight, first, split * SHARE, K, BLOCK_N, SHARE, PIECES, PREFETCH)
        if GATED:
            _call_into_l2(weight, first + n, split * SHARE, K, BLOCK_N, SHARE, PIECES, PREFETCH)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    column = first + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = split * SHARE + tl.arange(0, BLOCK_K)
    # Rows beyond the last read the first row instead: no predicates, and what they give is not stored.
    x_tile = x + tl.where(token < m, token, 0)[:, None].to(tl.int64) * x_stride + k[None, :]
    w_tile = weight + column[None, :].to(tl.int64) * K + k[:, None]
    up_tile = w_tile + n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in tl.range(0, SHARE // BLOCK_K, num_stages=STAGES):
        values = tl.load(x_tile + t * BLOCK_K)
        acc = tl.dot(values, tl.load(w_tile + t * BLOCK_K), acc, input_precision="ieee")
        if GATED:
            acc_up = tl.dot(values, tl.load(up_tile + t * BLOCK_K), acc_up, input_precision="ieee")
    if bias is not None:
        acc += tl.where(split == 0, tl.load(bias + column).to(tl.float32), 0.0)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    at = (split * m + token[:, None]).to(tl.int64) * n + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=token[:, None] < m)


def launch(
    operation: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: Config,
    bias: Tensor | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Fill ``out`` [splits, m, n] and return it. x: [m, k], its rows may be apart; weight: [n, k], gated [2n, k].

    config must suit the shape (``split_k.suits``). ``pdl`` None: where it works.
    """
    m, k = x.shape
    splits, _, n = out.shape
    gated = is_gated(operation)
    assert weight.shape == (2 * n if gated else n, k) and out.shape == (config.splits, m, n)
    assert weight.is_contiguous() and out.is_contiguous() and x.stride(1) == 1
    pdl = use_pdl(x.device) if pdl is None else pdl
    share = k // splits
    pieces = max(1, config.num_warps * 32 // config.block_n)
    size = share // pieces * x.element_size()
    prefetch = config.prefetch and pdl and size % 16 == 0 and weight.data_ptr() % 16 == 0
    ptx = f"cp.async.bulk.prefetch.L2.global [$1], {size}; mov.b32 $0, 0;" if prefetch else None
    _tile_kernel[(n // config.block_n, triton.cdiv(m, config.block_m), splits)](
        *(x, weight, bias, out, m, n, x.stride(0)),
        *(k, config.block_m, config.block_n, config.block_k, splits, config.stages, gated, pieces, ptx, pdl),
        num_warps=config.num_warps,
        launch_pdl=pdl,
    )
    return out
