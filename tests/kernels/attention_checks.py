"""Attention backends against attention written out in float64; shared by CPU, interpreter and GPU tests.

Every cache slot that no row owns holds NaN, and so does the output before a backend fills it.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from nanovllm_bento.kernels.attention.base import AttentionBackend, AttentionMetadata, FusingBackend
from nanovllm_bento.kernels.rope_store import make_step, qk_norm_rope_store_reference

FP8 = torch.float8_e4m3fn
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative norm error. With an fp8 cache too: the reference reads the same rounded keys and values."""

DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 40)]
PREFILL = [(20, 20), (1, 1), (16, 16)]
WITH_PREFIX = [(5, 21), (1, 33), (16, 32)]
MIXED = [*DECODE, *PREFILL, *WITH_PREFIX]


def make_meta(
    rows: list[tuple[int, int]], block_size: int, num_decode: int, device: str = "cpu", seed: int = 5
) -> AttentionMetadata:
    """rows: (query tokens, context tokens). Blocks are distinct and shuffled; past a row's end the table is garbage."""
    starts = [0, *accumulate(q for q, _ in rows)]
    max_len = max(n for _, n in rows)
    counts = [-(-n // block_size) for _, n in rows]
    table = torch.full((len(rows), max(counts) + 1), 2**30, dtype=torch.int32)
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).int()
    for row, (first, count) in enumerate(zip(accumulate([0, *counts]), counts, strict=False)):
        table[row, :count] = order[first : first + count]
    return AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=device),
        block_table=table.to(device),
        slot_mapping=torch.full((starts[-1],), -1, device=device),
        max_query_len=max(q for q, _ in rows),
        max_seq_len=max_len,
        num_decode_rows=num_decode,
    )


def owned_slots(meta: AttentionMetadata, row: int, block_size: int) -> Tensor:
    """int64 [context length]: the flat cache slots of a row's tokens, on the CPU."""
    positions = torch.arange(int(meta.seq_lens[row]))
    return meta.block_table[row].cpu()[positions // block_size].long() * block_size + positions % block_size


@dataclass
class Case:
    """One step's inputs. Caches hold NaN wherever no row has a token."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMetadata
    scale: float
    k_scale: float
    v_scale: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata, float, float, float]:
        return self.q, self.k_cache, self.v_cache, self.meta, self.scale, self.k_scale, self.v_scale


def make_case(
    rows: list[tuple[int, int]],
    num_decode: int,
    *,
    head_dim: int = 64,
    heads: int = 6,
    kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    meta: AttentionMetadata | None = None,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    meta = meta or make_meta(rows, block_size, num_decode, device)
    num_tokens = int(meta.query_start_loc[-1])
    num_blocks = sum(-(-n // block_size) for _, n in rows) + 3
    caches = []
    for _ in range(2):
        cache = torch.full((num_blocks * block_size, kv_heads, head_dim), float("nan"))
        for row in range(len(rows)):
            slots = owned_slots(meta, row, block_size)
            cache[slots] = torch.randn(len(slots), kv_heads, head_dim, generator=generator)
        caches.append(cache.view(num_blocks, block_size, kv_heads, head_dim).to(kv_dtype or dtype).to(device))
    # heads of a packed projection: rows of q are not contiguous
    packed = torch.randn(num_tokens, heads + 2, head_dim, generator=generator).to(dtype).to(device)
    scales = (0.37, 2.3) if kv_dtype == FP8 else (1.0, 1.0)
    return Case(packed[:, :heads], *caches, meta, 1.7 / head_dim**0.5, *scales)


def reference(case: Case) -> Tensor:
    """float64 [num_tokens, num_heads, head_dim] on the CPU: softmax over keys, a row and a head at a time."""
    q, block_size, kv_heads = case.q.cpu().double(), *case.k_cache.shape[1:3]
    k_flat = case.k_cache.cpu().float().double().flatten(0, 1) * case.k_scale
    v_flat = case.v_cache.cpu().float().double().flatten(0, 1) * case.v_scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    starts = case.meta.query_start_loc.tolist()
    for row, length in enumerate(case.meta.seq_lens.tolist()):
        if not length:
            continue
        slots = owned_slots(case.meta, row, block_size)
        start, end = starts[row], starts[row + 1]
        positions = torch.arange(length - (end - start), length)
        hidden = torch.arange(length)[None] > positions[:, None]
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // kv_heads)
            scores = q[start:end, head] @ k_flat[slots, kv_head].T * case.scale
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
            out[start:end, head] = weights @ v_flat[slots, kv_head]
    return out


def run(attention: AttentionBackend, case: Case) -> Tensor:
    """A step's output: what the phases write over NaN where a backend has them, else forward's."""
    attention.prepare(case.meta)
    if not hasattr(attention, "decode"):
        return attention.forward(*case.tensors())
    out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype, device=case.q.device)
    if case.meta.num_decode_rows:
        attention.decode(*case.tensors(), out)
        assert out[case.meta.num_decode_rows :].isnan().all(), "decode wrote past its rows"
    if case.meta.has_prefill_rows:
        attention.prefill(*case.tensors(), out)
    return out


def assert_forward_joins_the_phases(attention: AttentionBackend, case: Case) -> None:
    found = run(attention, case)
    joined = attention.forward(*case.tensors())
    assert joined.dtype == case.q.dtype
    assert torch.equal(joined, found)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def assert_right(attention: AttentionBackend, case: Case, tolerance: float | None = None) -> None:
    error = relative_error(run(attention, case), reference(case))
    assert error < (tolerance or TOLERANCES[case.q.dtype])


def assert_padding_rows_are_zeros(attention: AttentionBackend, **shape: object) -> None:
    rows = [(1, 20), (1, 0), (1, 70), (1, 0)]
    case = make_case(rows, len(rows), **shape)
    found = run(attention, case)
    assert not found[[1, 3]].any()
    assert relative_error(found, reference(case)) < TOLERANCES[case.q.dtype]


def chunked(case: Case, chunks: list[int], num_decode: int, company: int, seed: int = 9) -> Case:
    """The tokens of case's only row (all of them query tokens) once more, as rows of one step: prefixes are cached.

    company: how many other rows stand beside them; they come first, one token each. The rows of the token itself
    follow, then the chunks of the others, as a step of several sequences with the same cached keys would have them.
    """
    length = int(case.meta.seq_lens[0])
    assert sum(chunks) == length
    ends = list(accumulate(chunks))
    device = case.q.device
    others = [(1, 1 + i % length) for i in range(company)]
    rows = [*others, *zip(chunks, ends, strict=True)]
    starts = [0, *accumulate(n for n, _ in rows)]
    noise = torch.randn(company, *case.q.shape[1:], generator=torch.Generator().manual_seed(seed)).to(case.q)
    meta = AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=device),
        block_table=case.meta.block_table.expand(len(rows), -1).contiguous(),
        slot_mapping=torch.full((starts[-1],), -1, device=device),
        max_query_len=max(n for n, _ in rows),
        max_seq_len=length,
        num_decode_rows=num_decode,
    )
    return Case(torch.cat((noise, case.q)), case.k_cache, case.v_cache, meta, case.scale, case.k_scale, case.v_scale)


def assert_bits_do_not_depend_on_the_batch(attention: AttentionBackend, length: int, **shape: object) -> None:
    """One row of ``length`` tokens: whole, in uneven chunks beside other rows, and token by token as decode rows."""
    case = make_case([(length, length)], 0, **shape)
    whole = run(attention, case)
    assert relative_error(whole, reference(case)) < TOLERANCES[case.q.dtype]
    uneven = [3, 1, length // 2, length - length // 2 - 4]
    for chunks, num_decode, company in ((uneven, 0, 0), (uneven, 5, 5), ([1] * length, length + 2, 2)):
        other = chunked(case, chunks, num_decode, company)
        assert torch.equal(run(attention, other)[company:], whole)


EPS = 1e-5
SAME = {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 3e-2, FP8: 0.13}
"""How far one stored element may be off where the noise of float32 sums tips a rounding."""


@dataclass
class FusedCase:
    """Decode rows as the projection leaves them; each row's last cache slot is still NaN."""

    case: Case
    qkv: Tensor
    table: Tensor
    norm_weight: Tensor | None

    def run(self, attention: FusingBackend) -> Tensor:
        """Over poisoned outputs; writes the case's caches."""
        case = self.case
        assert attention.fuses_decode
        attention.prepare(case.meta)
        torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
        found = attention.decode_from_qkv(
            self.qkv,
            make_step(self.table, (case.meta.seq_lens - 1).clamp(min=0).long(), case.meta.slot_mapping),
            case.k_cache,
            case.v_cache,
            case.meta,
            case.scale,
            case.q.shape[1],
            self.norm_weight,
            EPS,
            case.k_scale,
            case.v_scale,
        )
        torch.use_deterministic_algorithms(False)
        assert found.shape == case.q.shape
        assert found.dtype == self.qkv.dtype
        return found

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """(output in float64, k_cache, v_cache) of qk_norm_rope_store's reference, then attention; on the CPU.

        A row that stores nothing attends to its new token all the same: it is stored here for the attention alone.
        """
        case, meta = self.case, self.case.meta
        meta = replace(meta, seq_lens=meta.seq_lens.cpu(), slot_mapping=meta.slot_mapping.cpu())
        real = meta.seq_lens > 0
        all_slots = torch.full((len(real),), -1)
        for row in real.nonzero().flatten().tolist():
            all_slots[row] = owned_slots(meta, row, case.k_cache.shape[1])[-1]
        caches = []
        for slots in (meta.slot_mapping, all_slots):
            k_cache, v_cache = case.k_cache.cpu().clone(), case.v_cache.cpu().clone()
            q = qk_norm_rope_store_reference(
                self.qkv.cpu(),
                make_step(self.table.cpu(), (meta.seq_lens - 1).clamp(min=0).long(), slots),
                k_cache,
                v_cache,
                case.q.shape[1],
                None if self.norm_weight is None else self.norm_weight.cpu(),
                EPS,
                case.k_scale,
                case.v_scale,
            )
            caches.append((k_cache, v_cache))
        meta = replace(meta, block_table=meta.block_table.cpu())
        out = reference(Case(q, *caches[1], meta, case.scale, case.k_scale, case.v_scale))
        return out, *caches[0]


def make_fused_case(
    lengths: list[int], *, norm: bool = True, unstored: tuple[int, ...] = (), seed: int = 0, **shape: object
) -> FusedCase:
    """unstored: rows of slot -1. Rows of length 0 are padding."""
    rows = [(1, n) for n in lengths]
    case = make_case(rows, len(rows), seed=seed, **shape)
    device, dtype = case.q.device, case.q.dtype
    num_heads, (block_size, kv_heads, head_dim) = case.q.shape[1], case.k_cache.shape[1:]
    slots = torch.full((len(rows),), -1)
    for row, length in enumerate(lengths):
        if length:
            last = owned_slots(case.meta, row, block_size)[-1]
            for cache in (case.k_cache, case.v_cache):
                cache[last // block_size, last % block_size] = float("nan")
            if row not in unstored:
                slots[row] = last
    case.meta.slot_mapping.copy_(slots)
    generator = torch.Generator().manual_seed(seed + 1)
    qkv = torch.randn(len(rows), (num_heads + 2 * kv_heads) * head_dim, generator=generator)
    weight = 1 + 0.3 * torch.randn(num_heads + kv_heads, head_dim, generator=generator) if norm else None
    angles = torch.randn(max(1, *lengths), head_dim // 2, generator=generator) * 3
    table = torch.cat((angles.cos(), angles.sin()), -1).to(device)
    return FusedCase(case, qkv.to(dtype).to(device), table, None if weight is None else weight.to(dtype).to(device))


def assert_same_cache(found: Tensor, wanted: Tensor) -> None:
    """NaN where wanted has NaN; what differs, differs by the tipped rounding of few elements."""
    dtype = wanted.dtype
    found, wanted = found.cpu().float(), wanted.float()
    assert torch.equal(found.isnan(), wanted.isnan()), "a slot was written that is not the row's, or was not"
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    torch.testing.assert_close(found, wanted, rtol=SAME[dtype], atol=SAME[dtype])
    if dtype != torch.float32:
        assert (found != wanted).double().mean() < 0.01


def assert_fused_right(attention: FusingBackend, fused: FusedCase) -> None:
    wanted, k_cache, v_cache = fused.reference()
    before = fused.qkv.clone()
    found = fused.run(attention)
    # where an fp8 cache is short, one new element on the other side of a rounding shows
    assert relative_error(found, wanted) < TOLERANCES[fused.qkv.dtype] * (5 if k_cache.dtype == FP8 else 1)
    assert not found[fused.case.meta.seq_lens == 0].any(), "padding rows are zeros"
    assert_same_cache(fused.case.k_cache, k_cache)
    assert_same_cache(fused.case.v_cache, v_cache)
    assert torch.equal(fused.qkv, before)
