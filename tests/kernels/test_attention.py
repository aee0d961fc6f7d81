"""Attention backends against attention written out token by token in float64."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels.attention import select_backend, torch_backend
from nanovllm_bento.kernels.attention.base import AttentionBackend, AttentionMetadata

CPU = torch.device("cpu")
NUM_BLOCKS = 400


def backend(head_dim: int, block_size: int, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    return select_backend("auto", head_dim=head_dim, dtype=dtype, kv_dtype=dtype, block_size=block_size, device=CPU)


def make_meta(rows: list[tuple[int, int]], block_size: int, num_decode: int) -> AttentionMetadata:
    """rows: (query tokens, context tokens). Blocks are distinct and shuffled; past a row's end the table is garbage."""
    starts = [0, *accumulate(q for q, _ in rows)]
    max_len = max(n for _, n in rows)
    width = -(-max_len // block_size) + 1
    table = torch.full((len(rows), width), 2**30, dtype=torch.int32)
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5)).tolist()
    for row, (_, n) in enumerate(rows):
        for i in range(-(-n // block_size)):
            table[row, i] = order.pop()
    return AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.full((starts[-1],), -1),
        max_query_len=max(q for q, _ in rows),
        max_seq_len=max_len,
        num_decode_rows=num_decode,
    )


def naive(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    block_size, kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    starts = meta.query_start_loc.tolist()
    for row, length in enumerate(meta.seq_lens.tolist()):
        slots = [int(meta.block_table[row, p // block_size]) * block_size + p % block_size for p in range(length)]
        keys, values = k_cache.flatten(0, 1)[slots].double(), v_cache.flatten(0, 1)[slots].double()
        num_queries = starts[row + 1] - starts[row]
        for i in range(num_queries):
            seen = length - num_queries + i + 1
            for head in range(q.shape[1]):
                k, v = keys[:seen, head // group], values[:seen, head // group]
                weights = torch.softmax(k @ q[starts[row] + i, head].double() * scale, 0)
                out[starts[row] + i, head] = weights @ v
    return out


def check(
    rows: list[tuple[int, int]],
    num_decode: int,
    *,
    head_dim: int = 64,
    heads: int = 6,
    kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    generator = torch.Generator().manual_seed(0)
    meta = make_meta(rows, block_size, num_decode)
    num_tokens = int(meta.query_start_loc[-1])
    q = torch.randn(num_tokens, heads, head_dim, generator=generator).to(dtype)
    k_cache, v_cache = torch.randn(2, NUM_BLOCKS, block_size, kv_heads, head_dim, generator=generator).to(dtype)
    scale = 1.7 / head_dim**0.5
    attention = backend(head_dim, block_size, dtype)
    attention.prepare(meta)
    found = attention.forward(q, k_cache, v_cache, meta, scale)
    assert found.dtype == dtype
    assert found.shape == q.shape
    wanted = naive(q, k_cache, v_cache, meta, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 40)]
PREFILL = [(20, 20), (1, 1), (16, 16)]
WITH_PREFIX = [(5, 21), (1, 33), (16, 32)]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_mixed_decode_and_prefill_rows(head_dim: int, heads: int, kv_heads: int) -> None:
    rows = [*DECODE, *PREFILL, *WITH_PREFIX]
    check(rows, len(DECODE), head_dim=head_dim, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_any_block_size(block_size: int) -> None:
    check([(1, 33), (1, 9), (12, 12), (7, 30)], 2, block_size=block_size)


@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 50)], [(1, 37)] * 3, [(1, 37), (1, 36)]])
def test_decode_alone(rows: list[tuple[int, int]]) -> None:
    check(rows, len(rows))


@pytest.mark.parametrize("rows", [[(50, 50)], [(3, 50)], PREFILL, WITH_PREFIX])
def test_prefill_alone(rows: list[tuple[int, int]]) -> None:
    check(rows, 0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    check([*DECODE, *PREFILL, *WITH_PREFIX], len(DECODE), dtype=dtype, tolerance=tolerance)


def test_rows_of_very_different_length_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "GROUP_TOKENS", 200)
    rows = [(1, n) for n in (3, 150, 20, 150, 64, 9, 1, 33, 90, 12)]
    attention = torch_backend.TorchAttention(16, torch.float32)
    attention.prepare(make_meta(rows, 16, len(rows)))
    assert 3 <= len(attention._decode) < len(rows)
    check(rows, len(rows))


def test_a_long_prefix_is_attended_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "QUERY_CHUNK", 8)
    check([(20, 45), (9, 10)], 0)


def test_an_unknown_or_unfit_backend_is_refused() -> None:
    common = {"head_dim": 64, "block_size": 16, "device": CPU}
    with pytest.raises(ConfigError, match="unknown; known: auto, torch"):
        select_backend("flash", dtype=torch.float32, kv_dtype=torch.float32, **common)
    with pytest.raises(ConfigError, match="KV cache must have the model's dtype"):
        select_backend("torch", dtype=torch.float32, kv_dtype=torch.bfloat16, **common)
