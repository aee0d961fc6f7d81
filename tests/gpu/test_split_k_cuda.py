"""split_k's kernel on a GPU: operations, dtypes and tuned shapes against float64; no races under dependent launch."""

import pytest
import torch
from torch import Tensor

from nanovllm_bento.kernels import split_k
from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.norm import sum_add_rms_norm
from nanovllm_bento.kernels.split_k import Config
from tests.gpu.graphs import assert_replays_give
from tests.kernels import split_k_checks as checks

DEVICE = "cuda"
WHOLE, SHARED = Config(64, 32, 64, 1, 4, 4, True), Config(64, 32, 64, 4, 4, 4, True)
TALL = Config(128, 32, 64, 2, 4, 8, False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", checks.OPERATIONS)
def test_each_operation_equals_float64(operation, dtype):
    for m in (17, 64, 100):
        checks.check_equals_float64(operation, m, 96, 512, dtype, DEVICE, WHOLE, bias=operation != "gate_up")


@pytest.mark.parametrize("config", [SHARED, TALL])
def test_each_part_is_of_its_share_and_the_first_has_the_bias(config):
    for m in (17, 64, 128):
        checks.check_each_part_is_of_its_share(m, 160, 1024, torch.bfloat16, DEVICE, config)


@pytest.mark.parametrize("entry", list(split_k.TUNED), ids=str)
def test_every_tuned_configuration_equals_float64(entry):
    operation, rows, n, k = entry
    for m in (rows // 2 + 1, rows):
        checks.check_equals_float64(operation, m, n, k, torch.bfloat16, DEVICE, split_k.TUNED[entry])


@pytest.mark.parametrize("m", [20, 64, 128, 256])
def test_a_chain_in_a_graph_with_dependent_launch_is_bit_equal_to_one_without(m):
    """Twelve layers whose residual is rewritten in place: a kernel that ran ahead of its input would change a bit."""
    from nanovllm_bento.kernels.split_k_triton import launch

    hidden, qkv, heads, mlp, layers = 1024, 4096, 2048, 3072, 12
    entries = [("linear", qkv, hidden), ("linear_parts", hidden, heads)]
    entries += [("gate_up", mlp, hidden), ("linear_parts", hidden, mlp)]
    layer = [(operation, split_k.choose_config(operation, m, n, k) or WHOLE, n, k) for operation, n, k in entries]
    weights = []
    for _ in range(layers):
        shapes = [(2 * n if operation == "gate_up" else n, k) for operation, _, n, k in layer]
        weights.append([torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in shapes])
    norm = torch.rand(hidden, device=DEVICE).bfloat16() + 0.5
    start = torch.randn(m, hidden, device=DEVICE).bfloat16()
    residual = torch.empty_like(start)
    # Buffers that all layers share: writing one too early harms a kernel that still reads it.
    buffers = []
    for operation, config, n, _ in layer:
        dtype = torch.float32 if operation == "linear_parts" else start.dtype
        buffers.append(start.new_empty(config.splits, m, n, dtype=dtype))
    q, o, gated, down = buffers

    def run(i: int, x: Tensor, weight: Tensor, pdl: bool) -> None:
        operation, config, _, _ = layer[i]
        launch(operation, x, weight, buffers[i], config, pdl=pdl)

    def add_norm(parts: Tensor) -> Tensor:
        return sum_add_rms_norm(parts, residual, norm, 1e-6)[0]

    def chain(pdl: bool) -> None:
        torch.mul(start, 1, out=residual)  # a kernel, where copy_ would be a copy node
        down.zero_()
        for w_qkv, w_o, w_gate_up, w_down in weights:
            run(0, add_norm(down), w_qkv, pdl)
            run(1, q[0, :, :heads], w_o, pdl)
            run(2, add_norm(o), w_gate_up, pdl)
            run(3, gated[0], w_down, pdl)

    chain(pdl=False)
    wanted = residual.clone()
    assert wanted.isfinite().all()
    pdl = use_pdl(torch.device(DEVICE, 0))
    chain(pdl)  # compiles
    assert_replays_give(lambda: chain(pdl), residual, wanted)
