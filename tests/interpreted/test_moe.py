"""The experts' kernels in the interpreter: each against its reference and all of them against float64, tiny shapes."""

import pytest
import torch

from nanovllm_bento.kernels import moe, moe_triton
from nanovllm_bento.kernels.moe import GroupedConfig, PairConfig, PairTile, Tile
from tests.kernels.moe_checks import (
    assert_each_part_equals_its_reference,
    assert_equals_float64,
    assert_same_blocks,
    make_case,
    run,
)

GROUPED = [
    GroupedConfig(16, Tile(16, 16), Tile(16, 32)),
    GroupedConfig(16, Tile(16, 32, group_m=4, swap=True), Tile(32, 16, group_m=3, swap=True)),
]
PAIRS = [PairConfig(PairTile(16, 32), PairTile(32, 16)), PairConfig(PairTile(8, 64), PairTile(16, 32))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 1), (8, 3), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_routing_equals_the_reference(dtype, num_experts, top_k, renormalize):
    logits = (torch.randn(7, num_experts) * 2).round(decimals=1).to(dtype)  # with equals
    weights, ids = moe_triton.route(logits, top_k, renormalize)
    wanted_weights, wanted_ids = moe.route_reference(logits, top_k, renormalize=renormalize)
    assert torch.equal(ids, wanted_ids)
    assert (weights - wanted_weights).abs().max() < 1e-6


def test_a_nan_among_the_logits_is_not_hidden():
    logits = torch.randn(3, 8)
    logits[1, 3] = float("nan")
    logits[2] = float("nan")
    weights, ids = moe_triton.route(logits, 2, True)
    assert weights[1:].isnan().all() and weights[0].isfinite().all()
    assert ((ids >= 0) & (ids < 8)).all()


@pytest.mark.parametrize("routing", ["random", "one", "few"])
def test_sorting_equals_the_reference(routing):
    for num_tokens, num_experts, top_k in [(1, 6, 2), (400, 4, 3)]:  # the last in more than one chunk
        ids = make_case(num_tokens, 1, 1, num_experts, top_k, torch.float32, "cpu", routing).ids
        for start, stop in [(0, num_experts), (1, 3)]:
            for block_m in (16, 64):
                found = moe_triton.sort_pairs(ids, start, stop - start, block_m)
                assert_same_blocks(found, moe.sort_pairs_reference(ids, start, stop - start, block_m))


@pytest.mark.parametrize("routing", ["random", "one", "few"])
@pytest.mark.parametrize("config", GROUPED)
def test_each_part_equals_its_reference(config, routing):
    """40 columns and 40 or 24 deep: tails in every dimension; 30 tokens to one expert: more than one block."""
    case = make_case(30, 40, 24, 5, 3, torch.float32, "cpu", routing)
    assert_each_part_equals_its_reference(case, config, 1, 4)


@pytest.mark.parametrize("routing", ["random", "few"])
@pytest.mark.parametrize("config", GROUPED + PAIRS)
def test_the_experts_equal_float64(config, routing):
    assert_equals_float64(make_case(1, 40, 24, 5, 2, torch.float32, "cpu", routing), config)
    assert_equals_float64(make_case(4, 40, 24, 5, 3, torch.float32, "cpu", routing), config, 1, 4)


@pytest.mark.parametrize("config", [*GROUPED[:1], *PAIRS[:1]])
def test_whole_tiles_and_float16_equal_float64(config):
    assert_equals_float64(make_case(5, 64, 32, 4, 2, torch.float16, "cpu"), config)


@pytest.mark.parametrize("num_tokens", [1, 3, 6])
def test_the_configurations_that_are_chosen(num_tokens):
    case = make_case(num_tokens, 48, 24, 4, 2, torch.float16, "cpu")
    assert_equals_float64(case, moe.choose_config(*case.gate_up.shape, 2, num_tokens, 2))


@pytest.mark.parametrize("config", [*GROUPED, *PAIRS[:1]])
def test_a_rows_result_does_not_depend_on_the_batch(config):
    case = make_case(4, 24, 16, 5, 2, torch.float32, "cpu")
    together = run(case, config)
    for row in range(4):
        alone = case._replace(x=case.x[row : row + 1], weights=case.weights[row : row + 1], ids=case.ids[row : row + 1])
        assert torch.equal(run(alone, config), together[row : row + 1])


def test_a_token_that_is_no_number_harms_no_other():
    case = make_case(6, 24, 16, 5, 3, torch.float32, "cpu", "one")
    for config in [GROUPED[0], PAIRS[0]]:
        wanted = run(case, config)
        x, weights = case.x.clone(), case.weights.clone()
        x[2] = weights[3] = float("nan")
        found = run(case._replace(x=x, weights=weights), config)
        assert found[2:4].isnan().all()
        assert torch.equal(found[[0, 1, 4, 5]], wanted[[0, 1, 4, 5]])
