"""norm, activation and rope_store in Triton's interpreter. It truncates where it converts to bfloat16."""

import pytest
import torch

from nanovllm_bento.kernels.activation_triton import silu_and_mul
from nanovllm_bento.kernels.norm_triton import add_rms_norm, rms_norm, sum_add_rms_norm
from nanovllm_bento.kernels.rope_store_triton import qk_norm_rope_store
from tests.kernels import small_kernel_checks as checks

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; infinity is right there
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 40, 1000, 2048])
def test_rms_norm(n, dtype):
    checks.check_rms_norm(rms_norm, 3, n, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [24, 1000])
def test_add_rms_norm_overwrites_both_arguments(n, dtype):
    checks.check_add_rms_norm(add_rms_norm, 3, n, dtype, "cpu", truncates=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [24, 1000])
def test_the_norm_of_a_sum_in_parts(n, dtype):
    checks.check_sum_add_rms_norm(sum_add_rms_norm, 3, n, dtype, "cpu")


def test_norm_rounds_before_the_weight():
    checks.check_norm_rounds_as_the_reference(rms_norm, 512, torch.float16, "cpu")


def test_norms_do_not_depend_on_the_batch():
    checks.check_norms_do_not_depend_on_the_batch(rms_norm, add_rms_norm, 300, torch.float32, "cpu", rows=7)


def test_leading_dimensions_are_kept():
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, 0.1), rms_norm(x.view(6, 8), weight, 0.1).view(2, 3, 8))
    x = torch.randn(2, 3, 8)
    assert torch.equal(silu_and_mul(x), silu_and_mul(x.view(6, 8)).view(2, 3, 4))


def test_no_rows_give_no_rows():
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 0.1).shape == (0, 8)
    assert silu_and_mul(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 40, 1024, 1100])
def test_silu_and_mul(n, dtype):
    checks.check_silu_and_mul(silu_and_mul, 3, n, dtype, "cpu")


def test_silu_rounds_before_the_product():
    checks.check_silu_rounds_as_the_reference(silu_and_mul, torch.float16, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rope_store(head_dim, norm, dtype):
    checks.check_rope_store(
        qk_norm_rope_store, checks.RopeCase(dtype=dtype, device="cpu", head_dim=head_dim, norm=norm)
    )


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (5, 5), (12, 3)])
@pytest.mark.parametrize("heads_per_program", [1, 2, 4])
def test_rope_store_with_any_heads_in_any_groups(heads_per_program, heads, kv_heads):
    case = checks.RopeCase(dtype=torch.float32, device="cpu", heads=heads, kv_heads=kv_heads)
    checks.check_rope_store(qk_norm_rope_store, case, heads_per_program=heads_per_program)


@pytest.mark.parametrize("heads, kv_heads, norm", [(4, 2, True), (3, 3, False), (12, 3, True)])
def test_rope_store_keeps_the_keys_of_whole_prompts(heads, kv_heads, norm):
    case = checks.RopeCase(dtype=torch.float16, device="cpu", heads=heads, kv_heads=kv_heads, head_dim=80, norm=norm)
    checks.check_rope_store_keeps_the_keys(qk_norm_rope_store, case)


def test_rope_store_rounds_as_the_reference():
    case = checks.RopeCase(dtype=torch.float16, device="cpu", num_tokens=12)
    checks.check_rope_rounds_as_the_reference(qk_norm_rope_store, case)


def test_rope_store_does_not_depend_on_the_batch():
    case = checks.RopeCase(dtype=torch.float32, device="cpu", num_tokens=7)
    checks.check_rope_store_does_not_depend_on_the_batch(qk_norm_rope_store, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_fp8_cache(dtype):
    checks.check_fp8_cache_of_representable_values(qk_norm_rope_store, dtype, "cpu")
