"""The experts on a GPU at Qwen3-30B-A3B's shapes: against float32, in CUDA graphs, without a wait for the device."""

import pytest
import torch

from nanovllm_bento.kernels import moe
from nanovllm_bento.kernels.moe import FLOAT32, INVARIANT, GroupedConfig, PairConfig, PairTile, Tile
from tests.gpu.graphs import assert_replays_give
from tests.kernels.moe_checks import (
    assert_each_part_equals_its_reference,
    assert_equals_float64,
    assert_same_blocks,
    make_case,
    relative_error,
    run,
)

DEVICE = "cuda"
HIDDEN, EXPERTS, TOP_K = 2048, 128, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module", params=[768, 384], ids="inner{}".format)
def experts(request):
    """(gate_up, down) as one rank, or one of two, holds them."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def matrix(*shape):
        weight = torch.empty(*shape, device=DEVICE, dtype=torch.bfloat16)
        return weight.normal_(std=shape[-1] ** -0.5, generator=generator)

    return matrix(EXPERTS, 2 * request.param, HIDDEN), matrix(EXPERTS, HIDDEN, request.param)


def routed(num_tokens):
    logits = torch.randn(num_tokens, EXPERTS, device=DEVICE).bfloat16()
    return moe.route(logits, TOP_K, renormalize=True)


def exact(x, gate_up, down, weights, ids, start=0):
    """Expert by expert in float32; their weights are widened one by one."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up)):
        token, place = (ids == start + expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up @ down[expert].float().T
            out.index_add_(0, token, y * weights[token, place, None])
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 16, 64, 100, 256, 700, 1024, 3000])
def test_real_shapes_equal_float32(experts, num_tokens):
    x = torch.randn(num_tokens, HIDDEN, device=DEVICE).bfloat16()
    weights, ids = routed(num_tokens)
    wanted = exact(x, *experts, weights, ids)
    assert relative_error(moe.experts_mlp(x, *experts, weights, ids), wanted.double()) < 8e-3
    invariant = moe.experts_mlp(x, *experts, weights, ids, batch_invariant=True)
    assert relative_error(invariant, wanted.double()) < 8e-3
    half = [weight[64:].contiguous() for weight in experts]
    found = moe.experts_mlp(x, *half, weights, ids, expert_start=64)
    wanted = exact(x, *half, weights, ids, 64)
    assert relative_error(found, wanted.double()) < 8e-3 if wanted.any() else not found.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2), (60, 6)])
def test_routing_equals_the_reference(num_experts, top_k, dtype):
    for num_tokens in (1, 77, 8192):
        logits = torch.randn(num_tokens, num_experts, device=DEVICE).to(dtype)
        for renormalize in (True, False):
            weights, ids = moe.route(logits, top_k, renormalize=renormalize)
            wanted_weights, wanted_ids = moe.route_reference(logits, top_k, renormalize=renormalize)
            assert torch.equal(ids, wanted_ids)
            assert (weights - wanted_weights).abs().max() < 1e-6


@pytest.mark.parametrize("routing", ["random", "one", "few"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2)])
def test_sorting_equals_the_reference(num_experts, top_k, routing):
    from nanovllm_bento.kernels.moe_triton import sort_pairs

    for num_tokens in (1, 16, 300, 8192):
        ids = make_case(num_tokens, 1, 1, num_experts, top_k, torch.float32, DEVICE, routing).ids
        for start, stop in [(0, num_experts), (3, 7)]:
            for block_m in (16, 128):
                wanted = moe.sort_pairs_reference(ids, start, stop - start, block_m)
                assert_same_blocks(sort_pairs(ids, start, stop - start, block_m), wanted)


CONFIGS = [
    GroupedConfig(16, Tile(32, 128), Tile(64, 64)),
    GroupedConfig(16, Tile(64, 64, swap=True), Tile(128, 64, swap=True)),
    GroupedConfig(64, Tile(64, 64, 4, 3, 4), Tile(128, 32, 8, 3, 8)),
    GroupedConfig(128, Tile(64, 64, 8, 3, 8), Tile(128, 64, 8, 3, 8, swap=True)),
    PairConfig(PairTile(4, 512), PairTile(4, 128)),
]


@pytest.mark.parametrize("routing", ["random", "one", "few"])
@pytest.mark.parametrize("config", CONFIGS)
def test_any_shape_equals_float64(config, routing):
    """Tails in every dimension, whole tiles, several blocks of one expert."""
    for num_tokens, hidden, inner in [(1, 256, 128), (33, 200, 72), (150, 256, 128)]:
        case = make_case(num_tokens, hidden, inner, 6, 3, torch.bfloat16, DEVICE, routing)
        assert_equals_float64(case, config, 2, 5)
        if isinstance(config, GroupedConfig):
            assert_each_part_equals_its_reference(case, config, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_equal_float64(dtype):
    for num_tokens in (1, 40):
        case = make_case(num_tokens, 256, 128, 6, 3, dtype, DEVICE)
        chosen = moe.choose_config(*case.gate_up.shape, 3, num_tokens, case.x.element_size())
        assert (chosen == FLOAT32) == (dtype == torch.float32)
        assert_equals_float64(case, chosen, 2, 5)


@pytest.mark.parametrize("config", [INVARIANT, *CONFIGS[1:]])
def test_a_rows_result_does_not_depend_on_the_batch(config):
    case = make_case(90, 512, 256, 6, 3, torch.bfloat16, DEVICE)
    together = run(case, config)
    for row in (0, 17, 89):
        alone = case._replace(x=case.x[row : row + 1], weights=case.weights[row : row + 1], ids=case.ids[row : row + 1])
        assert torch.equal(run(alone, config), together[row : row + 1])


def test_batch_invariance_at_real_shapes(experts):
    x = torch.randn(600, HIDDEN, device=DEVICE).bfloat16()
    weights, ids = routed(600)
    together = moe.experts_mlp(x, *experts, weights, ids, batch_invariant=True)
    for rows in (slice(0, 1), slice(7, 40), slice(200, 600)):
        found = moe.experts_mlp(x[rows], *experts, weights[rows], ids[rows], batch_invariant=True)
        assert torch.equal(found, together[rows])


@pytest.mark.parametrize("num_tokens", [1, 16, 256])
def test_a_chain_in_a_graph_is_bit_equal_to_one_step_by_step(experts, num_tokens):
    """Six layers over one residual in place, with dependent launch: a kernel that ran ahead would change a bit.

    Neither the capture nor the launches wait for the device.
    """
    routers = [torch.randn(EXPERTS, HIDDEN, device=DEVICE, dtype=torch.bfloat16) / HIDDEN**0.5 for _ in range(6)]
    start = torch.randn(num_tokens, HIDDEN, device=DEVICE).bfloat16()
    residual = torch.empty_like(start)

    def chain(wait=False):
        torch.mul(start, 1, out=residual)
        for router in routers:
            weights, ids = moe.route(residual @ router.T, TOP_K, renormalize=True)
            if wait:
                torch.cuda.synchronize()
            x = residual * 0.5
            moe.experts_mlp(x, *experts, weights, ids, residual=residual)
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)  # also compiles
    wanted = residual.clone()
    assert wanted.isfinite().all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(residual, wanted)
    graph = assert_replays_give(chain, residual, wanted, times=50)
    start.normal_()  # another routing: nothing of the first is baked in
    graph.replay()
    replayed = residual.clone()
    chain(wait=True)
    assert torch.equal(replayed, residual) and not torch.equal(replayed, wanted)


def test_a_token_that_is_no_number_harms_no_other():
    for num_tokens, dtype in [(3, torch.bfloat16), (40, torch.bfloat16)]:
        case = make_case(num_tokens, 256, 128, 6, 3, dtype, DEVICE, "one")
        wanted = moe.experts_mlp(*case)
        x = case.x.clone()
        x[1] = float("nan")
        found = moe.experts_mlp(*case._replace(x=x))
        assert found[1].isnan().all()
        others = [row for row in range(num_tokens) if row != 1]
        assert torch.equal(found[others], wanted[others])
