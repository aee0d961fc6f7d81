"""Paged attention of decode rows (one query token each) as a Triton kernel.

One program takes one KV head of one row, with all query heads that share it, over one chunk of the row's keys
("Flash-Decoding", Dao et al. 2023: a long row is cut into splits so that few rows fill the machine and no long row is
its tail). A row of one split is written at once. The splits of a longer row leave unweighted parts and log-sum-exps;
the last of them to arrive, told by a counter, combines all, so that one launch does everything. The work is reading
the cache once: what is tuned is how many bytes are on their way at any time.

Fused use: queries come raw from the packed projection, and what qk_norm_rope_store does for prefill tokens happens
here. Each program normalises and rotates its query heads; the one whose split ends at the row's last position also
makes the new key and value, stores them, and starts its softmax from them. No program reads the new slot.

An fp8 (e4m3) cache is read as pairs of bytes: the even and the odd elements of head_dim are multiplied apart, each byte
moved into a float16 (see _e4m3_pair). Read as bytes, a value tile would reach the tensor cores byte by byte.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.attention.common_triton import LOG2E, dot_dtype, dot_precision
from nanovllm_bento.kernels.launch import use_pdl


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """block_n: keys a tile. num_warps, num_stages: Triton's.

    programs_per_sm: the row splits are as many as make this many programs for each multiprocessor, but a split has
    min_chunk keys at least. Where rows alone make enough programs, a row is still cut into up to balance_splits of at
    least balance_chunk keys, so that a very long row does not end long after all others.

    prefetch: in fused use, keys and values of a program's first tile are called into the L2 cache before the queries
    are made, which a program that has its multiprocessor to itself would otherwise wait for.

    late: the kernels that follow may start when the keys are read, not at once. They call their weights into the L2
    cache, where the keys of many rows would drive them out again.
    """

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    programs_per_sm: int = 3
    min_chunk: int = 128
    balance_splits: int = 4
    balance_chunk: int = 4096
    prefetch: bool = False
    late: bool = False


FEW_PAIRS: list[tuple[int, DecodeConfig]] = [
    (8, DecodeConfig(num_stages=3, programs_per_sm=1, min_chunk=64, prefetch=True)),
    (16, DecodeConfig(num_stages=3, programs_per_sm=2, min_chunk=64, prefetch=True)),
    (88, DecodeConfig(block_n=32, num_warps=1, num_stages=3, programs_per_sm=2, min_chunk=64, prefetch=True)),
    (128, DecodeConfig(block_n=16, num_warps=1, num_stages=3, prefetch=True)),
    (384, DecodeConfig(block_n=32, num_warps=1, num_stages=3, programs_per_sm=1, prefetch=True)),
    (512, DecodeConfig(block_n=16, num_warps=2, num_stages=3, programs_per_sm=1, prefetch=True)),
]
"""(rows times KV heads at most, configuration), for heads of 65 to 128 dimensions in 16 bits, where the kernels of a
step overlap. Measured in the engine (benchmarks/decode_rows.py): the products that follow start beside attention if it
leaves them room."""

MANY_PAIRS: list[tuple[int, DecodeConfig]] = [
    (6, DecodeConfig(block_n=32, num_warps=2, num_stages=2, prefetch=True)),
    (12, DecodeConfig(block_n=16, num_warps=1, num_stages=2, prefetch=True)),
    (8, DecodeConfig(block_n=32, num_warps=1, num_stages=2, prefetch=True)),
]
"""(programs that a multiprocessor's registers hold, configuration), for heads of 65 to 128 dimensions in 16 bits. Of
those whose last waves are equally full the first is the fastest."""

MAX_SPLITS = 128
E4M3_SHIFT = 256.0
"""What _e4m3_pair divides by: 2 to the difference of float16's and e4m3's exponent bias."""


@cache
def choose_config(
    head_dim: int,
    kv_dtype: torch.dtype,
    dtype: torch.dtype,
    num_rows: int,
    kv_heads: int,
    sms: int,
    overlapping: bool = False,
) -> DecodeConfig:
    """The configuration for a case, from what is fixed in a CUDA graph.

    overlapping: the kernels of decode steps divide a multiprocessor's memory alike (kernels/shared_memory.py).

    Measured on an H100 with 8 KV heads of 128: alone (benchmarks/attention_tune.py), and in the engine FEW_PAIRS and
    MANY_PAIRS. Few rows: short splits of one tile, whose loads all go out at once, or fewer and smaller programs that
    leave others room. Many: small programs without splits, several of which share a multiprocessor, cut so that their
    last wave is nearly a full one.
    """
    wide = head_dim > 128
    if dtype == torch.float32:
        return DecodeConfig(block_n=16 if wide else 32)
    pairs = num_rows * kv_heads
    fp8 = kv_dtype.itemsize == 1
    measured = 64 < head_dim <= 128 and not fp8
    if measured and overlapping and pairs <= FEW_PAIRS[-1][0]:
        config = next(config for most, config in FEW_PAIRS if pairs <= most)
    elif measured and pairs > 4 * sms:
        config = min(MANY_PAIRS, key=lambda held: _waste(pairs / sms / held[0]))[1]
    elif pairs < 64:
        config = DecodeConfig(num_stages=3, programs_per_sm=2, min_chunk=64, prefetch=True)
    elif pairs < 256:
        config = DecodeConfig(programs_per_sm=8, prefetch=True) if fp8 else DecodeConfig(num_warps=2, prefetch=True)
    elif pairs < 1024:
        config = DecodeConfig()
    else:
        config = DecodeConfig(block_n=32, num_warps=2, num_stages=3 if fp8 else 2)
    return replace(config, block_n=config.block_n // 2 if wide else config.block_n, late=num_rows >= split_k.MIN_ROWS)


def _waste(waves: float) -> float:
    """How much longer ``waves`` of programs that take equally long may run than their reads alone would.

    The last wave may be all but empty, and a program alone is bound by latency: it takes nearly as long as a full one.
    """
    return 1.0 if waves <= 1 else ceil(waves) / waves


@cache
def choose_splits(config: DecodeConfig, num_rows: int, kv_heads: int, max_seq_len: int, sms: int) -> tuple[int, int]:
    """(splits a row at most, keys a split at least), from what is fixed in a CUDA graph alone."""
    to_fill = ceil(config.programs_per_sm * sms / (num_rows * kv_heads))
    splits, chunk = to_fill, config.min_chunk
    if to_fill == 1:
        splits, chunk = config.balance_splits, config.balance_chunk
    chunk = ceil(chunk / config.block_n) * config.block_n
    return max(1, min(splits, ceil(max_seq_len / chunk), MAX_SPLITS)), chunk


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What makes a decode step's queries, keys and values of its packed projection; see qk_norm_rope_store.

    table: float32 [num_positions, head_dim]. slot_mapping: int64 [num_tokens], -1: no store. norm_weight: None or
    [num_heads + num_kv_heads, head_dim].
    """

    table: Tensor
    slot_mapping: Tensor
    norm_weight: Tensor | None
    eps: float


class DecodeWorkspace:
    """What the splits of a row leave for its last one. Grown between steps only, never freed: CUDA graphs hold it.

    Shared by all layers and steps, as one stream runs them one after the other. counters are zero between launches:
    the last split of a row sets its own back.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim, self.device = num_heads, num_kv_heads, head_dim, device
        self.parts = self.lse = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.empty(0, dtype=torch.int32, device=device)
        self._outgrown: list[Tensor] = []

    def reserve(self, num_rows: int, num_splits: int) -> None:
        """Room for num_rows of num_splits each. Not to be called under capture."""
        if num_splits == 1:
            return
        sets = num_rows * num_splits * self.num_heads
        if sets > self.lse.numel():
            self._outgrown += [self.parts, self.lse]
            self.parts = torch.empty(sets * self.head_dim, dtype=torch.float32, device=self.device)
            self.lse = torch.empty(sets, dtype=torch.float32, device=self.device)
        if num_rows * self.num_kv_heads > self.counters.numel():
            self._outgrown.append(self.counters)
            self.counters = torch.zeros(num_rows * self.num_kv_heads, dtype=torch.int32, device=self.device)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
    config: DecodeConfig,
    splits: tuple[int, int],
    new: NewTokens | None = None,
) -> None:
    """Fills out's first meta.num_decode_rows rows. q, out: [num_tokens, num_heads, head_dim].

    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]. splits: choose_splits' answer, for which
    workspace has room. With ``new``, q is the packed projection [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
    (even head_dim), and the step's keys and values are written to the caches here; else they are there already.
    """
    num_rows = meta.num_decode_rows
    _, block_size, kv_heads, head_dim = k_cache.shape
    group = out.shape[1] // kv_heads
    num_splits, min_chunk = splits
    padded_dim = triton.next_power_of_2(head_dim)
    padded_group = triton.next_power_of_2(group)
    pdl = use_pdl(q.device)
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    shift = 1.0
    if fp8:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
        shift = E4M3_SHIFT
    paged_decode_kernel[(kv_heads, num_rows, num_splits)](
        out,
        q,
        k_cache,
        v_cache,
        meta.block_table,
        meta.seq_lens,
        workspace.parts,
        workspace.lse,
        workspace.counters,
        new.table if new else None,
        new.slot_mapping if new else None,
        new.norm_weight if new else None,
        new.eps if new else 0.0,
        k_scale,
        v_scale,
        scale * k_scale * shift * LOG2E,
        v_scale * shift,
        num_splits,
        min_chunk,
        out.stride(0),
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        meta.block_table.stride(0),
        GROUP=group,
        GROUP_PAD=max(16, padded_group),
        HEAD_DIM=head_dim,
        DIM_PAD=padded_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        FP8=fp8,
        PACKED=q.device.type == "cuda",
        DOT_DTYPE=dot_dtype(q.dtype, fp8, q.device),
        PRECISION=dot_precision(q.dtype),
        SPLIT=num_splits > 1,
        PREFETCH=config.prefetch and new is not None and q.device.type == "cuda",
        COMBINE_BLOCK=max(1, min(16, 4096 // (padded_group * padded_dim))),
        COMBINE_GROUP=padded_group,
        LATE=config.late,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )


@triton.jit
def _e4m3_pair(x, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two e4m3 numbers of each int16 as float16, divided by E4M3_SHIFT: the bits of a number, moved (exact).

    PACKED: two int16 an instruction, which the compiler does not find by itself; a third of the whole loop.
    """
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            shl.b32 a, $2, 7;
            shl.b32 b, $2, 8;
            and.b32 a, a, 0x3f803f80;
            lop3.b32 $0, b, 0x80008000, a, 0xea;
            shr.u32 a, $2, 1;
            and.b32 a, a, 0x3f803f80;
            lop3.b32 $1, $2, 0x80008000, a, 0xea;
            }
            """,  # 0xea: (first & second) | third
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True)
        high = ((x & -0x8000) | ((x & 0x7F00) >> 1)).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _even_odd(x, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Even and odd columns of [n, D]; x itself, twice, unless FP8."""
    if FP8:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    else:
        even, odd = x, x
    return even, odd


@triton.jit
def _e4m3_words(x, scale):  # type: ignore[no-untyped-def]
    """x / scale [n, D], clamped and rounded to e4m3 as rope_store does: two of them in an int16, [n, D / 2]."""
    x = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    even, odd = _even_odd(x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16), True)
    return even | (odd << 8)


@triton.jit
def _prefetch(pointers):  # type: ignore[no-untyped-def]
    """Calls the 128 bytes around each address into the L2 cache, which is the same for all: nothing stale is read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _norm_and_rotate(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, table_ptr, heads, d, mask, eps, HEAD_DIM: tl.constexpr
):
    """The heads at offsets ``heads`` [n, 1], elements d [1, D], normalised and rotated; rounded where rope_store does.

    An element's partner in the rotation is loaded once more rather than passed between threads. table_ptr: the
    position's cosines, then its sines.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = x_ptr.dtype.element_ty
    partner = (d + HALF) % HEAD_DIM
    x = tl.load(x_ptr + heads + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + heads + partner, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(table_ptr + d % HALF)
    sin = tl.load(table_ptr + HALF + d % HALF)
    if weight_ptr is not None:
        x_weight = tl.load(weight_ptr + heads + d, mask=mask, other=0.0).to(tl.float32)
        y_weight = tl.load(weight_ptr + heads + partner, mask=mask, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
        x = ((x * rms).to(dtype).to(tl.float32) * x_weight).to(dtype).to(tl.float32)
        y = ((y * rms).to(dtype).to(tl.float32) * y_weight).to(dtype).to(tl.float32)
    return (x * cos + y * tl.where(d < HALF, -sin, sin)).to(dtype)


@triton.jit
def _scores(q, k, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """[G, D], [N, D] -> float32 [G, N]."""
    return tl.dot(q.to(DOT_DTYPE), tl.trans(k.to(DOT_DTYPE)), input_precision=PRECISION)


@triton.jit
def _add_values(acc, p, v, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [G, D] + [G, N] @ [N, D]."""
    return tl.dot(p.to(DOT_DTYPE), v.to(DOT_DTYPE), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_splits", "min_chunk"])
def paged_decode_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    q_ptr,
    k_ptr,  # as int16 where FP8: strides count pairs of elements
    v_ptr,
    table_ptr,
    lens_ptr,
    parts_ptr,  # float32 [rows, kv_heads, num_splits, GROUP, HEAD_DIM]
    lse_ptr,  # float32 [rows, kv_heads, num_splits, GROUP], base 2
    counters_ptr,  # int32 [rows, kv_heads]
    rope_ptr,  # None: q is ready, and its key and value are in the cache; else q_ptr is the packed projection
    slots_ptr,
    norm_weight_ptr,  # None: no norm
    eps,
    stored_k_scale,  # what an fp8 cache's keys were divided by
    stored_v_scale,
    qk_scale,  # turns q.k into a power of two's exponent
    v_scale,
    num_splits,
    min_chunk,
    stride_out,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,  # not in the interpreter
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    COMBINE_BLOCK: tl.constexpr,
    COMBINE_GROUP: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    # Before the wait for the kernel ahead: context lengths and block tables, which the step's first kernels wrote, and
    # keys and values of earlier steps. All that is complete: the embedding lets the kernels after it start only when
    # everything before it has ended.
    length = tl.load(lens_ptr + row)
    chunk = length
    if SPLIT:
        chunk = tl.maximum(min_chunk, tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N)
    start = split * chunk
    if (start >= length) & (split > 0):
        return
    end = tl.minimum(start + chunk, length)

    PACK: tl.constexpr = 2 if FP8 else 1  # elements in one of the cache's words
    d = tl.arange(0, DIM_PAD)
    w = tl.arange(0, DIM_PAD // PACK)
    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, GROUP_PAD)
    in_words = w < HEAD_DIM // PACK
    q_ptr += row.to(tl.int64) * stride_qt
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    table_ptr += row.to(tl.int64) * stride_table
    heads = (kv_head * GROUP + g)[:, None] * stride_qh
    in_head = (d < HEAD_DIM)[None, :]
    q_mask = (g < GROUP)[:, None] & in_head
    # the block ids of a tile are fetched one tile ahead: keys then wait for one trip to memory, not for two
    walked = end
    if rope_ptr is not None:
        owns_new = end == tl.where(length > 0, length, -1)
        walked = tl.where(owns_new, end - 1, end)
    blocks = tl.load(table_ptr + (start + n) // BLOCK_SIZE, mask=start + n < walked, other=0)
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD // PACK], tl.float32)
    acc_odd = acc
    if PREFETCH:
        LINE: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth  # words in 128 bytes
        LINES: tl.constexpr = (DIM_PAD // PACK + LINE - 1) // LINE
        lines = tl.minimum(tl.arange(0, LINES) * LINE, HEAD_DIM // PACK - 1)[None, :]
        inner = (start + n) % BLOCK_SIZE  # past the end: block 0, which exists
        _prefetch(k_ptr + (blocks.to(tl.int64) * stride_kb + inner * stride_kt)[:, None] + lines)
        _prefetch(v_ptr + (blocks.to(tl.int64) * stride_vb + inner * stride_vt)[:, None] + lines)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if rope_ptr is None:
        q = tl.load(q_ptr + heads + d[None, :], mask=q_mask, other=0.0)
        q, q_odd = _even_odd(q, FP8)
    else:
        # No branches: what a split that does not own the new token loads is masked, so that all loads go out together.
        NUM_HEADS = GROUP * tl.num_programs(0)
        one = tl.zeros([1, 1], tl.int32)
        k_head = one + (NUM_HEADS + kv_head) * HEAD_DIM
        k_mask = tl.where(owns_new, in_head, False)
        slot = tl.load(slots_ptr + row)
        v_new = tl.load(q_ptr + k_head + tl.num_programs(0) * HEAD_DIM + d[None, :], mask=k_mask, other=0.0)
        rope_ptr += tl.maximum(length - 1, 0).to(tl.int64) * HEAD_DIM
        q = _norm_and_rotate(q_ptr, norm_weight_ptr, rope_ptr, heads, d[None, :], q_mask, eps, HEAD_DIM)
        k_new = _norm_and_rotate(q_ptr, norm_weight_ptr, rope_ptr, k_head, d[None, :], k_mask, eps, HEAD_DIM)
        q, q_odd = _even_odd(q, FP8)
        if FP8:
            k_word = _e4m3_words(k_new, stored_k_scale)
            v_word = _e4m3_words(v_new, stored_v_scale)
            k_new, k_odd_new = _e4m3_pair(k_word, False)  # as stored
            v_new, v_odd_new = _e4m3_pair(v_word, False)
            acc_odd += tl.where(owns_new, v_odd_new.to(tl.float32), 0.0)
            products = q.to(tl.float32) * k_new.to(tl.float32) + q_odd.to(tl.float32) * k_odd_new.to(tl.float32)
        else:
            k_word = k_new.to(k_ptr.dtype.element_ty)
            v_word = v_new.to(v_ptr.dtype.element_ty)
            products = q.to(tl.float32) * k_new.to(tl.float32)
        slot_mask = tl.where(owns_new, tl.where(slot >= 0, in_words[None, :], False), False)
        k_slot = slot // BLOCK_SIZE * stride_kb + slot % BLOCK_SIZE * stride_kt
        v_slot = slot // BLOCK_SIZE * stride_vb + slot % BLOCK_SIZE * stride_vt
        tl.store(k_ptr + k_slot + w[None, :], k_word, mask=slot_mask)
        tl.store(v_ptr + v_slot + w[None, :], v_word, mask=slot_mask)
        # the softmax so far: of the new token, with weight 1, where it is this split's
        m = tl.where(owns_new, tl.sum(products, axis=1) * qk_scale, m)
        total += tl.where(owns_new, 1.0, 0.0)
        acc += tl.where(owns_new, v_new.to(tl.float32), 0.0)

    for tile in range(start, walked, BLOCK_N):
        position = tile + n
        inside = position < walked
        mask = inside[:, None] & in_words[None, :]
        offset = position % BLOCK_SIZE
        k_rows = blocks.to(tl.int64) * stride_kb + offset * stride_kt
        v_rows = blocks.to(tl.int64) * stride_vb + offset * stride_vt
        k = tl.load(k_ptr + k_rows[:, None] + w[None, :], mask=mask, other=0)
        v = tl.load(v_ptr + v_rows[:, None] + w[None, :], mask=mask, other=0)
        ahead = position + BLOCK_N
        blocks = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < walked, other=0)
        if FP8:
            k_even, k_odd = _e4m3_pair(k, PACKED)
            scores = _scores(q, k_even, DOT_DTYPE, PRECISION) + _scores(q_odd, k_odd, DOT_DTYPE, PRECISION)
        else:
            scores = _scores(q, k, DOT_DTYPE, PRECISION)
        scores = tl.where(inside[None, :], scores * qk_scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        rescale = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        if FP8:
            v_even, v_odd = _e4m3_pair(v, PACKED)
            acc = _add_values(acc * rescale[:, None], p, v_even, DOT_DTYPE, PRECISION)
            acc_odd = _add_values(acc_odd * rescale[:, None], p, v_odd, DOT_DTYPE, PRECISION)
        else:
            acc = _add_values(acc * rescale[:, None], p, v, DOT_DTYPE, PRECISION)
        m = m_new
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    if FP8:
        acc = tl.reshape(tl.join(acc, acc_odd), [GROUP_PAD, DIM_PAD])
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # zeros where a row has no keys

    in_dim = d < HEAD_DIM
    mask = (g < GROUP)[:, None] & in_dim[None, :]
    out_ptr += row.to(tl.int64) * stride_out + kv_head * GROUP * HEAD_DIM
    used_splits = 1
    if SPLIT:
        used_splits = tl.cdiv(length, chunk)
    if used_splits <= 1:
        found = (acc * v_scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + g[:, None] * HEAD_DIM + d[None, :], found, mask=mask)
        return
    if SPLIT:
        pair = row * tl.num_programs(0) + kv_head
        first = pair.to(tl.int64) * num_splits * GROUP  # of this row's and head's parts
        here = first + split * GROUP + g
        tl.store(lse_ptr + here, m + tl.log2(total), mask=g < GROUP)
        tl.store(parts_ptr + here[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        # all of this program's stores, then one thread's release: see "causality order" in PTX's memory model
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel")
        if arrived == used_splits - 1:
            tl.store(counters_ptr + pair, 0)
            h = tl.arange(0, COMBINE_GROUP)
            s = tl.arange(0, COMBINE_BLOCK)
            top = tl.full([COMBINE_GROUP], float("-inf"), tl.float32)
            weight = tl.zeros([COMBINE_GROUP], tl.float32)
            found = tl.zeros([COMBINE_GROUP, DIM_PAD], tl.float32)
            for s0 in range(0, used_splits, COMBINE_BLOCK):
                ids = first + (s0 + s)[:, None] * GROUP + h[None, :]
                here_mask = (s0 + s < used_splits)[:, None] & (h < GROUP)[None, :]
                lse = tl.load(lse_ptr + ids, mask=here_mask, other=float("-inf"))
                part = tl.load(
                    parts_ptr + ids[:, :, None] * HEAD_DIM + d[None, None, :],
                    mask=here_mask[:, :, None] & in_dim[None, None, :],
                    other=0.0,
                )
                top_new = tl.maximum(top, tl.max(lse, axis=0))
                top_new = tl.where(h < GROUP, top_new, 0.0)
                rescale = tl.exp2(top - top_new)
                share = tl.exp2(lse - top_new[None, :])
                weight = weight * rescale + tl.sum(share, axis=0)
                found = found * rescale[:, None] + tl.sum(share[:, :, None] * part, axis=0)
                top = top_new
            found = found * (v_scale / tl.where(h < GROUP, weight, 1.0))[:, None]
            tl.store(
                out_ptr + h[:, None] * HEAD_DIM + d[None, :],
                found.to(out_ptr.dtype.element_ty),
                mask=(h < GROUP)[:, None] & in_dim[None, :],
            )
