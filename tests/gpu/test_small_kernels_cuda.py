"""norm, activation and rope_store as compiled Triton kernels: values, CUDA graphs, dependent launch, large tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.norm import add_rms_norm, rms_norm, sum_add_rms_norm
from nanovllm_bento.kernels.rope_store import make_step, qk_norm_rope_store, qk_norm_rope_store_reference
from tests.kernels import small_kernel_checks as checks
from tests.kernels.small_kernel_checks import FP8, RopeCase

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``run``, which has compiled its kernels in a call before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def needs_memory(num_bytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of GPU memory")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 40, 1000, 1024, 5120, 16384])
@pytest.mark.parametrize("rows", [1, 300])
def test_rms_norm(rows, n, dtype):
    checks.check_rms_norm(rms_norm, rows, n, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 24, 40, 1000, 1024, 5120, 16384])
@pytest.mark.parametrize("rows", [1, 300])
def test_add_rms_norm_overwrites_both_arguments(rows, n, dtype):
    checks.check_add_rms_norm(add_rms_norm, rows, n, dtype, "cuda", truncates=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 24, 40, 1000, 1024, 5120, 16384])
@pytest.mark.parametrize("rows", [1, 300])
def test_the_norm_of_a_sum_in_parts(rows, n, dtype):
    checks.check_sum_add_rms_norm(sum_add_rms_norm, rows, n, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_rounds_before_the_weight(dtype):
    checks.check_norm_rounds_as_the_reference(rms_norm, 1024, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1024, 2560, 8192])
def test_norms_do_not_depend_on_the_batch(n, dtype):
    checks.check_norms_do_not_depend_on_the_batch(rms_norm, add_rms_norm, n, dtype, "cuda", rows=5000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 40, 1100, 3072, 14336])
@pytest.mark.parametrize("rows", [1, 300])
def test_silu_and_mul(rows, n, dtype):
    checks.check_silu_and_mul(silu_and_mul, rows, n, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_silu_rounds_before_the_product(dtype):
    checks.check_silu_rounds_as_the_reference(silu_and_mul, dtype, "cuda")


def test_no_rows_give_no_rows():
    empty = torch.empty(0, 8, device="cuda")
    assert rms_norm(empty, torch.ones(8, device="cuda"), 0.1).shape == (0, 8)
    assert silu_and_mul(empty).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", [3, 400])
def test_rope_store(num_tokens, head_dim, norm, dtype):
    case = RopeCase(dtype=dtype, device="cuda", head_dim=head_dim, norm=norm, num_tokens=num_tokens)
    checks.check_rope_store(qk_norm_rope_store, case)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (5, 5), (14, 2), (16, 8), (40, 10), (32, 8)])
def test_rope_store_with_any_heads(heads, kv_heads):
    case = RopeCase(dtype=torch.bfloat16, device="cuda", head_dim=128, heads=heads, kv_heads=kv_heads, num_tokens=40)
    checks.check_rope_store(qk_norm_rope_store, case)


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (16, 8), (32, 8)])
def test_rope_store_keeps_the_keys_of_whole_prompts(heads, kv_heads):
    case = RopeCase(dtype=torch.bfloat16, device="cuda", head_dim=128, heads=heads, kv_heads=kv_heads, num_tokens=400)
    checks.check_rope_store_keeps_the_keys(qk_norm_rope_store, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["same_cache", "fp8_cache"])
def test_rope_store_rounds_as_the_reference(cache_dtype, dtype):
    case = RopeCase(
        dtype=dtype,
        device="cuda",
        head_dim=128,
        num_tokens=50,
        cache_dtype=cache_dtype,
        k_scale=0.013,  # of these, a part is clamped
        v_scale=0.3,
    )
    checks.check_rope_rounds_as_the_reference(qk_norm_rope_store, case)


def test_rope_store_does_not_depend_on_the_batch():
    case = RopeCase(dtype=torch.bfloat16, device="cuda", head_dim=128, heads=16, kv_heads=8, num_tokens=3000)
    checks.check_rope_store_does_not_depend_on_the_batch(qk_norm_rope_store, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache(dtype):
    checks.check_fp8_cache_of_representable_values(qk_norm_rope_store, dtype, "cuda")


def test_a_nan_stays_one_in_an_fp8_cache():
    case = RopeCase(dtype=torch.bfloat16, device="cuda", cache_dtype=FP8, num_tokens=2)
    case.k_cache.zero_()
    case.v_cache.zero_()
    case.slots = torch.tensor([1, 6], device="cuda")
    case.qkv[1] = torch.nan
    case.run(qk_norm_rope_store)
    for cache in (case.k_cache, case.v_cache):
        is_nan = cache.view(-1, case.kv_heads * case.head_dim).float().isnan()
        assert is_nan[6].all() and not is_nan[[0, 1, 2, 3, 4, 5, 7]].any()


def test_norms_in_a_cuda_graph_follow_their_inputs():
    x, residual = (torch.randn(9, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    graph = captured(lambda: (out.copy_(rms_norm(x, weight, 1e-5)), add_rms_norm(x, residual, weight, 1e-5)))
    for _ in range(3):
        new_x, new_residual = torch.randn_like(x), torch.randn_like(x)
        x.copy_(new_x)
        residual.copy_(new_residual)
        out.fill_(torch.nan)
        graph.replay()
        checks.close(out, checks.norm64(new_x, weight), torch.bfloat16)
        assert torch.equal(residual, new_x + new_residual)
        checks.close(x, checks.norm64(residual, weight), torch.bfloat16)


def test_silu_and_mul_in_a_cuda_graph_follows_its_input():
    x = torch.randn(9, 6144, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(9, 3072, device="cuda", dtype=torch.bfloat16)
    graph = captured(lambda: out.copy_(silu_and_mul(x)))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, silu_and_mul(x))
        gate, up = x.double().chunk(2, -1)
        checks.close(out, gate / (1 + (-gate).exp()) * up, torch.bfloat16)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_rope_store_in_a_cuda_graph_follows_its_inputs(cache_dtype):
    """New positions and slots in the same tensors are what a replay uses: the step object holds no copy."""
    case = RopeCase(dtype=torch.bfloat16, device="cuda", head_dim=128, cache_dtype=cache_dtype, num_tokens=9)
    out = torch.empty(9, case.heads, 128, device="cuda", dtype=torch.bfloat16)
    graph = captured(lambda: out.copy_(case.run(qk_norm_rope_store)))
    for _ in range(3):
        new = RopeCase(dtype=torch.bfloat16, device="cuda", head_dim=128, cache_dtype=cache_dtype, num_tokens=9)
        for name in ("qkv", "positions", "slots", "k_cache", "v_cache"):  # the caches: poison
            getattr(case, name).copy_(getattr(new, name))
        out.fill_(torch.nan)
        graph.replay()
        reference = case.on_cpu()
        reference.k_cache, reference.v_cache = new.k_cache.cpu(), new.v_cache.cpu()
        checks.same_roundings(out, reference.run(qk_norm_rope_store_reference))
        for cache, wanted in ((case.k_cache, reference.k_cache), (case.v_cache, reference.v_cache)):
            checks.same_roundings(case.stored(cache).float(), reference.stored(wanted).float())


def chain(x: Tensor, weight: Tensor, step_of: Callable[[int], tuple], steps: int) -> Tensor:
    """Each kernel reads what the one before has just written, and memory is reused at once.

    x: [rows, 1024] -> [rows / 4**steps, 1024]: q and then silu_and_mul halve the elements.
    """
    for _ in range(steps):
        step, k_cache, v_cache = step_of(x.shape[0])
        x = qk_norm_rope_store(x, step, k_cache, v_cache, 8, None).view(-1, 1024)  # 8 + 2 * 4 heads of 64
        residual = rms_norm(x, weight, 1e-5)
        x, residual = add_rms_norm(x, residual, weight, 1e-5)
        x, residual = add_rms_norm(x, residual, weight, 1e-5)
        x = silu_and_mul(x).view(-1, 1024)
    return x


@pytest.mark.parametrize("rows", [64, 16384])
def test_dependent_launch_changes_no_bit(rows, monkeypatch):
    steps = 3
    weight = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(64, 64, device="cuda")
    shared = {}
    for n in [rows // 4**i for i in range(steps)]:
        slots = torch.randperm(n, device="cuda")
        cache = torch.zeros(n // 4 + 1, 4, 4, 64, device="cuda", dtype=torch.bfloat16)
        step = make_step(table, torch.randint(64, (n,), device="cuda"), slots)
        shared[n] = (step, cache, cache.clone())

    def caches() -> list[Tensor]:
        return [cache.clone() for _, *pair in shared.values() for cache in pair]

    with monkeypatch.context() as patch:
        for name in ("norm_triton", "activation_triton", "rope_store_triton"):
            patch.setattr(f"nanovllm_bento.kernels.{name}.use_pdl", lambda device: False)
        wanted = chain(x, weight, shared.__getitem__, steps)
        torch.cuda.synchronize()
    wanted_caches = caches()
    assert wanted.isfinite().all() and all(cache.any() for cache in wanted_caches)

    def run() -> None:
        found.copy_(chain(x, weight, shared.__getitem__, steps))

    found = torch.empty_like(wanted)
    graph = captured(run)
    for again in [run, graph.replay] * 10:
        found.fill_(torch.nan)
        for _, k_cache, v_cache in shared.values():
            k_cache.fill_(torch.nan)
            v_cache.fill_(torch.nan)
            k_cache.view(-1, 256)[k_cache.shape[0] * 4 - 4 :] = 0  # the last block is nobody's
            v_cache.view(-1, 256)[v_cache.shape[0] * 4 - 4 :] = 0
        again()
        assert torch.equal(found, wanted)
        assert all(torch.equal(cache, kept) for cache, kept in zip(caches(), wanted_caches, strict=True))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_rope_store_in_a_cache_of_more_than_2_31_elements(cache_dtype):
    heads, kv_heads, head_dim, block_size = 16, 8, 128, 16
    num_blocks = 2**31 // (block_size * kv_heads * head_dim) + 10
    needs_memory(10 * 2**30)
    case = RopeCase(
        dtype=torch.bfloat16, device="cuda", heads=heads, kv_heads=kv_heads, head_dim=head_dim, num_tokens=4
    )
    shape = (num_blocks, block_size, kv_heads, head_dim)
    case.k_cache = torch.zeros(shape, device="cuda", dtype=cache_dtype)
    case.v_cache = torch.zeros(shape, device="cuda", dtype=cache_dtype)
    beyond = 2**31 // (kv_heads * head_dim)
    case.slots = torch.tensor([num_blocks * block_size - 1, 3, -1, beyond + 5], device="cuda")
    case.run(qk_norm_rope_store)
    stored = case.slots[case.slots >= 0]
    _, wanted_k, wanted_v = (part[case.slots >= 0] for part in case.wanted())
    for cache, wanted in ((case.k_cache, wanted_k), (case.v_cache, wanted_v)):
        integers = cache.view(torch.uint8 if cache_dtype == FP8 else torch.int16).view(-1, kv_heads, head_dim)
        found = integers[stored].view(cache_dtype).double()
        assert (found - wanted).norm() <= (4e-2 if cache_dtype == FP8 else 1e-2) * wanted.norm()
        integers[stored] = 0
        assert not integers.any()


def test_rows_beyond_2_31_elements():
    n = 16384
    rows = 2**31 // n + 3
    needs_memory(15 * 2**30)
    x = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, n, device="cuda", dtype=torch.bfloat16)
    last = x[-5:].clone()
    weight = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    normed = rms_norm(x, weight, 1e-5)
    assert torch.equal(normed[-5:], rms_norm(last, weight, 1e-5)) and not normed[:-5].any()
    assert torch.equal(silu_and_mul(x)[-5:], silu_and_mul(last))
    _, total = add_rms_norm(x, normed, weight, 1e-5)
    assert torch.equal(total[-5:], last + rms_norm(last, weight, 1e-5)) and not total[:-5].any()
    del normed, total
