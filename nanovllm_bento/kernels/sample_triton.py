# mypy: disable-error-code="no-untyped-def"
"""Sampling in Triton, without a sort. What it computes is said in sample.py.

Two kernels. `_scan` reads the logits once, a row shared by several programs. For a row without filters each program
hands on the best of logit / temperature + noise in its part; for a row with filters the part's largest logit, its mass,
and the largest logit of every 64 entries. `_choose`, a program a row, ends the plain rows with a reduction; what it
chooses it also leaves with the row's slot, for the next step to feed.

A row with filters it narrows first. A bound is found (by bisection) that at least top_k of the groups' maxima reach; so
at least top_k entries do, and entries below it cannot be among the top_k. The entries that reach it, mostly a few more
than top_k, are collected from their groups, and each counts those before it (more likely, or as likely with a lower id)
and their mass: that decides top-k and top-p. Where no top_k is asked for, some 64 groups are tried in its stead: enough
if the mass collected reaches top_p, or the bound lies below min-p's.

Else (a flat distribution, hundreds of top_k, many ties) the row is sampled by rejection, as FlashInfer does: the best
noisy entry of all is the answer if those before it leave it in the set; if not, neither it nor any after it is in the
set, and the best among those before it is tried. A try reads the row twice, and 1 / (mass of the set) bounds how many
are expected. Ties and the order of equal logits need no care in either way, as a set is always "those before an entry".
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32
from triton.language.extra.cuda import libdevice

GROUP = tl.constexpr(64)  # entries under one maximum
MAX_SPLITS = tl.constexpr(128)
_MAX_GUMBEL = tl.constexpr(16.65)  # of any noise
_MIN_TEMPERATURE = tl.constexpr(1e-5)
_LOWEST = tl.constexpr(-2139095040)  # _to_key of float32's lowest finite number
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_key(x):
    """float32 -> int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _read_slot(params_ptr, slot, VOCAB: tl.constexpr):
    """(inverse temperature, whether it samples at all, whether it filters, top_k, top_p, log min_p, seed) of a slot.

    top_k is VOCAB and top_p infinite where they are not asked for.
    """
    words = params_ptr + slot.to(tl.int64) * 8
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    top_p = tl.load(words + 1).to(tl.float32, bitcast=True)
    min_p = tl.load(words + 2).to(tl.float32, bitcast=True)
    top_k = tl.load(words + 3)
    low = tl.load(words + 4).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + 5).to(tl.uint32, bitcast=True).to(tl.uint64)
    sampled = temperature >= _MIN_TEMPERATURE
    inverse = tl.where(sampled, tl.div_rn(1.0, tl.where(sampled, temperature, 1.0)), 1.0)
    top_k = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB)
    top_p = tl.where(top_p < 1.0, top_p, float("inf"))
    log_min_p = tl.where(min_p > 0.0, tl.minimum(tl.log(tl.where(min_p > 0.0, min_p, 1.0)), 0.0), float("-inf"))
    filters = sampled & ((top_k < VOCAB) | (top_p < 1.0) | (min_p > 0.0))
    return inverse, sampled, filters, top_k, top_p, log_min_p, (high << 32) | low


@triton.jit
def _philox(seed, position, groups):
    """The four words of each group's counter."""
    zero = tl.zeros_like(groups)
    return tl.philox(seed, groups, zero + position.to(tl.int32), zero, zero)


@triton.jit
def _uniform(words):
    return ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def _take(best, token, score, top, index):
    """(best, token) or, if ``top``, the largest score of the tile, is larger: it and the first entry that has it."""
    if top > best:
        token = tl.min(tl.where(score == top, index, _NO_TOKEN))
        best = top
    return best, token


@triton.jit
def _take_noisy(best, token, x, top, start, index, inverse, sampled, seed, position, FAST: tl.constexpr):
    """``_take`` of a tile of logits [BLOCK / 4, 4], ``top`` its largest, from entry ``start`` on; noise if ``sampled``.

    Philox and, above all, two logarithms an entry would cost more than reading it. So a tile that cannot win is left
    out by its largest logit, and else by a bound: with u = 1 - t, gumbel = -log(-log(1 - t)) is at most -log(t).
    """
    if sampled:
        if top * inverse + _MAX_GUMBEL >= best:
            scaled = x * inverse
            groups = start // 4 + tl.arange(0, x.shape[0])
            w0, w1, w2, w3 = _philox(seed, position, groups)
            words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), x.shape)  # [:, i] is word i
            u = _uniform(words)
            log_t = libdevice.fast_logf(1.0 - u) if FAST else tl.log(1.0 - u)
            if tl.max(scaled + (1e-3 - log_t)) >= best:  # 1e-3 is far above what the fast logarithm errs
                score = scaled - tl.log(-tl.log(u))
                best, token = _take(best, token, score, tl.max(score), index)
    else:
        best, token = _take(best, token, x, top, index)
    return best, token


@triton.jit
def _load_tile(row_ptr, start, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Entries start .. start + BLOCK as float32 [BLOCK / 4, 4] (a row of it has one Philox counter), and their ids."""
    index = start + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return tl.load(row_ptr + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32), index


# Slots and positions are read one number at a time, so that nothing is gained by knowing how they are aligned. They are
# the rows of one tensor: an odd number of sequences would have both kernels compiled anew, for seconds, amid traffic.
_UNALIGNED = ["slots_ptr", "positions_ptr"]


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=_UNALIGNED)
def _scan(
    logits_ptr,
    params_ptr,
    slots_ptr,
    positions_ptr,
    partial_ptr,  # float32 [n, 2, width]: best score or largest logit; its token or the mass
    group_max_ptr,  # float32 [n, groups]
    row_stride,
    part,  # entries a program reads, a multiple of BLOCK
    first,  # token id of the first entry, a multiple of 4
    width,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    FILTERED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    split, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        inverse, sampled, filters, _, _, _, seed = _read_slot(params_ptr, slot, VOCAB)
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        begin = split * part
        end = tl.minimum(begin + part, VOCAB)
        largest = tl.full((), float("-inf"), tl.float32)  # NaN once there is one
        value = largest
        second = tl.full((), 0.0, tl.float32)
        if filters & FILTERED:
            groups: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
            for start in range(begin, end, BLOCK):
                x, index = _load_tile(row_ptr, start, VOCAB, BLOCK)
                maxima = tl.reduce(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1, _nan_max)
                group = start // GROUP + tl.arange(0, BLOCK // GROUP)
                tl.store(group_max_ptr + row.to(tl.int64) * groups + group, maxima, mask=group < groups)
                # The mass is relative to the largest logit so far; finite ones keep -inf - -inf away.
                before = tl.maximum(largest, -3.0e38)
                largest = _nan_max(largest, tl.reduce(maxima, 0, _nan_max))
                after = tl.maximum(largest, -3.0e38)
                second = second * tl.exp((before - after) * inverse) + tl.sum(tl.exp((x - after) * inverse))
            value = largest
        else:
            token = tl.full((), 0, tl.int32)
            position = tl.load(positions_ptr + row)
            for start in range(begin, end, BLOCK):
                x, index = _load_tile(row_ptr, start, VOCAB, BLOCK)
                top = tl.reduce(x, None, _nan_max)
                largest = _nan_max(largest, top)
                value, token = _take_noisy(
                    value, token, x, top, start + first, index + first, inverse, sampled, seed, position, FAST
                )
            second = token.to(tl.float32)  # exact: ids are below 2^24
        scaled = largest * inverse
        value = tl.where((scaled != scaled) | (scaled == float("inf")), float("nan"), value)
        partial_ptr += row * 2 * width + split
        tl.store(partial_ptr, value)
        tl.store(partial_ptr + width, second)


@triton.jit
def _before(row_ptr, value, entry, top, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries of the row come before ``entry`` with logit ``value``, and their mass relative to top's."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
        before = ((x > value) | ((x == value) & (index < entry))) & (index < VOCAB)
        count += before.to(tl.int32)
        mass += tl.where(before, tl.exp((x - top) * inverse), 0.0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
def _choose_by_rejection(
    row_ptr,
    top,
    mass,
    inverse,
    top_k,
    top_p,
    log_min_p,
    seed,
    position,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    if (top_k < VOCAB) & (top_p < 1.0):
        # top-p counts on what top-k leaves: find the top_k-th largest logit by bisection, and the mass down to it.
        low = tl.full((), _LOWEST, tl.int64)
        high = _to_key(top) + 1
        reached = tl.full((), VOCAB + 1, tl.int32)
        while (high - low > 1) & (reached != top_k):
            middle = (low + high) >> 1
            count, _ = _before(row_ptr, _from_key(middle), VOCAB, top, inverse, VOCAB, BLOCK)
            if count >= top_k:
                low = middle
                reached = count
            else:
                high = middle
        kth = _from_key(low)
        count, mass = _before(row_ptr, kth, VOCAB, top, inverse, VOCAB, BLOCK)
        mass -= (count - top_k).to(tl.float32) * tl.exp((kth - top) * inverse)
    token = tl.full((), -1, tl.int32)
    limit = tl.full((), float("-inf"), tl.float32)
    limit_entry = tl.full((), VOCAB, tl.int32)
    while token < 0:
        best = tl.full((), float("-inf"), tl.float32)
        found = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, BLOCK):
            x, index = _load_tile(row_ptr, start, VOCAB, BLOCK)
            kept = ((x > limit) | ((x == limit) & (index < limit_entry))) & ((x - top) * inverse >= log_min_p)
            x = tl.where(kept, x, float("-inf"))
            best, found = _take_noisy(best, found, x, tl.max(x), start, index, inverse, True, seed, position, FAST)
        value = tl.load(row_ptr + found).to(tl.float32)
        count, mass_before = _before(row_ptr, value, found, top, inverse, VOCAB, BLOCK)
        if (count == 0) | ((count < top_k) & (mass_before < top_p * mass)):
            token = found
        limit = value
        limit_entry = found
    return token


@triton.jit
def _choose_among_candidates(
    row_ptr,
    group_max_ptr,  # this row's
    lists_ptr,  # this row's, int32 [2, CANDIDATES]: groups; candidates
    top,
    mass,
    inverse,
    top_k,
    top_p,
    log_min_p,
    seed,
    position,
    VOCAB: tl.constexpr,
    GROUPS: tl.constexpr,  # how many, rounded up to a power of two
    CANDIDATES: tl.constexpr,
    NARROW: tl.constexpr,
    TILE: tl.constexpr,  # groups gathered at once
    PAIRS: tl.constexpr,  # candidates compared with all at once
):
    """The row's token, or -1 where the candidates cannot decide."""
    num_groups: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
    token = tl.full((), -1, tl.int32)
    ranked = top_k < VOCAB
    wanted = tl.where(ranked, top_k, NARROW)
    group = tl.arange(0, GROUPS)
    maxima = tl.load(group_max_ptr + group, mask=group < num_groups, other=float("-inf"))
    # Any bound reached by `wanted` maxima is right; one reached by not many more is quick.
    low = tl.full((), _LOWEST, tl.int64)
    high = _to_key(top) + 1
    reached = tl.full((), GROUPS + 1, tl.int32)
    while (high - low > 1) & (reached > wanted + wanted // 2):
        middle = (low + high) >> 1
        count = tl.sum((maxima >= _from_key(middle)).to(tl.int32))
        if count >= wanted:
            low = middle
            reached = count
        else:
            high = middle
    bound = _from_key(low)
    chosen = maxima >= bound
    num_chosen = tl.sum(chosen.to(tl.int32))
    if num_chosen <= CANDIDATES:
        tl.store(lists_ptr + tl.cumsum(chosen.to(tl.int32), 0) - 1, group, mask=chosen)
        lists_ptr += CANDIDATES
        tl.debug_barrier()
        n = tl.full((), 0, tl.int32)
        for first in range(0, num_chosen, TILE):
            place = first + tl.arange(0, TILE)
            of = tl.load(lists_ptr - CANDIDATES + place, mask=place < num_chosen, other=num_groups)
            index = of[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            x = tl.load(row_ptr + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
            hit = tl.reshape((x >= bound).to(tl.int32), (TILE * GROUP,))
            place = n + tl.cumsum(hit, 0) - 1
            tl.store(lists_ptr + place, tl.reshape(index, (TILE * GROUP,)), mask=(hit > 0) & (place < CANDIDATES))
            n += tl.sum(hit)
        tl.debug_barrier()
        lane = tl.arange(0, CANDIDATES)
        index = tl.load(lists_ptr + lane, mask=lane < n, other=VOCAB)
        x = tl.load(row_ptr + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - top) * inverse)
        decides = ranked | (tl.sum(weight) >= top_p * mass) | ((bound - top) * inverse <= log_min_p) | (low == _LOWEST)
        if (n <= CANDIDATES) & decides:
            rank = tl.zeros((CANDIDATES,), tl.int32)
            before = tl.zeros((CANDIDATES,), tl.float32)
            for first in range(0, n, PAIRS):
                place = first + tl.arange(0, PAIRS)
                other = tl.load(lists_ptr + place, mask=place < n, other=VOCAB)
                y = tl.load(row_ptr + other, mask=other < VOCAB, other=float("-inf")).to(tl.float32)
                mine, theirs = x[None, :], y[:, None]
                ahead = (theirs > mine) | ((theirs == mine) & (other[:, None] < index[None, :]))
                rank += tl.sum(ahead.to(tl.int32), 0)
                before += tl.sum(tl.where(ahead, tl.exp((theirs - top) * inverse), 0.0), 0)
            kept = rank < top_k
            if ranked:
                mass = tl.sum(tl.where(kept, weight, 0.0))
            kept &= (rank == 0) | (before < top_p * mass)
            kept &= ((x - top) * inverse >= log_min_p) & (index < VOCAB)
            w0, w1, w2, w3 = _philox(seed, position, index // 4)
            word = index % 4
            u = _uniform(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
            score = tl.where(kept, x * inverse - tl.log(-tl.log(u)), float("-inf"))
            token = tl.min(tl.where(score == tl.max(score), index, _NO_TOKEN))
    return token


@triton.jit(do_not_specialize=["splits", "width"], do_not_specialize_on_alignment=_UNALIGNED)
def _choose(
    logits_ptr,
    params_ptr,
    slots_ptr,
    positions_ptr,
    partial_ptr,
    group_max_ptr,
    lists_ptr,
    out_ptr,
    last_tokens_ptr,  # None: not wanted
    row_stride,
    splits,
    width,
    VOCAB: tl.constexpr,
    GROUPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NARROW: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    FILTERED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.full((), 0, tl.int32)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        lane = tl.arange(0, MAX_SPLITS)
        partial_ptr += row * 2 * width
        value = tl.load(partial_ptr + lane, mask=lane < splits, other=float("-inf"))
        second = tl.load(partial_ptr + width + lane, mask=lane < splits, other=0.0)
        top = tl.max(value)
        token = tl.full((), -1, tl.int32)
        if (tl.sum((value != value).to(tl.int32)) == 0) & (tl.abs(top) < float("inf")):
            token = tl.min(tl.where(value == top, second, 16777216.0)).to(tl.int32)
            if FILTERED:
                inverse, _, filters, top_k, top_p, log_min_p, seed = _read_slot(params_ptr, slot, VOCAB)
                if filters:
                    position = tl.load(positions_ptr + row)
                    row_ptr = logits_ptr + row * row_stride
                    mass = tl.sum(second * tl.exp((value - top) * inverse))
                    token = tl.full((), -1, tl.int32)
                    if (top_k <= CANDIDATES // 2) | (top_k == VOCAB):
                        token = _choose_among_candidates(
                            row_ptr,
                            group_max_ptr + row * ((VOCAB + GROUP - 1) // GROUP),
                            lists_ptr + row * 2 * CANDIDATES,
                            top,
                            mass,
                            inverse,
                            top_k,
                            top_p,
                            log_min_p,
                            seed,
                            position,
                            VOCAB,
                            GROUPS,
                            CANDIDATES,
                            NARROW,
                            TILE,
                            PAIRS,
                        )
                    if token < 0:
                        token = _choose_by_rejection(
                            row_ptr,
                            top,
                            mass,
                            inverse,
                            top_k,
                            top_p,
                            log_min_p,
                            seed,
                            position,
                            VOCAB,
                            BLOCK,
                            FAST,
                        )
    tl.store(out_ptr + row, token.to(tl.int64))
    if last_tokens_ptr is not None:
        tl.store(last_tokens_ptr + slot, tl.maximum(token, 0).to(tl.int64), mask=slot >= 0)


def sample_rows(
    logits: Tensor,
    slot_params: Tensor,
    slots: Tensor,
    positions: Tensor,
    out: Tensor,
    last_tokens: Tensor | None = None,
    *,
    filtered: bool,
    pdl: bool,
    fast: bool = True,
    block: int = 2048,
    num_warps: int = 4,
    programs: int = 2112,
    choose_block: int = 4096,
    choose_warps: int = 8,
    candidates: int = 1024,
    narrow: int = 64,
    tile: int = 32,
    pairs: int = 16,
) -> Tensor:
    """As sample.py's. fast: the GPU's own logarithm where a bound suffices (the interpreter has none).

    programs: how many share the logits in ``_scan``, about; 2112 is 16 for each of an H100's multiprocessors.
    candidates: how many are compared with one another at most; narrow: groups tried where no top_k is asked for.
    """
    n, vocab_size = logits.shape
    assert vocab_size < 2**24
    groups = triton.cdiv(vocab_size, int(GROUP))
    group_max = empty((n, groups), dtype=float32, device=logits.device) if filtered else None
    rows = (logits, vocab_size, 0, slot_params, slots, positions)
    partial = _launch_scan(rows, group_max, int(MAX_SPLITS), pdl, fast, block, num_warps, programs)
    lists = empty((n, 2, candidates), dtype=int32, device=logits.device) if filtered else partial
    splits = partial.shape[2]
    _choose[(n,)](
        logits,
        slot_params,
        slots,
        positions,
        partial,
        partial if group_max is None else group_max,
        lists,
        out,
        last_tokens,
        logits.stride(0),
        splits,
        splits,
        VOCAB=vocab_size,
        GROUPS=triton.next_power_of_2(groups),
        CANDIDATES=candidates,
        NARROW=narrow,
        TILE=tile,
        PAIRS=pairs,
        BLOCK=choose_block,
        FILTERED=filtered,
        FAST=fast,
        PDL=pdl,
        num_warps=choose_warps if filtered else 1,
        launch_pdl=pdl,
    )
    return out


def _launch_scan(
    rows: tuple[Tensor, int, int, Tensor, Tensor, Tensor],
    group_max: Tensor | None,
    max_splits: int,
    pdl: bool,
    fast: bool,
    block: int,
    num_warps: int,
    programs: int,
) -> Tensor:
    """float32 [n, 2, splits], what each program of ``_scan`` hands on.

    rows: logits, how many entries of a row count, the first one's token id; slot_params, slots, positions. group_max:
    where filtered rows' groups of entries leave their largest; None: no row is filtered.
    """
    logits, num_entries, first, slot_params, slots, positions = rows
    n, length = logits.shape
    assert logits.stride(1) == 1 and first % 4 == 0
    blocks = triton.cdiv(length, block)
    splits = max(1, min(blocks, max_splits, programs // n))
    part = triton.cdiv(blocks, splits) * block
    splits = triton.cdiv(length, part)
    partial = empty((n, 2, splits), dtype=float32, device=logits.device)
    _scan[(splits, n)](
        logits,
        slot_params,
        slots,
        positions,
        partial,
        partial if group_max is None else group_max,
        logits.stride(0),
        part,
        first,
        splits,
        VOCAB=num_entries,
        BLOCK=block,
        FILTERED=group_max is not None,
        FAST=fast,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return partial


def scan_shard(
    logits: Tensor,
    num_entries: int,
    first: int,
    slot_params: Tensor,
    slots: Tensor,
    positions: Tensor,
    ranks: int,
    *,
    pdl: bool,
    fast: bool = True,
    block: int = 2048,
    num_warps: int = 4,
    programs: int = 2112,
) -> Tensor:
    """float32 [n, 2, splits], the best scores of parts of a shard and their tokens; as sample.py's best_of_shard."""
    rows = (logits, num_entries, first, slot_params, slots, positions)
    return _launch_scan(rows, None, int(MAX_SPLITS) // ranks, pdl, fast, block, num_warps, programs)


def choose_among(
    best: Tensor, slot_params: Tensor, slots: Tensor, out: Tensor, last_tokens: Tensor | None = None, *, pdl: bool
) -> Tensor:
    """The tokens of the best scores: best as ``scan_shard`` returns it, of all shards together."""
    n, _, splits = best.shape
    assert splits <= int(MAX_SPLITS) and best.is_contiguous()
    _choose[(n,)](
        best,
        slot_params,
        slots,
        slots,
        best,
        best,
        best,
        out,
        last_tokens,
        0,
        splits,
        splits,
        VOCAB=1,
        GROUPS=1,
        CANDIDATES=1,
        NARROW=1,
        TILE=1,
        PAIRS=1,
        BLOCK=1,
        FILTERED=False,
        FAST=True,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
    return out
