"""The kernel of split_k.py in the interpreter: its operations, rows that fill no tile, every way to cut."""

import pytest
import torch

from nanovllm_bento.kernels import skinny, split_k
from nanovllm_bento.kernels.products import choose_head
from nanovllm_bento.kernels.split_k import Config
from tests.kernels import split_k_checks as checks
from tests.kernels.skinny_checks import make_inputs, relative_error, wanted64

WHOLE = Config(32, 16, 16, 1, 3, 4, True)
SHARED = Config(16, 32, 16, 2, 3, 4, True)
DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies no bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_each_operation_equals_float64(operation, dtype):
    for m in (17, 32, 45):  # less than a tile, one, and one with a tail
        checks.check_equals_float64(operation, m, 32, 96, dtype, "cpu", WHOLE, bias=operation != "gate_up")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_the_parts_equals_float64(dtype):
    checks.check_equals_float64("linear_parts", 19, 64, 96, dtype, "cpu", SHARED, bias=True)


def test_each_part_is_of_its_share_and_the_first_has_the_bias():
    checks.check_each_part_is_of_its_share(19, 64, 96, torch.float32, "cpu", SHARED)


def test_a_shape_without_a_measured_configuration_is_left_to_the_plain_product():
    for operation in checks.OPERATIONS:
        inputs = make_inputs(operation, 20, 24, 40, torch.float32, "cpu", bias=operation != "gate_up")
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        run = getattr(split_k, operation)
        found = run(x, weight) if bias is None else run(x, weight, bias)
        assert found.shape == (20, 24)
        assert relative_error(found, wanted64(inputs)) < 1e-5


@pytest.mark.parametrize("config", [WHOLE, None])
def test_a_product_is_written_where_it_is_wanted(config):
    inputs = make_inputs("linear", 20, 32, 96, torch.float32, "cpu", bias=False)
    buffer = torch.full((30, 32), float("nan"))
    found = split_k.linear(inputs["x"], inputs["weight"], None, config=config, out=buffer[:20])
    assert found.data_ptr() == buffer.data_ptr()
    assert relative_error(buffer[:20], wanted64(inputs)) < 1e-5
    assert buffer[20:].isnan().all()


def test_an_lm_head_is_computed_by_what_was_measured():
    cuda, shape = torch.device("cuda"), (151936, 1024)
    assert choose_head(1, *shape, torch.bfloat16, cuda) is skinny
    assert choose_head(64, *shape, torch.bfloat16, cuda) is split_k
    for rows in (3, 16, 40, 65, 256, 300):
        assert choose_head(rows, *shape, torch.bfloat16, cuda) is None
    assert choose_head(64, 151936, 2048, torch.bfloat16, cuda) is None
    assert choose_head(1, *shape, torch.bfloat16, torch.device("cpu")) is None


def test_every_tuned_configuration_cuts_its_shape_without_rest():
    for (operation, rows, n, k), config in split_k.TUNED.items():
        assert split_k.suits(config, n, k), (operation, n, k)
        assert split_k.MIN_ROWS <= rows <= split_k.MAX_ROWS and rows in split_k.ROWS
        assert config.splits == 1 or operation == "linear_parts"


@pytest.mark.parametrize(("rows", "supported"), [(16, False), (17, True), (256, True), (257, False)])
def test_which_steps_are_supported(rows, supported):
    cuda = torch.device("cuda")
    assert split_k.supports(rows, torch.bfloat16, cuda) == supported
    assert not split_k.supports(rows, torch.float32, cuda)
    assert not split_k.supports(rows, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("key", split_k.TUNED)
def test_a_tuned_configuration_cuts_its_shape_without_rest(key):
    operation, rows, n, k = key
    assert split_k.suits(split_k.TUNED[key], n, k)
    assert rows in split_k.ROWS
    assert operation == "linear_parts" or split_k.TUNED[key].splits == 1


def test_rows_are_rounded_up_to_those_that_were_measured():
    choose = split_k.choose_config
    shape = ("linear_parts", 1024, 3072)
    operation, n, k = shape
    assert choose(operation, 41, n, k) is choose(operation, 64, n, k) is split_k.TUNED[operation, 64, n, k]
    assert choose(operation, 17, n, k) is split_k.TUNED[operation, 32, n, k]
    assert choose(operation, 64, n + 1, k) is None
    for rows in (65, 129, 257):
        assert choose(operation, rows, n, k) is None, "few of a tile's rows would be filled"
