"""The fused linears for 17 to 256 rows on a GPU: shapes and dtypes against float64; no races under dependent launch."""

import pytest
import torch

from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.skinny import TileConfig, choose_tile_config, supports
from tests.kernels.skinny_checks import (
    OPERATIONS,
    assert_equals_float64,
    assert_rows_do_not_depend_on_the_batch,
    make_inputs,
    relative_error,
    wanted64,
)

ROWS = [17, 33, 64, 100, 200, 256]
DTYPES = [torch.bfloat16, torch.float16]
DEVICE = "cuda"
QWEN3 = [("norm_linear", 4096, 1024), ("linear_add", 1024, 2048), ("norm_gate_up", 3072, 1024)]
QWEN3 += [("linear_add", 1024, 3072)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_batch_equals_float64(operation, dtype):
    for m in ROWS:
        assert_equals_float64(operation, m, 384, 1024, dtype, DEVICE, bias=operation != "norm_gate_up")


@pytest.mark.parametrize(("operation", "n", "k"), QWEN3)
def test_a_models_shapes_as_they_are_tuned_equal_float64(operation, n, k):
    for m in ROWS:
        assert_equals_float64(operation, m, n, k, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [17, 100])
@pytest.mark.parametrize(("n", "k"), [(67, 576), (1, 1536), (1000, 1000), (130, 8), (99, 1001), (24, 12288)])
def test_any_shape_equals_float64(n, k, m, operation):
    assert_equals_float64(operation, m, n, k, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "config",
    [
        *(TileConfig(64, 64), TileConfig(64, 16, 128, 4), TileConfig(64, 32, 128, 3), TileConfig(128, 64, 64, 3, 8)),
        *(TileConfig(32, 32), TileConfig(128, 32, 64, 5), TileConfig(64, 64, split=4), TileConfig(128, 64, split=8)),
    ],
)
def test_other_configurations_equal_float64(config, operation):
    if operation.startswith("norm"):
        config = config._replace(split=1)
    assert_equals_float64(operation, 129, 200, 1536, torch.bfloat16, DEVICE, config)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rows_result_does_not_depend_on_the_batch(operation):
    config = choose_tile_config(operation, 64, 512, 1024)
    assert_rows_do_not_depend_on_the_batch(operation, 512, 1024, torch.bfloat16, DEVICE, config)


def test_a_float16_product_with_the_norm_weight_may_leave_the_range_before_it_is_normalized():
    x = torch.full((17, 64), 2e4, dtype=torch.float16, device=DEVICE)
    norm_weight = torch.full((64,), 8.0, dtype=torch.float16, device=DEVICE)
    weight = torch.eye(16, 64, dtype=torch.float16, device=DEVICE)
    found = skinny.norm_linear(x, norm_weight, 1e-6, weight, None)
    torch.testing.assert_close(found, torch.full_like(found, 8.0))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_dispatch_equals_float64(operation):
    inputs = make_inputs(operation, 40, 256, 1024, torch.bfloat16, DEVICE, bias=operation != "norm_gate_up")
    wanted = wanted64(inputs)
    x, weight, bias, norm = inputs["x"], inputs["weight"], inputs["bias"], (inputs["norm_weight"], inputs["eps"])
    assert supports(40, x.dtype, x.device, 1024)
    match operation:
        case "linear":
            found = skinny.linear(x, weight, bias)
        case "linear_add":
            found = skinny.linear_add(x, weight, bias, inputs["out"])
            assert found is inputs["out"]
        case "norm_linear":
            found = skinny.norm_linear(x, *norm, weight, bias)
        case _:
            found = skinny.norm_gate_up(x, *norm, weight)
    assert found.dtype == x.dtype and relative_error(found, wanted) < 1e-2


@pytest.mark.parametrize("m", [17, 64, 100, 256])
def test_a_chain_in_a_graph_with_dependent_launch_is_bit_equal_to_one_without(m):
    """Layers whose residual is rewritten in place: a kernel ahead of its input, or of a split, would change a bit."""
    from nanovllm_bento.kernels.skinny_triton import launch

    hidden, qkv, heads, mlp, layers = 1024, 4096, 2048, 3072, 8
    shapes = [(qkv, hidden), (hidden, heads), (2 * mlp, hidden), (hidden, mlp)]
    weights = [[torch.randn(n, k, device=DEVICE).bfloat16() / k**0.5 for n, k in shapes] for _ in range(layers)]
    norm = torch.rand(hidden, device=DEVICE).bfloat16() + 0.5
    start = torch.randn(m, hidden, device=DEVICE).bfloat16()
    residual = torch.empty_like(start)

    def chain(pdl: bool) -> None:
        torch.mul(start, 1, out=residual)  # a kernel, where copy_ would be a copy node
        # Buffers that all layers share: writing one too early harms a kernel that still reads it.
        a, b = residual.new_empty(m, qkv), residual.new_empty(m, mlp)
        for w_qkv, w_o, w_gate_up, w_down in weights:
            launch("norm_linear", residual, w_qkv, a, norm_weight=norm, eps=1e-6, pdl=pdl)
            launch("linear_add", a[:, :heads], w_o, residual, pdl=pdl)
            launch("norm_gate_up", residual, w_gate_up, b, norm_weight=norm, eps=1e-6, pdl=pdl)
            launch("linear_add", b, w_down, residual, pdl=pdl)

    chain(pdl=False)
    wanted = residual.clone()
    assert wanted.isfinite().all()
    pdl = use_pdl(torch.device(DEVICE, 0))
    chain(pdl)  # compiles, and makes the splits' counters
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(pdl)
    differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(200):
        residual.fill_(float("nan"))
        graph.replay()
        differences += (residual != wanted).sum()
    assert differences.item() == 0
