"""Triton side of skinny.py: products of 1 to 16 rows with a weight that is read once, at memory speed.

What bounds them is how many bytes are in flight, and then the few microseconds between one kernel's last store and the
next one's first. So a program asks for its first PREFETCH tiles of weight, most often all it will ever need, before it
waits for the kernel ahead (programmatic dependent launch; no kernel writes weights): they arrive in registers while the
kernels ahead still run, and what is left after the wait is to read x, which lies in L2, and to add up.

vector_kernel multiplies in float32 lanes: cheapest for one row. matrix_kernel uses tensor cores, each warp on a slice
of the inner dimension of its own (a batched dot whose batch is the slices), so that a program of few columns still has
many warps. Neither shares sums among programs, so results do not vary from run to run, and a row's do not depend on
the other rows.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code=assignment
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.skinny import Config, choose_config, is_gated

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _load_tile(tile, in_n, in_k, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of weight; where it is whole, its loads carry no predicates."""
    if EVEN_N and EVEN_K:
        return tl.load(tile)
    elif EVEN_N:
        return tl.load(tile, mask=in_k, other=0.0)
    elif EVEN_K:
        return tl.load(tile, mask=in_n, other=0.0)
    else:
        return tl.load(tile, mask=in_n & in_k, other=0.0)


@triton.jit
def finish(y, up, column, mask, bias, out, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr):
    """Bias, gate or residual in float32, one rounding, and the store; ``out`` points at the row or rows."""
    if HAS_BIAS:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    if ADD:
        y += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(v, rstd, norm_weight, dtype: tl.constexpr):
    """Rounds where rms_norm_reference does: the normalised value, then its product with the weight."""
    normed = (v.to(tl.float32) * rstd).to(dtype).to(tl.float32)
    return (normed * norm_weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["n"])
def vector_kernel(
    x,  # [M, K], rows x_stride apart
    norm_weight,  # [K]
    weight,  # [n, K], or [2n, K] = gate over up
    bias,  # [n]
    out,  # [M, n]; with ADD also the residual
    n,
    x_stride,
    eps,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_N: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    tile = row[:, None] * K + k[None, :]
    in_n = (first + row < n)[:, None]
    weight += first.to(tl.int64) * K
    up_weight = weight + n.to(tl.int64) * K

    # Tuples of tensors are unrolled here, at compile time: registers, not memory.
    w, w_up, nw = (), (), ()
    for t in tl.static_range(PREFETCH):
        start = t * BLOCK_K
        in_k = (start + k < K)[None, :]
        w = w + (_load_tile(weight + start + tile, in_n, in_k, EVEN_N, start + BLOCK_K <= K),)
        if GATED:
            w_up = w_up + (_load_tile(up_weight + start + tile, in_n, in_k, EVEN_N, start + BLOCK_K <= K),)
    if NORM:
        for t in tl.static_range(TILES):
            nw = nw + (tl.load(norm_weight + t * BLOCK_K + k, mask=t * BLOCK_K + k < K, other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    normed, acc, acc_up = (), (), ()
    for r in tl.static_range(M):
        acc = acc + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        if GATED:
            acc_up = acc_up + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        if NORM:
            held = ()
            squares = tl.zeros([BLOCK_K], tl.float32)
            for t in tl.static_range(TILES):
                v = tl.load(x + r * x_stride + t * BLOCK_K + k, mask=t * BLOCK_K + k < K, other=0.0)
                held = held + (v,)
                squares += v.to(tl.float32) * v.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(squares) / K + eps)
            for t in tl.static_range(TILES):
                normed = normed + (_normalize(held[t], rstd, nw[t], dtype),)

    for t in tl.static_range(TILES):
        if t + PREFETCH < TILES:  # ask for a later tile before using this one
            ahead = (t + PREFETCH) * BLOCK_K
            in_k = (ahead + k < K)[None, :]
            w = w + (_load_tile(weight + ahead + tile, in_n, in_k, EVEN_N, ahead + BLOCK_K <= K),)
            if GATED:
                w_up = w_up + (_load_tile(up_weight + ahead + tile, in_n, in_k, EVEN_N, ahead + BLOCK_K <= K),)
        sums, sums_up = (), ()
        for r in tl.static_range(M):
            if NORM:
                v = normed[r * TILES + t]
            else:
                v = tl.load(x + r * x_stride + t * BLOCK_K + k, mask=t * BLOCK_K + k < K, other=0.0)
            v = v.to(tl.float32)[None, :]
            sums = sums + (acc[r] + w[t].to(tl.float32) * v,)
            if GATED:
                sums_up = sums_up + (acc_up[r] + w_up[t].to(tl.float32) * v,)
        acc = sums
        acc_up = sums_up

    column = first + row
    for r in tl.static_range(M):
        y = tl.sum(acc[r], 1)
        up = tl.sum(acc_up[r], 1) if GATED else y
        finish(y, up, column, column < n, bias, out + r * n + column, HAS_BIAS, GATED, ADD)


@triton.jit(do_not_specialize=["n", "m"])
def matrix_kernel(
    x,  # [m, K], rows x_stride apart
    norm_weight,  # [K]
    weight,  # [n, K], or [2n, K] = gate over up
    bias,  # [n]
    out,  # [m, n]; with ADD also the residual
    m,
    n,
    x_stride,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_N: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    STEP: tl.constexpr = SPLIT * BLOCK_K
    TILES: tl.constexpr = (K + STEP - 1) // STEP
    HOLD_X: tl.constexpr = TILES * BLOCK_K * BLOCK_M <= 4096  # registers: half of them, 64 of a thread's
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    k = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    tile = row[None, :, None] * K + k
    in_n = (first + row < n)[None, :, None]
    weight += first.to(tl.int64) * K
    up_weight = weight + n.to(tl.int64) * K
    token = tl.arange(0, BLOCK_M)
    x_tile = token[None, :, None] * x_stride + k
    in_m = (token < m)[None, :, None]

    w, w_up = (), ()
    for t in tl.static_range(PREFETCH):
        start = t * STEP
        w = w + (_load_tile(weight + start + tile, in_n, start + k < K, EVEN_N, start + STEP <= K),)
        if GATED:
            w_up = w_up + (_load_tile(up_weight + start + tile, in_n, start + k < K, EVEN_N, start + STEP <= K),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    held = ()
    rstd = 0.0
    if NORM:
        squares = tl.zeros([SPLIT, BLOCK_M], tl.float32)
        for t in tl.static_range(TILES):
            v = tl.load(x + t * STEP + x_tile, mask=in_m & (t * STEP + k < K), other=0.0)
            if HOLD_X:
                held = held + (v,)
            squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 2)
        rstd = tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :, None]

    acc = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], tl.float32)
    for t in tl.static_range(TILES):
        if t + PREFETCH < TILES:  # ask for a later tile before using this one
            ahead = (t + PREFETCH) * STEP
            w = w + (_load_tile(weight + ahead + tile, in_n, ahead + k < K, EVEN_N, ahead + STEP <= K),)
            if GATED:
                w_up = w_up + (_load_tile(up_weight + ahead + tile, in_n, ahead + k < K, EVEN_N, ahead + STEP <= K),)
        if NORM and HOLD_X:
            v = held[t]
        else:  # .ca is the default; said, it keeps the compiler from holding the norm's loads instead
            v = tl.load(x + t * STEP + x_tile, mask=in_m & (t * STEP + k < K), other=0.0, cache_modifier=".ca")
        if NORM:
            v = _normalize(v, rstd, tl.load(norm_weight + t * STEP + k, mask=t * STEP + k < K, other=0.0), dtype)
        v = v.to(DOT_DTYPE)
        acc = tl.dot(v, tl.permute(w[t].to(DOT_DTYPE), (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            acc_up = tl.dot(v, tl.permute(w_up[t].to(DOT_DTYPE), (0, 2, 1)), acc_up, input_precision="ieee")

    y = tl.sum(acc, 0)
    up = tl.sum(acc_up, 0) if GATED else y
    column = (first + row)[None, :]
    mask = (column < n) & (token < m)[:, None]
    finish(y, up, column, mask, bias, out + token[:, None] * n + column, HAS_BIAS, GATED, ADD)


def launch(
    operation: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: Config | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Fill ``out`` [m, n] (``linear_add``: add to it) by the kernel that ``config``, or the shape, asks for; return it.

    x: [m, k], its rows may be apart; weight: [n, k], or [2n, k] for the gated. ``pdl`` None: where it works.
    """
    m, k = x.shape
    n = out.shape[1]
    gated = is_gated(operation)
    assert weight.shape == (2 * n if gated else n, k) and out.shape[0] == m
    assert weight.is_contiguous() and out.is_contiguous() and x.stride(1) == 1
    assert config is None or not config.split or m <= config.block_m
    config = config or choose_config(operation, m, n, k, x.element_size())
    pdl = use_pdl(x.device) if pdl is None else pdl
    settings = {"launch_pdl": True} if pdl else {}
    grid = (triton.cdiv(n, config.block_n),)
    even_n = n % config.block_n == 0
    flags = (even_n, norm_weight is not None, gated, operation == "linear_add", bias is not None)
    sizes = (config.block_n, config.block_k)
    if config.split:
        # The interpreter multiplies no bfloat16.
        dot_dtype = DOT_DTYPES[x.dtype] if x.is_cuda else tl.float32
        matrix_kernel[grid](
            *(x, norm_weight, weight, bias, out, m, n, x.stride(0), eps),
            *(k, config.block_m, *sizes, config.split, config.prefetch, *flags, dot_dtype, pdl),
            num_warps=config.num_warps,
            **settings,
        )
    else:
        vector_kernel[grid](
            *(x, norm_weight, weight, bias, out, n, x.stride(0), eps),
            *(m, k, *sizes, config.prefetch, *flags, pdl),
            num_warps=config.num_warps,
            **settings,
        )
    return out
