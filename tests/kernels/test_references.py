"""The reference of each operation against its formula, written out in float64."""

import pytest
import torch
from torch import Tensor

from nanovllm_bento.kernels import linear as linear_module
from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.linear import best_cpu_dtype, linear, pack_weight
from nanovllm_bento.kernels.norm import add_rms_norm, rms_norm, sum_add_rms_norm
from nanovllm_bento.kernels.rope_store import make_step, qk_norm_rope_store
from tests.kernels.small_kernel_checks import RopeCase, check_rope_store_keeps_the_keys

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 48, dtype=dtype), randn(48, dtype=dtype, seed=1)
    close(rms_norm(x, weight, 0.1), norm64(x, weight, 0.1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_returns_the_sum_as_the_new_residual(dtype: torch.dtype) -> None:
    x, residual, weight = randn(5, 48, dtype=dtype), randn(5, 48, dtype=dtype, seed=1), randn(48, dtype=dtype, seed=2)
    total = x + residual
    normed, new_residual = add_rms_norm(x.clone(), residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    close(normed, norm64(total, weight, 1e-5), dtype)


def test_the_norm_of_a_sum_in_parts_equals_that_of_the_sum() -> None:
    parts, residual, weight = torch.randn(3, 5, 64), torch.randn(5, 64), torch.rand(64)
    normed, total = sum_add_rms_norm(parts, residual.clone(), weight, 1e-5)
    torch.testing.assert_close(total, residual + parts[0] + parts[1] + parts[2])
    torch.testing.assert_close(normed, rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = randn(5, 32, dtype=dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    close(silu_and_mul(x), gate / (1 + (-gate).exp()) * up, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_linear_is_the_same_packed_or_not(rows: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 48, dtype=dtype), randn(80, 48, dtype=dtype, seed=1) / 7
    b = randn(80, dtype=dtype, seed=2) if bias else None
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    close(linear(x, weight, b), wanted, dtype)
    packed = pack_weight(weight)
    if packed is not None:
        close(linear(x, None, b, packed), wanted, dtype)


def test_float32_weights_are_packed_where_torch_has_onednn() -> None:
    assert (pack_weight(randn(80, 48)) is not None) == torch.backends.mkldnn.is_available()


def test_packing_that_raises_or_gives_wrong_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = linear_module._packing_works.__wrapped__
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: torch.zeros(3, 32))
    assert not probe(torch.float32)

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("not on this CPU")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    assert not probe(torch.float32)


@pytest.mark.parametrize(
    "capabilities, wanted",
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_best_cpu_dtype(capabilities: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert best_cpu_dtype() is wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
def test_qk_norm_rope_store(norm: bool, head_dim: int, dtype: torch.dtype) -> None:
    num_tokens, heads, kv_heads, eps = 6, 4, 2, 1e-5
    qkv = randn(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weight = randn(heads + kv_heads, head_dim, dtype=dtype, seed=1) if norm else None
    angles = randn(10, head_dim // 2, seed=2) * 3
    positions = torch.tensor([3, 9, 0, 3, 1, 8])
    slots = torch.tensor([7, -1, 0, 11, -1, 4])
    k_cache = torch.full((3, 4, kv_heads, head_dim), 9.0, dtype=dtype)
    v_cache = k_cache.clone()
    step = make_step(torch.cat((angles.cos(), angles.sin()), -1), positions, slots)
    q = qk_norm_rope_store(qkv.clone(), step, k_cache, v_cache, heads, weight, eps)

    x = qkv.double().view(num_tokens, -1, head_dim)
    qk, v = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
    if weight is not None:
        qk = norm64(qk, weight, eps)
    rotated = torch.empty_like(qk)
    half = head_dim // 2
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = angles[position, i].double()
            a, b = qk[token, :, i], qk[token, :, i + half]
            rotated[token, :, i] = a * angle.cos() - b * angle.sin()
            rotated[token, :, i + half] = b * angle.cos() + a * angle.sin()
    close(q, rotated[:, :heads], dtype)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            close(k_cache.view(-1, kv_heads, head_dim)[slot], rotated[token, heads:], dtype)
            close(v_cache.view(-1, kv_heads, head_dim)[slot], v[token], dtype)
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert (k_cache.view(12, -1)[untouched] == 9).all()
    assert (v_cache.view(12, -1)[untouched] == 9).all()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
def test_qk_norm_rope_store_keeps_the_keys_of_whole_prompts(norm: bool) -> None:
    check_rope_store_keeps_the_keys(qk_norm_rope_store, RopeCase(dtype=torch.bfloat16, device="cpu", norm=norm))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_holds_the_scaled_values_rounded_to_nearest_and_clamped(dtype: torch.dtype) -> None:
    heads, head_dim, k_scale, v_scale = 2, 16, 0.3, 2.5
    qkv = randn(5, 3 * heads * head_dim, dtype=dtype) * 300
    table = torch.cat((torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)), -1)  # turns by nothing
    slots = torch.tensor([7, -1, 0, 5, 4])
    k_cache = torch.full((2, 4, heads, head_dim), 9.0).to(torch.float8_e4m3fn)
    v_cache = k_cache.clone()
    step = make_step(table, torch.zeros(5, dtype=torch.int64), slots)
    qk_norm_rope_store(qkv, step, k_cache, v_cache, heads, k_scale=k_scale, v_scale=v_scale)

    _, k, v = qkv.double().view(5, 3, heads, head_dim).unbind(1)
    stored = slots >= 0
    assert ((k / k_scale)[stored].abs() > 448).any()
    for cache, wanted in ((k_cache, k / k_scale), (v_cache, v / v_scale)):
        found = cache.double().view(8, heads, head_dim)
        wanted = wanted[stored].clamp(-448, 448)
        # three bits of mantissa: half a step is a sixteenth at most, and 2^-10 below the smallest normal number
        torch.testing.assert_close(found[slots[stored]], wanted, rtol=2**-4, atol=2**-10)
        assert (found[[1, 2, 3, 6]] == 9).all()
