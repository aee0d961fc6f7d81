"""The skinny linears' kernels in the interpreter: all operations, tails in every dimension, both kernels."""

import pytest
import torch

from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.skinny import Config, is_gated
from tests.kernels.skinny_checks import (
    OPERATIONS,
    TOLERANCE,
    assert_equals_float64,
    assert_rows_do_not_depend_on_the_batch,
    make_inputs,
    relative_error,
    wanted64,
)

# 3 tiles of 16, 16 and 8 columns; the second configuration of each asks for its last tiles only after the wait.
VECTOR = [Config(4, 16, 3), Config(8, 16, 1)]
MATRIX = [Config(16, 16, 2, num_warps=2, split=2), Config(8, 8, 1, num_warps=2, split=2)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("key", skinny.TUNED)
def test_a_tuned_configuration_fits_its_shape(key):
    _, rows, _, k = key
    config = skinny.TUNED[key]
    width = config.block_k * max(1, config.split)
    assert config.prefetch <= -(-k // width)
    if config.split:
        assert config.block_m >= rows, "rows would be left unwritten"
        assert config.num_warps == config.split, "a warp a slice"
    else:
        assert rows <= 4, "a vector kernel computes each row by itself"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("config", VECTOR + MATRIX)
def test_each_kernel_equals_float64(config, operation, dtype):
    bias = not is_gated(operation)
    # The interpreter truncates to bfloat16 where a GPU rounds, up to three times in a row.
    tolerance = 3e-2 if dtype == torch.bfloat16 else TOLERANCE[dtype]
    for m, n, k in [(1, 8, 40), (3, 13, 40)]:  # a whole block or two, and a last one that is not whole
        assert_equals_float64(operation, m, n, k, dtype, "cpu", config, bias, tolerance)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("config", VECTOR[:1] + MATRIX[:1])
def test_sixteen_rows(config, operation):
    assert_equals_float64(operation, 16, 16, 32, torch.float32, "cpu", config)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_configurations_that_are_chosen(m, operation):
    assert_equals_float64(operation, m, 33, 576, torch.float16, "cpu")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("config", VECTOR[:1] + MATRIX[:1])
def test_a_rows_result_does_not_depend_on_the_batch(config, operation):
    assert_rows_do_not_depend_on_the_batch(operation, 8, 40, torch.float32, "cpu", config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_equal_float64(dtype):
    for operation in OPERATIONS:
        inputs = make_inputs(operation, 3, 12, 40, dtype, "cpu", bias=not is_gated(operation))
        wanted = wanted64(inputs)
        x, weight, bias, norm = inputs["x"], inputs["weight"], inputs["bias"], (inputs["norm_weight"], inputs["eps"])
        match operation:
            case "linear":
                found = skinny.linear(x, weight, bias)
            case "linear_add":
                found = skinny.linear_add(x, weight, bias, inputs["out"])
                assert found is inputs["out"]
            case "norm_linear":
                found = skinny.norm_linear(x, *norm, weight, bias)
            case "gate_up":
                found = skinny.gate_up(x, weight)
            case _:
                found = skinny.norm_gate_up(x, *norm, weight)
        assert found.dtype == dtype and relative_error(found, wanted) < TOLERANCE[dtype]


def test_a_cpu_is_not_supported():
    assert not skinny.supports(1, torch.bfloat16, torch.device("cpu"))
