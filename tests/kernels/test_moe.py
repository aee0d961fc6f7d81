"""The experts' PyTorch references, which CPUs run, against a loop over tokens in float64; the choice of tiles."""

import pytest
import torch

from nanovllm_bento.kernels import moe
from nanovllm_bento.kernels.moe import PAIR_TOKENS, GroupedConfig, PairConfig, choose_config, max_blocks
from tests.kernels.moe_checks import TOLERANCE, make_case, naive64, relative_error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def route_naive(logits, top_k, renormalize):
    """Sorted by (larger logit, lower id), in Python."""
    weights, ids = [], []
    for row in logits.double().tolist():
        chosen = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        shares = torch.tensor(row, dtype=torch.float64).softmax(0)[chosen]
        weights.append(shares / shares.sum() if renormalize else shares)
        ids.append(chosen)
    return torch.stack(weights), torch.tensor(ids)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_routing_equals_a_plain_sort(top_k, renormalize):
    logits = torch.randn(50, 8).bfloat16()  # so few bits that some are equal
    assert any(len(set(row)) < 8 for row in logits.tolist())
    wanted_weights, wanted_ids = route_naive(logits, top_k, renormalize)
    weights, ids = moe.route(logits, top_k, renormalize=renormalize)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids.long(), wanted_ids)
    assert (weights - wanted_weights).abs().max() < 1e-6


def test_a_nan_among_the_logits_is_not_hidden():
    logits = torch.randn(2, 8)
    logits[1, 3] = float("nan")
    weights, ids = moe.route(logits, 2, renormalize=True)
    assert weights[1].isnan().all() and weights[0].isfinite().all()
    assert ((ids >= 0) & (ids < 8)).all()


@pytest.mark.parametrize("routing", ["random", "one", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_experts_equal_a_loop_over_tokens(dtype, routing):
    for num_tokens, top_k in [(1, 2), (13, 3), (13, 1)]:
        case = make_case(num_tokens, 32, 24, 6, top_k, dtype, "cpu", routing)
        assert relative_error(moe.experts_mlp(*case), naive64(case)) < 2 * TOLERANCE[dtype]
        residual = torch.randn_like(case.x)
        wanted = naive64(case, residual=residual)
        assert relative_error(moe.experts_mlp(*case, residual=residual), wanted) < 2 * TOLERANCE[dtype]


def test_the_parts_of_the_experts_add_up_to_the_whole():
    case = make_case(9, 32, 24, 6, 3, torch.float32, "cpu")
    parts = [
        moe.experts_mlp(case.x, case.gate_up[a:b], case.down[a:b], case.weights, case.ids, expert_start=a)
        for a, b in [(0, 2), (2, 5), (5, 6)]
    ]
    assert relative_error(sum(parts), naive64(case)) < 1e-6
    assert relative_error(parts[1], naive64(case, 2, 5)) < 1e-6


def test_no_tokens_are_no_work():
    case = make_case(0, 32, 24, 6, 3, torch.float32, "cpu")
    assert moe.experts_mlp(*case).shape == (0, 32)


@pytest.mark.parametrize("routing", ["random", "one", "few"])
def test_the_chain_of_references_equals_a_loop_over_tokens(routing):
    """Sorting, both grouped products and the sum: what each kernel is compared with."""
    case = make_case(21, 32, 24, 6, 3, torch.float32, "cpu", routing)
    for start, stop in [(0, 6), (1, 4)]:
        found = moe.sort_pairs_reference(case.ids, start, stop - start, 4)
        h = moe.grouped_gate_up_reference(case.x, case.gate_up[start:stop], found, 3)
        y = moe.grouped_down_reference(h, case.down[start:stop], found, case.weights)
        total = moe.combine_reference(y, case.ids, start, stop - start)
        assert relative_error(total, naive64(case, start, stop)) < 1e-6


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 128, 8), (7, 4, 2), (40, 8, 3), (64, 2, 2)])
def test_blocks_hold_every_pair_once(num_tokens, num_experts, top_k):
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]).int()
    for block_m in (1, 16, 64):
        found = moe.sort_pairs_reference(ids, 0, num_experts, block_m)
        used = int(found.num_blocks)
        assert used <= max_blocks(ids.numel(), num_experts, block_m) == len(found.experts)
        pairs = found.pairs[: used * block_m].view(used, block_m)
        real = pairs[pairs < ids.numel()]
        assert sorted(real.tolist()) == list(range(ids.numel()))
        for block, expert in zip(pairs, found.experts[:used], strict=True):
            assert (ids.flatten()[block[block < ids.numel()].long()] == expert).all()


def test_as_many_blocks_as_ever_can_be_are_allowed_for():
    """Every expert with one row in its last block but as many full ones as the pairs make."""
    for num_experts, block_m, full in [(4, 16, 3), (8, 64, 0), (3, 16, 1)]:
        rows = [full * block_m + 1 if e == 0 else 1 for e in range(num_experts)]
        used = sum(-(-r // block_m) for r in rows)
        assert used <= max_blocks(sum(rows), num_experts, block_m)


def test_tiles_fit_every_shape_and_number_of_tokens():
    for inner, hidden in [(768, 2048), (384, 2048), (96, 2048), (14336, 4096), (48, 64), (13, 20)]:
        for tokens in [1, 2, PAIR_TOKENS + 1, 16, 100, 1000, 8192]:
            config = choose_config(8, 2 * inner, hidden, 3, tokens, 2)
            assert isinstance(config, PairConfig) == (tokens <= PAIR_TOKENS)
            for size in config[-2][:2] + config[-1][:2]:
                assert size & (size - 1) == 0 and size > 0
            if isinstance(config, GroupedConfig):
                assert config.block_m >= 16 and min(config.gate_up[:2] + config.down[:2]) >= 16


def test_batch_invariance_and_float32_take_one_configuration():
    for itemsize, invariant in [(2, True), (4, False), (4, True)]:
        chosen = {choose_config(128, 1536, 2048, 8, tokens, itemsize, invariant) for tokens in (1, 16, 256, 8192)}
        assert len(chosen) == 1 and isinstance(chosen.pop(), GroupedConfig)
