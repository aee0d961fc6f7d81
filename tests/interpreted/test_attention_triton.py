"""The Triton attention kernels against attention written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from nanovllm_bento.kernels.attention.decode_triton import MANY_PAIRS, DecodeConfig, choose_config, choose_splits
from nanovllm_bento.kernels.attention.prefill_triton import PrefillConfig
from nanovllm_bento.kernels.attention.triton_backend import TritonAttention
from tests.kernels.attention_checks import (
    DECODE,
    FP8,
    MIXED,
    PREFILL,
    WITH_PREFIX,
    assert_bits_do_not_depend_on_the_batch,
    assert_forward_joins_the_phases,
    assert_fused_right,
    assert_padding_rows_are_zeros,
    assert_right,
    make_case,
    make_fused_case,
    reference,
    relative_error,
    run,
)

ONE_SPLIT = DecodeConfig(block_n=16, programs_per_sm=1, balance_splits=1, min_chunk=1024)
SPLIT = DecodeConfig(block_n=16, programs_per_sm=64, min_chunk=16)
TILE = PrefillConfig(block_m=16, block_n=16)
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 32}
FEW = [(1, 17), (1, 40), (20, 20), (5, 21)]


def backend(
    decode: DecodeConfig = SPLIT,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    prefill: PrefillConfig = TILE,
) -> TritonAttention:
    return TritonAttention(
        heads, kv_heads, head_dim, dtype, kv_dtype or dtype, torch.device("cpu"), batch_invariant, decode, prefill
    )


@pytest.mark.parametrize("decode", [ONE_SPLIT, SPLIT], ids=["one split", "splits"])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (4, 2, 80), (3, 1, 32)])
def test_decode_rows(decode: DecodeConfig, heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    rows = [(1, n) for n in (1, 16, 17, 100)]
    assert_right(backend(decode, **shape), make_case(rows, len(rows), **shape))


@pytest.mark.parametrize("rows", [PREFILL, WITH_PREFIX, [(3, 50)], [(33, 33)]])
def test_prefill_rows(rows: list[tuple[int, int]]) -> None:
    assert_right(backend(**SMALL), make_case(rows, 0, **SMALL))


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 80), (8, 1, 16)])
def test_mixed_rows(heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    assert_right(backend(**shape), make_case(MIXED, len(DECODE), **shape))


def test_forward_joins_the_phases() -> None:
    assert_forward_joins_the_phases(backend(**SMALL), make_case(FEW, 2, **SMALL))


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(block_size: int) -> None:
    assert_right(backend(**SMALL), make_case([(1, 33), (1, 70), (7, 30)], 2, **SMALL, block_size=block_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_right(backend(**SMALL, dtype=dtype), make_case(FEW, 2, **SMALL, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 80])
def test_an_fp8_cache_with_scales(head_dim: int) -> None:
    shape = {"heads": 2, "kv_heads": 1, "head_dim": head_dim, "dtype": torch.float16, "kv_dtype": FP8}
    assert_right(backend(**shape), make_case(FEW, 2, **shape))


def test_every_finite_e4m3_number_is_read_exactly() -> None:
    """Keys of 0 make all weights equal; each value then is its number, over the row's one token."""
    shape = {"heads": 1, "kv_heads": 1, "head_dim": 256, "dtype": torch.float32, "kv_dtype": FP8}
    case = make_case([(1, 1)], 1, **shape)
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers[[0x7F, 0xFF]] = 0.0  # NaN
    slot = int(case.meta.block_table[0, 0])
    case.v_cache[slot, 0, 0] = numbers
    case.v_scale = 1.0
    assert torch.equal(run(backend(**shape), case)[0, 0], numbers.float())


@pytest.mark.parametrize("decode", [ONE_SPLIT, SPLIT], ids=["one split", "splits"])
def test_padding_rows_are_zeros(decode: DecodeConfig) -> None:
    assert_padding_rows_are_zeros(backend(decode, **SMALL), **SMALL)


def test_the_room_for_splits_serves_again_and_outlives_growth() -> None:
    attention = backend(**SMALL)
    small, large = make_case([(1, 60)], 1, **SMALL, seed=1), make_case([(1, 90), (1, 33), (1, 20)], 3, **SMALL, seed=2)
    for case in (small, small, large, small, large):
        assert_right(attention, case)
        assert attention._workspace.counters.numel()
        assert not attention._workspace.counters.any()
    assert attention._workspace._outgrown


def test_splits_follow_from_what_a_graph_fixes() -> None:
    config = DecodeConfig(block_n=64, balance_splits=4, balance_chunk=512)
    assert choose_splits(config, 256, 8, 4096, 132) == (4, 512)
    assert choose_splits(config, 256, 8, 300, 132) == (1, 512)
    splits, chunk = choose_splits(config, 1, 8, 40960, 132)
    assert chunk == 128
    assert splits * 8 >= 132
    assert choose_splits(config, 1, 8, 200, 132) == (2, 128)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
def test_few_rows_are_split_and_many_are_not(kv_dtype: torch.dtype) -> None:
    splits = {}
    for rows in (1, 16, 64, 256):
        config = choose_config(128, kv_dtype, torch.bfloat16, rows, 8, 132)
        splits[rows] = choose_splits(config, rows, 8, 4096, 132)[0]
    assert splits[1] * 8 >= 132
    assert splits[1] > splits[16] > splits[64] == splits[256] == 1


def test_a_last_wave_of_few_programs_is_avoided() -> None:
    """Rows of 8 heads on 132 multiprocessors, which hold so many programs of each configuration at once."""
    held = {(config.block_n, config.num_warps): count for count, config in MANY_PAIRS}
    waves = {}
    for rows in (80, 112, 128, 192, 224, 256, 512):
        config = choose_config(128, torch.bfloat16, torch.bfloat16, rows, 8, 132)
        waves[rows] = rows * 8 / 132 / held[config.block_n, config.num_warps]
    assert max(waves[rows] for rows in (80, 112, 128, 192)) <= 1
    for rows in (224, 256, 512):
        assert waves[rows] % 1 > 0.5, f"{rows} rows are {waves[rows]:.2f} waves"
    assert choose_config(64, torch.bfloat16, torch.bfloat16, 256, 8, 132).block_n == 32, "not measured there"


def test_programs_are_small_only_where_kernels_overlap() -> None:
    def chosen(rows: int, head_dim: int, kv_dtype: torch.dtype, overlapping: bool) -> DecodeConfig:
        return choose_config(head_dim, kv_dtype, torch.bfloat16, rows, 8, 132, overlapping)

    for rows in (1, 4, 16, 40, 64):
        alone, beside = (chosen(rows, 128, torch.bfloat16, overlapping) for overlapping in (False, True))
        assert alone != beside
        assert beside.num_warps <= alone.num_warps
        for head_dim, kv_dtype in ((64, torch.bfloat16), (128, FP8), (256, torch.bfloat16)):
            assert chosen(rows, head_dim, kv_dtype, True) == chosen(rows, head_dim, kv_dtype, False), "not measured"
    assert chosen(80, 128, torch.bfloat16, True) == chosen(80, 128, torch.bfloat16, False)


FUSED_LENGTHS = [33, 1, 0, 16, 17, 70]


@pytest.fixture
def torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates to bfloat16 and loses a carry on the way to e4m3."""
    convert = interpreter._convert_float
    targets = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (FP8, torch.uint8)}

    def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source != tl.float32 or target not in targets:
            return convert(data, source, target, mode)
        dtype, bits = targets[target]
        return torch.tensor(data).to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.parametrize("decode", [ONE_SPLIT, SPLIT], ids=["one split", "splits"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (4, 2, 80), (8, 1, 96)])
def test_fused_decode(decode: DecodeConfig, norm: bool, heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    assert_fused_right(backend(decode, **shape), make_fused_case(FUSED_LENGTHS, norm=norm, unstored=(3,), **shape))


@pytest.mark.parametrize("heads, head_dim", [(4, 128), (2, 256)])
def test_fused_decode_of_wide_heads(heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": 1, "head_dim": head_dim}
    assert_fused_right(backend(**shape), make_fused_case([18, 2], **shape))


@pytest.mark.parametrize("decode", [ONE_SPLIT, SPLIT], ids=["one split", "splits"])
@pytest.mark.parametrize("norm, head_dim", [(True, 32), (False, 80), (True, 80)])
@pytest.mark.usefixtures("torch_rounds")
def test_fused_decode_on_an_fp8_cache(decode: DecodeConfig, norm: bool, head_dim: int) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": head_dim, "dtype": torch.float16, "kv_dtype": FP8}
    assert_fused_right(backend(decode, **shape), make_fused_case(FUSED_LENGTHS, norm=norm, unstored=(0,), **shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("torch_rounds")
def test_fused_decode_in_half_precision(dtype: torch.dtype) -> None:
    assert_fused_right(backend(**SMALL, dtype=dtype), make_fused_case(FUSED_LENGTHS, **SMALL, dtype=dtype))


def test_fused_decode_of_a_new_token_alone_is_its_value() -> None:
    fused = make_fused_case([1, 1], **SMALL)
    found = fused.run(backend(**SMALL))
    values = fused.qkv.view(2, -1, SMALL["head_dim"])[:, -1:]
    torch.testing.assert_close(found, values.expand_as(found))


def test_fused_decode_steps_follow_each_other() -> None:
    """The key and value that one step stores are what the next one walks over."""
    attention = backend(**SMALL)
    first = make_fused_case([19, 40], **SMALL)
    first.run(attention)
    both = make_fused_case([20, 41], **SMALL, seed=3)
    both.case.meta.block_table = first.case.meta.block_table
    both.case.k_cache, both.case.v_cache = first.case.k_cache, first.case.v_cache
    table, lens = first.case.meta.block_table, both.case.meta.seq_lens
    last = (lens - 1).long()
    both.case.meta.slot_mapping = table.gather(1, last[:, None] // 16).squeeze(1).long() * 16 + last % 16
    assert_fused_right(attention, both)


def test_batch_invariant_decode_is_not_fused() -> None:
    assert not backend(batch_invariant=True).fuses_decode


def _matmul_line_by_line(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """BLAS rounds a line differently by where it stands in a matrix; tensor cores do not."""
    return (a[:, None, :] * b.T[None]).sum(-1, dtype=dtype)


@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (3, 1)])
def test_batch_invariant_bits_do_not_depend_on_the_batch(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", _matmul_line_by_line)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 32}
    assert_bits_do_not_depend_on_the_batch(backend(**shape, batch_invariant=True), 19, **shape)


def test_batch_invariant_padding_rows_are_zeros() -> None:
    assert_padding_rows_are_zeros(backend(**SMALL, batch_invariant=True), **SMALL)


def test_a_longer_bound_changes_nothing() -> None:
    """Under a graph max_seq_len is the model's; the output then differs by the rounding of other splits only."""
    case = make_case([(1, 40), (1, 70)], 2, **SMALL)
    wanted = reference(case)
    case.meta.max_seq_len = 4096
    assert relative_error(run(backend(**SMALL), case), wanted) < 1e-5
