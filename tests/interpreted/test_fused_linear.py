"""The fused linears' tiles (17 rows and more) in the interpreter: all operations, tails in every dimension, splits."""

import pytest
import torch

from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.skinny import TileConfig, choose_tile_config
from tests.kernels.skinny_checks import (
    OPERATIONS,
    TOLERANCE,
    assert_equals_float64,
    assert_rows_do_not_depend_on_the_batch,
)

WHOLE = TileConfig(16, 16, 16)
SPLIT = TileConfig(16, 8, 16, split=3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_equal_float64(operation, dtype):
    bias = operation != "norm_gate_up"
    # The interpreter truncates to bfloat16 where a GPU rounds.
    tolerance = 3e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype]
    for m, n, k in [(17, 13, 40), (32, 32, 32), (20, 16, 56)]:  # whole tiles, and last ones that are not whole
        assert_equals_float64(operation, m, n, k, dtype, "cpu", WHOLE, bias, tolerance)


@pytest.mark.parametrize("operation", ["linear", "linear_add"])
def test_split_sums_equal_float64_and_leave_the_counters_ready(operation):
    for m, n, k in [(17, 13, 40), (16, 8, 48), (33, 20, 100)]:  # splits that are whole, partly and wholly past the end
        assert_equals_float64(operation, m, n, k, torch.float32, "cpu", SPLIT, bias=True)
    from nanovllm_bento.kernels.fused_linear_triton import _counters

    assert not _counters(torch.device("cpu")).any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_configurations_that_are_chosen(operation):
    assert_equals_float64(operation, 17, 70, 520, torch.float16, "cpu")


def test_a_float16_product_with_the_norm_weight_may_leave_the_range_before_it_is_normalized():
    from nanovllm_bento.kernels.skinny_triton import launch

    x = torch.full((17, 64), 2e4, dtype=torch.float16)
    norm_weight = torch.full((64,), 8.0, dtype=torch.float16)
    weight = torch.eye(16, 64, dtype=torch.float16)
    found = launch("norm_linear", x, weight, x.new_empty(17, 16), WHOLE, norm_weight, 1e-6)
    torch.testing.assert_close(found, torch.full_like(found, 8.0))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rows_result_does_not_depend_on_the_batch(operation):
    config = SPLIT if operation == "linear_add" else WHOLE
    assert_rows_do_not_depend_on_the_batch(operation, 8, 40, torch.float32, "cpu", config)


def test_every_shape_has_a_configuration_that_its_operation_allows():
    for operation in OPERATIONS:
        for rows in [17, 32, 33, 100, 256]:
            for n, k in [(1, 8), (1000, 576), (1024, 3072), (4096, 1024), (12288, 4096)]:
                config = choose_tile_config(operation, rows, n, k)
                assert config.split == 1 or not operation.startswith("norm")
                assert config.split == 1 or (config.split - 1) * config.block_k < k


def test_very_wide_models_and_cpus_are_not_supported():
    assert not skinny.supports(17, torch.bfloat16, torch.device("cpu"))
    assert skinny.supports(256, torch.bfloat16, torch.device("cuda"), 1024)
    assert skinny.supports(2, torch.bfloat16, torch.device("cuda"), 4096)
    assert not skinny.supports(3, torch.bfloat16, torch.device("cuda"), 4096)
    assert not skinny.supports(17, torch.float32, torch.device("cuda"), 1024)
    assert not skinny.supports(257, torch.bfloat16, torch.device("cuda"), 1024)
