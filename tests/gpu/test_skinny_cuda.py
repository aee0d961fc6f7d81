"""The skinny linears on a GPU: operations, dtypes and batches against float64; no races under dependent launch."""

import pytest
import torch

from nanovllm_bento.kernels import skinny
from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.skinny import Config, choose_config, is_gated, supports
from tests.gpu.graphs import assert_replays_give
from tests.kernels.skinny_checks import (
    OPERATIONS,
    assert_equals_float64,
    assert_rows_do_not_depend_on_the_batch,
    make_inputs,
    relative_error,
    wanted64,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_batch_equals_float64(operation, dtype):
    for m in [1, 2, 3, 4, 5, 8, 9, 16] if dtype == torch.bfloat16 else [1, 3, 16]:
        assert_equals_float64(operation, m, 384, 1024, dtype, DEVICE, bias=not is_gated(operation))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [1, 2, 4, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(67, 576), (1, 1536), (1000, 1000), (130, 8), (96, 3072), (40, 4096), (24, 12288)]
)
def test_any_shape_equals_float64(n, k, m, operation):
    assert_equals_float64(operation, m, n, k, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("block_m", [4, 8, 16])
@pytest.mark.parametrize("block_n", [8, 16, 32])
def test_tensor_cores_on_narrow_blocks_equal_float64(block_n, block_m, operation):
    for split, prefetch in [(4, 2), (8, 1)]:
        config = Config(block_n, 64, prefetch, split, split, block_m)
        assert_equals_float64(operation, block_m - 1, 100, 1536, torch.bfloat16, DEVICE, config)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [1, 4])
def test_a_rows_result_does_not_depend_on_the_batch(m, operation):
    config = choose_config(operation, m, 512, 1024, 2)
    assert_rows_do_not_depend_on_the_batch(operation, 512, 1024, torch.bfloat16, DEVICE, config)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_dispatch_equals_float64(operation):
    inputs = make_inputs(operation, 4, 256, 1024, torch.bfloat16, DEVICE, bias=not is_gated(operation))
    wanted = wanted64(inputs)
    x, weight, bias, norm = inputs["x"], inputs["weight"], inputs["bias"], (inputs["norm_weight"], inputs["eps"])
    assert supports(4, x.dtype, x.device)
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
    assert found.dtype == x.dtype and relative_error(found, wanted) < 1e-2


@pytest.mark.parametrize("m", [1, 2, 8])
def test_a_chain_in_a_graph_with_dependent_launch_is_bit_equal_to_one_without(m):
    """Twelve layers whose residual is rewritten in place: a kernel that ran ahead of its input would change a bit."""
    from nanovllm_bento.kernels.skinny_triton import launch

    hidden, qkv, heads, mlp, layers = 1024, 4096, 2048, 3072, 12
    weights = []
    for _ in range(layers):
        shapes = [(qkv, hidden), (hidden, heads), (2 * mlp, hidden), (hidden, mlp)]
        weights.append([torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5 for n, k in shapes])
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
    chain(pdl)  # compiles
    assert_replays_give(lambda: chain(pdl), residual, wanted)
