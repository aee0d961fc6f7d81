"""Attention backends on a GPU: the Triton kernels and, where installed, FlashAttention, against float64."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels.attention import explain_backends, select_backend
from nanovllm_bento.kernels.attention.base import AttentionBackend, WholePromptBackend
from nanovllm_bento.kernels.attention.flash_backend import find_library
from tests.kernels.attention_checks import (
    DECODE,
    FP8,
    MIXED,
    PREFILL,
    TOLERANCES,
    WITH_PREFIX,
    Case,
    assert_bits_do_not_depend_on_the_batch,
    assert_forward_joins_the_phases,
    assert_fused_right,
    assert_padding_rows_are_zeros,
    assert_right,
    assert_same_cache,
    make_case,
    make_fused_case,
    make_meta,
    owned_slots,
    reference,
    relative_error,
    run,
)

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LONG = [(1, 2049), (1, 700), (1, 64), (130, 130), (70, 515), (1, 300), (257, 1300)]
NUM_LONG_DECODE = 3


def backend(
    name: str,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype | None = None,
    block_size: int = 16,
    batch_invariant: bool = False,
) -> AttentionBackend:
    return select_backend(
        name,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=block_size,
        device=torch.device("cuda"),
        batch_invariant=batch_invariant,
    )


def check(name: str, rows: list[tuple[int, int]], num_decode: int, seed: int = 0, **shape: object) -> None:
    shape.setdefault("dtype", BF16)
    assert_right(backend(name, **shape), make_case(rows, num_decode, device="cuda", seed=seed, **shape))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    check("triton", MIXED, len(DECODE), head_dim=head_dim, dtype=dtype)
    check("triton", LONG, NUM_LONG_DECODE, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("rows, num_decode", [(MIXED, len(DECODE)), (DECODE, len(DECODE)), (PREFILL, 0)])
def test_forward_joins_the_phases(rows: list[tuple[int, int]], num_decode: int) -> None:
    assert_forward_joins_the_phases(backend("triton"), make_case(rows, num_decode, dtype=BF16, device="cuda"))


@pytest.mark.parametrize("head_dim", [80, 96])
def test_head_dims_between_powers_of_two(head_dim: int) -> None:
    check("triton", LONG, NUM_LONG_DECODE, head_dim=head_dim)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (16, 8), (7, 1), (32, 4), (16, 1)])
def test_heads_that_share_keys(heads: int, kv_heads: int) -> None:
    check("triton", LONG, NUM_LONG_DECODE, heads=heads, kv_heads=kv_heads, head_dim=128)


@pytest.mark.parametrize("block_size", [5, 64, 256])
def test_block_sizes(block_size: int) -> None:
    check("triton", LONG, NUM_LONG_DECODE, block_size=block_size, head_dim=128)


@pytest.mark.parametrize("head_dim, dtype", [(64, BF16), (128, BF16), (128, FP16), (256, BF16), (128, FP32)])
def test_an_fp8_cache_with_scales(head_dim: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 conversion needs compute capability 8.9")
    check("triton", LONG, NUM_LONG_DECODE, head_dim=head_dim, dtype=dtype, kv_dtype=FP8)


@pytest.mark.parametrize("num_rows", [1, 16, 300])
def test_many_decode_rows(num_rows: int) -> None:
    rows = [(1, 1 + (i * 379) % 1500) for i in range(num_rows - 1)] + [(1, 3000)]
    check("triton", rows, num_rows, heads=16, kv_heads=8, head_dim=128)


def test_every_finite_e4m3_number_is_read_exactly() -> None:
    shape = {"heads": 1, "kv_heads": 1, "head_dim": 256, "dtype": FP32, "kv_dtype": FP8}
    case = make_case([(1, 1)], 1, **shape, device="cuda")
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers[[0x7F, 0xFF]] = 0.0  # NaN
    case.v_cache[int(case.meta.block_table[0, 0]), 0, 0] = numbers.cuda()
    case.v_scale = 1.0
    assert torch.equal(run(backend("triton", **shape), case)[0, 0].cpu(), numbers.float())


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_padding_rows_are_zeros(batch_invariant: bool) -> None:
    attention = backend("triton", batch_invariant=batch_invariant)
    assert_padding_rows_are_zeros(attention, dtype=BF16, device="cuda")


@pytest.mark.parametrize("head_dim, dtype, kv_dtype", [(128, BF16, None), (64, FP32, None), (128, BF16, FP8)])
@pytest.mark.parametrize("length", [37, 300])
def test_batch_invariant_bits(length: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype}
    attention = backend("triton", **shape, batch_invariant=True)
    assert_bits_do_not_depend_on_the_batch(attention, length, **shape, device="cuda")


def replays_follow_the_buffers(attention: AttentionBackend, num_rows: int, **shape: object) -> None:
    """Captured once with a bound for max_seq_len; then lengths, tables, queries and caches change under the graph."""
    assert attention.capturable
    bound, block_size = 2048, 16
    # room for the longest rows: distinct blocks of a table as wide as the bound
    static = make_case([(1, bound)] * num_rows, num_rows, device="cuda", **shape)
    scale = static.scale
    attention.prepare(static.meta)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention.forward(*static.tensors())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.forward(*static.tensors())
    for step, longest in enumerate((1, 300, bound, 40)):
        lengths = [0 if i % 5 == 4 else 1 + (longest * (i + 1) // num_rows + i) % longest for i in range(num_rows)]
        rows = [(1, n) for n in lengths]
        meta = make_meta(rows, block_size, num_rows, seed=step)
        fresh = make_case(rows, num_rows, meta=meta, device="cuda", seed=step, **shape)
        static.q.copy_(fresh.q)
        for old, new in ((static.k_cache, fresh.k_cache), (static.v_cache, fresh.v_cache)):
            old.fill_(float("nan"))
            old[: len(new)] = new
        static.meta.seq_lens.copy_(meta.seq_lens)
        static.meta.block_table.fill_(2**30)
        static.meta.block_table[:, : meta.block_table.shape[1]] = meta.block_table.cuda()
        out.fill_(float("nan"))
        graph.replay()
        expected = reference(Case(fresh.q, fresh.k_cache, fresh.v_cache, meta, scale, fresh.k_scale, fresh.v_scale))
        assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("num_rows", [1, 7, 128])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_graph_replays_follow_the_buffers(num_rows: int, kv_dtype: torch.dtype) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": BF16, "kv_dtype": kv_dtype}
    replays_follow_the_buffers(backend("triton", **shape), num_rows, **shape)


FUSED_LENGTHS = [2049, 1, 700, 0, 64, 65, 300, 16]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (4, 2, 80), (8, 1, 96), (8, 2, 128), (6, 2, 256)])
def test_fused_decode(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norm: bool) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    fused = make_fused_case(FUSED_LENGTHS, norm=norm, unstored=(2, 4), device="cuda", **shape)
    assert_fused_right(backend("auto", **shape), fused)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (4, 2, 80), (8, 1, 128), (6, 2, 256)])
def test_fused_decode_on_an_fp8_cache(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 conversion needs compute capability 8.9")
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype, "kv_dtype": FP8}
    fused = make_fused_case(FUSED_LENGTHS, unstored=(2, 4), device="cuda", **shape)
    assert_fused_right(backend("triton", **shape), fused)


@pytest.mark.parametrize("num_rows", [1, 16, 64, 90, 130, 250, 300])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_fused_decode_of_many_rows(num_rows: int, kv_dtype: torch.dtype) -> None:
    shape = {"heads": 16, "kv_heads": 8, "head_dim": 128, "dtype": BF16, "kv_dtype": kv_dtype}
    lengths = [(i * 379) % 700 for i in range(num_rows - 1)] + [1500]
    assert_fused_right(backend("triton", **shape), make_fused_case(lengths, device="cuda", **shape))


@pytest.mark.parametrize("num_rows", [1, 7, 128])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_fused_graph_replays_follow_the_buffers(num_rows: int, kv_dtype: torch.dtype) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": BF16, "kv_dtype": kv_dtype}
    attention, bound = backend("triton", **shape), 1024
    static = make_fused_case([bound] * num_rows, device="cuda", **shape)
    meta = static.case.meta
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.run(attention)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static.run(attention)
    for step, longest in enumerate((1, 300, bound, 40)):
        lengths = [0 if i % 5 == 4 else 1 + (longest * (i + 1) // num_rows + i) % longest for i in range(num_rows)]
        fresh = make_fused_case(lengths, unstored=(2,), device="cuda", seed=step, **shape)
        static.qkv.copy_(fresh.qkv)
        static.norm_weight.copy_(fresh.norm_weight)
        static.table[: len(fresh.table)] = fresh.table
        for old, new in ((static.case.k_cache, fresh.case.k_cache), (static.case.v_cache, fresh.case.v_cache)):
            old.fill_(float("nan"))
            old[: len(new)] = new
        meta.seq_lens.copy_(fresh.case.meta.seq_lens)
        meta.slot_mapping.copy_(fresh.case.meta.slot_mapping)
        meta.block_table.fill_(2**30)
        meta.block_table[:, : fresh.case.meta.block_table.shape[1]] = fresh.case.meta.block_table
        out.fill_(float("nan"))
        graph.replay()
        wanted, k_cache, v_cache = fresh.reference()
        assert relative_error(out, wanted) < 2e-2
        assert_same_cache(static.case.k_cache[: len(k_cache)], k_cache)
        assert_same_cache(static.case.v_cache[: len(v_cache)], v_cache)


def flash_or_skip(**shape: object) -> AttentionBackend:
    found, reason = find_library(int(str(shape.get("block_size", 16))), torch.device("cuda"))
    if found is None:
        pytest.skip(str(reason))
    return backend("flash_attn", **shape)


@pytest.mark.parametrize("rows, num_decode", [(MIXED, len(DECODE)), (LONG, 3), (DECODE, 5), (PREFILL, 0)])
@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_flash_attention(rows: list[tuple[int, int]], num_decode: int, block_size: int) -> None:
    shape = {"heads": 16, "kv_heads": 8, "head_dim": 128, "dtype": BF16, "block_size": block_size}
    assert_right(flash_or_skip(**shape), make_case(rows, num_decode, device="cuda", **shape))


@pytest.mark.parametrize("lengths", [[5], [1, 300, 17, 64], [130] * 9])
def test_flash_attention_of_whole_prompts(lengths: list[int]) -> None:
    shape = {"heads": 16, "kv_heads": 8, "head_dim": 128, "dtype": BF16}
    attention = flash_or_skip(**shape)
    if not attention.reads_whole_prompts:
        pytest.skip("this build takes no keys but the cache's")
    case = make_case([(n, n) for n in lengths], 0, device="cuda", **shape)
    slots = torch.cat([owned_slots(case.meta, row, 16) for row in range(len(lengths))])
    packed = torch.cat([case.q, *(c.flatten(0, 1)[slots] for c in (case.k_cache, case.v_cache))], dim=1)
    q, k, v = packed.split((16, 8, 8), dim=1)  # as the projection lays them out
    meta = replace(case.meta, whole_prompts=True)
    attention.prepare(meta)
    found = cast(WholePromptBackend, attention).attend_whole_prompts(q.contiguous(), k, v, meta, case.scale)
    assert relative_error(found, reference(case)) < TOLERANCES[BF16]
    k[-1] = torch.nan  # what rope_store leaves where a value is not finite
    broken = cast(WholePromptBackend, attention).attend_whole_prompts(q.contiguous(), k, v, meta, case.scale)
    assert broken[-1].isnan().all()
    assert torch.equal(broken[: -lengths[-1]], found[: -lengths[-1]])


def test_flash_attention_padding_rows_are_zeros() -> None:
    shape = {"heads": 16, "kv_heads": 8, "head_dim": 128, "dtype": BF16}
    assert_padding_rows_are_zeros(flash_or_skip(**shape), device="cuda", **shape)


def test_flash_attention_graph_replays_follow_the_buffers() -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": BF16}
    replays_follow_the_buffers(flash_or_skip(**shape), 7, **shape)


@pytest.mark.parametrize("rows, num_decode", [(MIXED, len(DECODE)), (DECODE, len(DECODE)), (WITH_PREFIX, 0)])
def test_auto_takes_what_works(rows: list[tuple[int, int]], num_decode: int) -> None:
    check("auto", rows, num_decode, heads=4, kv_heads=2, head_dim=128)
    check("auto", rows, num_decode, heads=4, kv_heads=2, head_dim=64, dtype=FP32)
    taken = backend("auto", heads=4, kv_heads=2, head_dim=128, dtype=BF16, block_size=16)
    assert taken.name == ("triton" if find_library(16, torch.device("cuda"))[0] is None else "flash_attn+triton")


def test_reasons_name_what_does_not_fit() -> None:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "block_size": 16, "device": torch.device("cuda")}
    reasons = dict(explain_backends(**shape, dtype=BF16, kv_dtype=FP8))
    assert reasons["triton"] is None or "8.9" in reasons["triton"]
    assert "KV cache must have the model's dtype" in str(reasons["flash_attn"])
    assert "KV cache must have the model's dtype" in str(reasons["torch"])
    with pytest.raises(ConfigError, match="neither float16 nor bfloat16"):
        select_backend("flash_attn", **shape, dtype=FP32, kv_dtype=FP32)
    if torch.cuda.get_device_capability()[0] == 9:
        reasons = dict(explain_backends(**{**shape, "block_size": 64}, dtype=BF16, kv_dtype=BF16))
        assert "reads past a sequence's end" in str(reasons["flash_attn"])
    invariant = dict(explain_backends(**shape, dtype=BF16, kv_dtype=BF16, batch_invariant=True))
    assert invariant["triton"] is None
    assert invariant["flash_attn"] is not None
