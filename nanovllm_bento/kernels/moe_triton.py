"""Triton side of moe.py, for batches: routing, sorting of pairs by expert, the two grouped products, the sum.

A program of a grouped product takes one block of pairs and some columns of its expert's weights. How many blocks there
are is known on the device only, so the grid has programs for the most there can be, and what is left over ends at once.
moe_pairs_triton.py is the way without sorting, for a handful of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.moe import Config, PairConfig, SortedPairs, Tile, max_blocks

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def route_kernel(
    logits,  # [num_tokens, NUM_EXPERTS]
    weights,  # [num_tokens, TOP_K]
    ids,  # [num_tokens, TOP_K]
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    place = tl.arange(0, BLOCK_TOP_K)
    value = tl.load(logits + token * NUM_EXPERTS + expert, mask=expert < NUM_EXPERTS, other=float("-inf"))
    value = value.to(tl.float32)
    keys = tl.where(value == value, value, float("-inf"))
    e = tl.exp(value - tl.max(keys, 0))  # NaN makes the sum, and with it all weights, NaN
    total = tl.sum(e, 0)
    chosen = tl.zeros([BLOCK_TOP_K], tl.int32)
    share = tl.zeros([BLOCK_TOP_K], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(keys, 0)  # of equals the first
        chosen = tl.where(place == i, best, chosen)
        share = tl.where(place == i, tl.sum(tl.where(expert == best, e, 0.0), 0) / total, share)
        keys = tl.where(expert == best, float("-inf"), keys)
    if RENORMALIZE:
        share = share / tl.sum(share, 0)
    tl.store(ids + token * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, share, mask=place < TOP_K)


@triton.jit(do_not_specialize=["num_pairs", "expert_start"])
def sort_pairs_kernel(
    ids,  # [num_pairs]
    pairs,  # [max_blocks * BLOCK_M]
    experts,  # [max_blocks]
    num_blocks,  # [1]
    num_pairs,
    expert_start,
    NUM_LOCAL: tl.constexpr,
    BINS: tl.constexpr,  # a power of two above NUM_LOCAL
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program an expert: each counts all experts' pairs to know where its own begin, then writes those in order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        in_list = start + offset < num_pairs
        local = tl.load(ids + start + offset, mask=in_list, other=0) - expert_start
        counts += tl.histogram(tl.where(in_list & (local >= 0) & (local < NUM_LOCAL), local, NUM_LOCAL), BINS)
    bins = tl.arange(0, BINS)
    blocks = tl.where(bins < NUM_LOCAL, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    mine = tl.sum(tl.where(bins == expert, counts, 0), 0)
    my_blocks = (mine + BLOCK_M - 1) // BLOCK_M
    if expert == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))
    pairs += first * BLOCK_M
    written = 0
    for start in range(0, num_pairs, CHUNK):
        in_list = start + offset < num_pairs
        local = tl.load(ids + start + offset, mask=in_list, other=0) - expert_start
        hit = in_list & (local == expert)
        tl.store(pairs + written + tl.cumsum(hit.to(tl.int32), 0) - 1, start + offset, mask=hit)
        written += tl.sum(hit.to(tl.int32), 0)
    filler = mine + tl.arange(0, BLOCK_M)
    tl.store(pairs + filler, tl.zeros([BLOCK_M], tl.int32) + num_pairs, mask=filler < my_blocks * BLOCK_M)
    block = tl.arange(0, 32)
    for start in range(0, my_blocks, 32):
        at = start + block
        tl.store(experts + first + at, tl.zeros([32], tl.int32) + expert, mask=at < my_blocks)


@triton.jit
def _block_and_column(total, columns, GROUP_M: tl.constexpr):
    """This program's block of rows and of columns: through GROUP_M blocks of rows before the next of columns."""
    program = tl.program_id(0)
    group = program // (GROUP_M * columns)
    size = tl.minimum(total - group * GROUP_M, GROUP_M)
    inside = program - group * GROUP_M * columns
    return group * GROUP_M + inside % size, inside // size


@triton.jit
def _load(at, start, k_ok, other_ok, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(at + start, mask=other_ok, other=0.0)
    else:
        return tl.load(at + start, mask=other_ok & k_ok, other=0.0)


@triton.jit
def _load_weight(at, start, k_ok, n_ok, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """A tile of weight; where it is whole, its loads carry no predicates."""
    if EVEN_K and EVEN_N:
        return tl.load(at + start)
    elif EVEN_N:
        return tl.load(at + start, mask=k_ok, other=0.0)
    else:
        return _load(at, start, k_ok, n_ok, EVEN_K)


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_gate_up_kernel(
    x,  # [num_tokens, k]
    weight,  # [num_local, 2n, k]
    out,  # [max_blocks * BLOCK_M, n]
    pairs,
    experts,
    num_blocks,
    num_pairs,
    n,
    k,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.load(num_blocks)
    columns = (n + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= total * columns:
        return
    block, column = _block_and_column(total, columns, GROUP_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pairs + row)
    m_ok = pair < num_pairs
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = col < n
    ks = tl.arange(0, BLOCK_K)
    x_row = x + (pair // TOP_K).to(tl.int64) * k
    gate_row = weight + tl.load(experts + block).to(tl.int64) * (2 * n * k) + col * k
    if SWAP:
        x_at = x_row[None, :] + ks[:, None]
        gate_at = gate_row[:, None] + ks[None, :]
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, k, BLOCK_K):
            k_ok = start + ks < k
            v = _load(x_at, start, k_ok[:, None], m_ok[None, :], EVEN_K).to(DOT_DTYPE)
            w = _load_weight(gate_at, start, k_ok[None, :], n_ok[:, None], EVEN_K, EVEN_N).to(DOT_DTYPE)
            w_up = _load_weight(gate_at + n * k, start, k_ok[None, :], n_ok[:, None], EVEN_K, EVEN_N).to(DOT_DTYPE)
            gate = tl.dot(w, v, gate, input_precision="ieee")
            up = tl.dot(w_up, v, up, input_precision="ieee")
        at = out + row.to(tl.int64)[None, :] * n + col[:, None]
        ok = n_ok[:, None]
    else:
        x_at = x_row[:, None] + ks[None, :]
        gate_at = gate_row[None, :] + ks[:, None]
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            k_ok = start + ks < k
            v = _load(x_at, start, k_ok[None, :], m_ok[:, None], EVEN_K).to(DOT_DTYPE)
            w = _load_weight(gate_at, start, k_ok[:, None], n_ok[None, :], EVEN_K, EVEN_N).to(DOT_DTYPE)
            w_up = _load_weight(gate_at + n * k, start, k_ok[:, None], n_ok[None, :], EVEN_K, EVEN_N).to(DOT_DTYPE)
            gate = tl.dot(v, w, gate, input_precision="ieee")
            up = tl.dot(v, w_up, up, input_precision="ieee")
        at = out + row.to(tl.int64)[:, None] * n + col[None, :]
        ok = n_ok[None, :]
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(at, h.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_down_kernel(
    h,  # [max_blocks * BLOCK_M, k]
    weight,  # [num_local, n, k]
    scale,  # [num_pairs]
    out,  # [num_pairs, n]
    pairs,
    experts,
    num_blocks,
    num_pairs,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.load(num_blocks)
    columns = (n + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= total * columns:
        return
    block, column = _block_and_column(total, columns, GROUP_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pairs + row)
    m_ok = pair < num_pairs
    share = tl.load(scale + pair, mask=m_ok, other=0.0)
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = col < n
    ks = tl.arange(0, BLOCK_K)
    h_row = h + row.to(tl.int64) * k
    w_row = weight + tl.load(experts + block).to(tl.int64) * (n * k) + col * k
    if SWAP:
        h_at = h_row[None, :] + ks[:, None]
        w_at = w_row[:, None] + ks[None, :]
        y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, k, BLOCK_K):
            k_ok = start + ks < k
            v = _load(h_at, start, k_ok[:, None], m_ok[None, :], EVEN_K).to(DOT_DTYPE)
            w = _load_weight(w_at, start, k_ok[None, :], n_ok[:, None], EVEN_K, EVEN_N).to(DOT_DTYPE)
            y = tl.dot(w, v, y, input_precision="ieee")
        y = y * share[None, :]
        at = out + pair.to(tl.int64)[None, :] * n + col[:, None]
        ok = n_ok[:, None] & m_ok[None, :]
    else:
        h_at = h_row[:, None] + ks[None, :]
        w_at = w_row[None, :] + ks[:, None]
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            k_ok = start + ks < k
            v = _load(h_at, start, k_ok[None, :], m_ok[:, None], EVEN_K).to(DOT_DTYPE)
            w = _load_weight(w_at, start, k_ok[:, None], n_ok[None, :], EVEN_K, EVEN_N).to(DOT_DTYPE)
            y = tl.dot(v, w, y, input_precision="ieee")
        y = y * share[:, None]
        at = out + pair.to(tl.int64)[:, None] * n + col[None, :]
        ok = m_ok[:, None] & n_ok[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["expert_start", "num_local"])
def combine_kernel(
    y,  # [num_tokens * TOP_K, n]; rows of pairs that are not held here are not set
    ids,  # [num_tokens, TOP_K]
    out,  # [num_tokens, n]; with ADD also the residual
    expert_start,
    num_local,
    n,
    TOP_K: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks = (n + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = col < n
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        local = tl.load(ids + pair) - expert_start
        width = tl.where((local >= 0) & (local < num_local), n, 0)
        total += tl.load(y + pair * n + col, mask=col < width, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + token * n + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * n + col, total.to(out.dtype.element_ty), mask=ok)


def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    assert logits.is_contiguous()
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    if num_tokens:
        pdl = use_pdl(logits.device)
        route_kernel[(num_tokens,)](
            *(logits, weights, ids),
            NUM_EXPERTS=num_experts,
            BLOCK_E=max(32, triton.next_power_of_2(num_experts)),
            TOP_K=top_k,
            BLOCK_TOP_K=triton.next_power_of_2(top_k),
            RENORMALIZE=renormalize,
            PDL=pdl,
            num_warps=1,
            launch_pdl=pdl,
        )
    return weights, ids


def sort_pairs(ids: Tensor, expert_start: int, num_local: int, block_m: int) -> SortedPairs:
    """As sort_pairs_reference, but what lies behind the last block is not set."""
    assert ids.is_contiguous()
    num_pairs = ids.numel()
    size = max_blocks(num_pairs, num_local, block_m)
    pairs, experts, num_blocks = (ids.new_empty(length, dtype=torch.int32) for length in (size * block_m, size, 1))
    pdl = use_pdl(ids.device)
    large = num_pairs > 8192
    sort_pairs_kernel[(num_local,)](
        *(ids, pairs, experts, num_blocks, num_pairs, expert_start),
        NUM_LOCAL=num_local,
        BINS=max(32, triton.next_power_of_2(num_local + 1)),
        BLOCK_M=block_m,
        CHUNK=4096 if large else 1024,
        PDL=pdl,
        num_warps=16 if large else 8,
        launch_pdl=pdl,
    )
    return SortedPairs(pairs, experts, num_blocks, block_m)


def grouped_gate_up(x: Tensor, weight: Tensor, found: SortedPairs, top_k: int, tile: Tile) -> Tensor:
    """As grouped_gate_up_reference; rows behind the last block are not set."""
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape[2] == x.shape[1]
    n, k = weight.shape[1] // 2, weight.shape[2]
    out = x.new_empty(len(found.pairs), n)
    _launch_grouped(
        grouped_gate_up_kernel,
        (x, weight, out, found.pairs, found.experts, found.num_blocks, len(x) * top_k, n, k, top_k),
        *(n, k, found, tile, x),
    )
    return out


def grouped_down(h: Tensor, weight: Tensor, found: SortedPairs, weights: Tensor, tile: Tile) -> Tensor:
    """As grouped_down_reference; rows of pairs in no block are not set."""
    assert h.is_contiguous() and weight.is_contiguous() and weights.is_contiguous() and weight.shape[2] == h.shape[1]
    n, k = weight.shape[1:]
    out = h.new_empty(weights.numel(), n)
    _launch_grouped(
        grouped_down_kernel,
        (h, weight, weights, out, found.pairs, found.experts, found.num_blocks, weights.numel(), n, k),
        *(n, k, found, tile, h),
    )
    return out


def _launch_grouped(kernel, arguments, n: int, k: int, found: SortedPairs, tile: Tile, x: Tensor) -> None:
    pdl = use_pdl(x.device)
    kernel[(len(found.experts) * triton.cdiv(n, tile.block_n),)](
        *arguments,
        BLOCK_M=found.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        SWAP=tile.swap,
        EVEN_N=n % tile.block_n == 0,
        EVEN_K=k % tile.block_k == 0,
        DOT_DTYPE=DOT_DTYPES[x.dtype] if x.is_cuda else tl.float32,  # the interpreter multiplies no bfloat16
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=pdl,
    )


def combine(y: Tensor, ids: Tensor, expert_start: int, num_local: int, residual: Tensor | None = None) -> Tensor:
    """As combine_reference; a residual is overwritten and returned."""
    (num_tokens, top_k), n = ids.shape, y.shape[1]
    out = y.new_empty(num_tokens, n) if residual is None else residual
    assert out.is_contiguous()
    block = min(1024, max(32, triton.next_power_of_2(n)))
    pdl = use_pdl(y.device)
    combine_kernel[(num_tokens * triton.cdiv(n, block),)](
        *(y, ids, out, expert_start, num_local, n),
        TOP_K=top_k,
        ADD=residual is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=max(1, block // 256),
        launch_pdl=pdl,
    )
    return out


def experts_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    expert_start: int,
    residual: Tensor | None,
    config: Config,
) -> Tensor:
    """What moe.experts_mlp says."""
    num_local = len(gate_up)
    if not len(x):
        return x.new_empty(x.shape) if residual is None else residual
    if isinstance(config, PairConfig):
        from nanovllm_bento.kernels.moe_pairs_triton import down_pairs, gate_up_pairs

        h = gate_up_pairs(x, gate_up, ids, expert_start, config.gate_up)
        return down_pairs(h, down, weights, ids, expert_start, config.down, residual)
    found = sort_pairs(ids, expert_start, num_local, config.block_m)
    h = grouped_gate_up(x, gate_up, found, ids.shape[1], config.gate_up)
    y = grouped_down(h, down, found, weights, config.down)
    return combine(y, ids, expert_start, num_local, residual)
