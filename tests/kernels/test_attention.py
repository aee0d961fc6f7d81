"""The torch attention backend against attention written out in float64, and the choice among backends."""

import pytest
import torch

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels.attention import explain_backends, select_backend, torch_backend
from nanovllm_bento.kernels.attention.base import AttentionBackend, PhasedAttention
from nanovllm_bento.kernels.rope_store import make_step
from nanovllm_bento.layers.attention import Attention
from tests.kernels.attention_checks import (
    DECODE,
    MIXED,
    PREFILL,
    WITH_PREFIX,
    assert_padding_rows_are_zeros,
    assert_right,
    make_case,
    make_meta,
    reference,
    relative_error,
)

CPU = torch.device("cpu")


def backend(block_size: int = 16, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    return select_backend(
        "auto",
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        dtype=dtype,
        kv_dtype=dtype,
        block_size=block_size,
        device=CPU,
    )


def check(rows: list[tuple[int, int]], num_decode: int, block_size: int = 16, **shape: object) -> None:
    assert_right(backend(block_size), make_case(rows, num_decode, block_size=block_size, **shape))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_mixed_decode_and_prefill_rows(head_dim: int, heads: int, kv_heads: int) -> None:
    check(MIXED, len(DECODE), head_dim=head_dim, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_any_block_size(block_size: int) -> None:
    check([(1, 33), (1, 9), (12, 12), (7, 30)], 2, block_size)


@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 50)], [(1, 37)] * 3, [(1, 37), (1, 36)], [(1, 5), (1, 3)]])
def test_decode_alone(rows: list[tuple[int, int]]) -> None:
    check(rows, len(rows))


@pytest.mark.parametrize("rows", [[(50, 50)], [(3, 50)], PREFILL, WITH_PREFIX])
def test_prefill_alone(rows: list[tuple[int, int]]) -> None:
    check(rows, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_right(backend(dtype=dtype), make_case(MIXED, len(DECODE), dtype=dtype))


def test_padding_rows_are_zeros() -> None:
    assert_padding_rows_are_zeros(backend())


def test_scales_of_the_cache_are_applied() -> None:
    case = make_case(MIXED, len(DECODE))
    case.k_scale, case.v_scale = 0.5, 3.0
    assert_right(backend(), case)


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


class Halves(torch_backend.TorchAttention):
    """A backend of two phases: each computes all and keeps its own rows."""

    def __init__(self, name: str, capturable: bool) -> None:
        super().__init__(16, torch.float32)
        self.name, self.capturable = name, capturable

    def decode(self, q, k_cache, v_cache, meta, scale, k_scale, v_scale, out):
        rows = meta.num_decode_rows
        out[:rows] = self.forward(q, k_cache, v_cache, meta, scale, k_scale, v_scale)[:rows]

    def prefill(self, q, k_cache, v_cache, meta, scale, k_scale, v_scale, out):
        rows = meta.num_decode_rows
        out[rows:] = self.forward(q, k_cache, v_cache, meta, scale, k_scale, v_scale)[rows:]


@pytest.mark.parametrize("rows, num_decode", [(MIXED, len(DECODE)), (DECODE, len(DECODE)), (WITH_PREFIX, 0)])
def test_two_backends_share_a_step(rows: list[tuple[int, int]], num_decode: int) -> None:
    attention = PhasedAttention(prefill=Halves("a", capturable=False), decode=Halves("b", capturable=True))
    assert (attention.name, attention.capturable) == ("a+b", True)
    case = make_case(rows, num_decode)
    case.k_scale, case.v_scale = 0.5, 3.0
    attention.prepare(case.meta)
    found = attention.forward(*case.tensors())
    assert relative_error(found, reference(case)) < 1e-5


class Fused(Halves):
    """Answers a fused call with the name of who was called."""

    fuses_decode = True

    def decode_from_qkv(self, qkv, step, *rest):
        return qkv.new_full((len(qkv), 2, 4), 7.0)


def test_a_fusing_decode_backend_takes_steps_of_decode_rows_only() -> None:
    layer = Attention(8, 2, 1, 4, qkv_bias=False, o_bias=False, qk_norm=False, eps=1e-6, dtype=torch.float32)
    fusing = PhasedAttention(prefill=Halves("a", capturable=False), decode=Fused("b", capturable=True))
    assert fusing.fuses_decode
    assert not PhasedAttention(prefill=Fused("a", True), decode=Halves("b", True)).fuses_decode
    layer.backend = fusing
    for rows, num_decode, fused in (([(1, 3), (1, 5)], 2, True), ([(1, 3), (2, 5)], 1, False)):
        case = make_case(rows, num_decode, heads=2, kv_heads=1, head_dim=4)
        tokens = len(case.q)
        step = make_step(torch.ones(8, 4), torch.arange(tokens), case.meta.slot_mapping)
        fusing.prepare(case.meta)
        found = layer.attend(torch.ones(tokens, 16), step, (case.k_cache, case.v_cache), case.meta)
        assert found.shape == (tokens, 8)
        assert bool((found == 7.0).all()) == fused


def test_an_unknown_or_unfit_backend_is_refused() -> None:
    common = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "device": CPU}
    float32 = {"dtype": torch.float32, "kv_dtype": torch.float32}
    with pytest.raises(ConfigError, match="unknown; known: auto, flash_attn, triton, torch"):
        select_backend("flash", **float32, **common)
    with pytest.raises(ConfigError, match="KV cache must have the model's dtype"):
        select_backend("torch", dtype=torch.float32, kv_dtype=torch.bfloat16, **common)
    for name in ("flash_attn", "triton"):
        with pytest.raises(ConfigError, match=f"'{name}' does not work here: it needs an NVIDIA GPU"):
            select_backend(name, **float32, **common)
    with pytest.raises(ConfigError, match="not batch-invariant"):
        select_backend("auto", **float32, **common, batch_invariant=True)


def test_backends_are_explained() -> None:
    found = explain_backends(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        block_size=16,
        device=CPU,
    )
    assert found == [
        ("flash_attn", "it needs an NVIDIA GPU"),
        ("triton", "it needs an NVIDIA GPU"),
        ("torch", None),
    ]
