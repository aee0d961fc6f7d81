"""Triton side of skinny.py for 17 to 256 rows: tiles on the tensor cores, with the norm, the gate or the add inside.

What bounds these products is first the stream of weights from memory, then, with more rows, what the multiprocessors
read from L2. So a program asks L2 for its share of the weights before it waits for the kernel ahead (programmatic
dependent launch; no kernel writes weights), and then runs an ordinary pipelined loop. A product of few columns is cut
along its inner dimension as well: the splits of a tile leave float32 parts, and the last to arrive, told by a counter,
adds them in their order, so that results do not vary from run to run.

A norm needs no pass of its own: rms_norm(x) @ W.T = rstd * ((x * norm_weight) @ W.T), and the squares are summed in the
same loop. So x * norm_weight is rounded, once, where the reference rounds the normalised value and then its product
with the weight.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.skinny import TileConfig, choose_tile_config
from nanovllm_bento.kernels.skinny_triton import DOT_DTYPES, finish

MAX_TILES = 1 << 16


@triton.jit
def _prefetch_to_l2(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["m"])
def tile_kernel(
    x,  # [m, K], rows x_stride apart
    norm_weight,  # [K]
    weight,  # [N, K], or [2N, K] = gate over up
    bias,  # [N]
    out,  # [m, N]; with ADD also the residual
    parts,  # float32 [tiles, SPLIT, BLOCK_M, BLOCK_N]
    arrived,  # int32 [tiles]: zero, and zero again afterwards
    m,
    x_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(SPLIT == 1 or not (NORM or GATED), "a norm needs all of a row, a gate all of a sum")
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    EVEN_K: tl.constexpr = K % (SPLIT * BLOCK_K) == 0
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    dtype: tl.constexpr = x.dtype.element_ty
    # Unnormalised values could leave float16's range; a factor of 2^-5 costs it no precision that matters.
    SHRINK: tl.constexpr = 0.03125 if dtype == tl.float16 else 1.0

    # Programs that read the same columns of weight are neighbours.
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0) % (tiles_m * TILES_N)
    split = tl.program_id(0) // (tiles_m * TILES_N)
    tile_m = tile % tiles_m
    first_n = tile // tiles_m * BLOCK_N
    first_k = split * (STEPS * BLOCK_K)

    # A gated tile's columns alternate, gate, up, gate, up, so that both of a pair come to lie in one thread.
    j = tl.arange(0, WIDTH)
    n = j // 2 if GATED else j
    in_n = (first_n + n < N)[:, None]
    w_row = tl.minimum(first_n + n, N - 1) - first_n if not EVEN_N else n  # always a row that there is
    w_row = w_row * K + (j % 2) * (N * K) if GATED else w_row * K
    weight += first_n.to(tl.int64) * K + first_k

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        line = tl.arange(0, BLOCK_K // 64) * 64  # 128 bytes
        for step in range(tile_m, STEPS, tiles_m):  # neighbours share the work
            if EVEN_K:
                _prefetch_to_l2(weight + step * BLOCK_K + w_row[:, None] + line[None, :])
            else:
                _prefetch_to_l2(weight + w_row[:, None] + tl.minimum(step * BLOCK_K + line, K - 1 - first_k)[None, :])
        tl.extra.cuda.gdc_wait()

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = (row < m)[:, None]
    k = tl.arange(0, BLOCK_K)
    x_tile = row[:, None] * x_stride + k[None, :]
    w_tile = w_row[:, None] + k[None, :]
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for step in range(STEPS):
        start = step * BLOCK_K
        if EVEN_K:
            v = tl.load(x + first_k + start + x_tile, mask=in_m, other=0.0)
            w = tl.load(weight + start + w_tile) if EVEN_N else tl.load(weight + start + w_tile, mask=in_n, other=0.0)
        else:
            in_k = (first_k + start + k < K)[None, :]
            v = tl.load(x + first_k + start + x_tile, mask=in_m & in_k, other=0.0)
            w = tl.load(weight + start + w_tile, mask=in_n & in_k, other=0.0)
        if NORM:
            nw = tl.load(norm_weight + start + k, mask=start + k < K, other=0.0).to(tl.float32) * SHRINK
            v = v.to(tl.float32)
            squares += tl.sum(v * v, 1)
            v = (v * nw[None, :]).to(dtype)
        acc = tl.dot(v.to(DOT_DTYPE), w.to(DOT_DTYPE).T, acc, input_precision="ieee")

    if NORM:
        acc *= (tl.rsqrt(squares / K + eps) / SHRINK)[:, None]
    column = (first_n + tl.arange(0, BLOCK_N))[None, :]
    at = out + row[:, None] * N + column
    mask = in_m & (column < N)
    if SPLIT > 1:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts += tile.to(tl.int64) * (SPLIT * SIZE)
        tl.store(parts + split * SIZE + cell, acc, mask=mask)
        # all of this program's stores, then one thread's release: see "causality order" in PTX's memory model
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(SPLIT):
                total += tl.load(parts + s * SIZE + cell, mask=mask, other=0.0, cache_modifier=".cg")
            finish(total, total, column, mask, bias, at, HAS_BIAS, GATED, ADD)
    elif GATED:
        gate, up = acc.reshape([BLOCK_M, BLOCK_N, 2]).split()
        finish(gate, up, column, mask, bias, at, HAS_BIAS, GATED, ADD)
    else:
        finish(acc, acc, column, mask, bias, at, HAS_BIAS, GATED, ADD)


@cache
def _counters(device: torch.device) -> Tensor:
    """All launches on a device share these, as one stream runs them one after the other. Made before any capture."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def launch(
    operation: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: TileConfig | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """What skinny_triton.launch says, which calls this for more rows than its own kernels take."""
    m, k = x.shape
    n = out.shape[1]
    config = config or choose_tile_config(operation, m, n, k)
    pdl = use_pdl(x.device) if pdl is None else pdl
    settings = {"launch_pdl": True} if pdl else {}
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    parts = arrived = None
    if config.split > 1:
        assert tiles <= MAX_TILES
        parts = x.new_empty(tiles * config.split * config.block_m * config.block_n, dtype=torch.float32)
        arrived = _counters(x.device)
    # The interpreter multiplies no bfloat16.
    dot_dtype = DOT_DTYPES[x.dtype] if x.is_cuda else tl.float32
    tile_kernel[(tiles * config.split,)](
        *(x, norm_weight, weight, bias, out, parts, arrived, m, x.stride(0), eps),
        *(n, k, config.block_m, config.block_n, config.block_k, config.split),
        *(norm_weight is not None, operation == "norm_gate_up", operation == "linear_add", bias is not None),
        *(dot_dtype, pdl),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **settings,
    )
    return out
