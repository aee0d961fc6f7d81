"""What tests of the experts' kernels state, in Triton's interpreter and on a GPU alike: results against float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm_bento.kernels import moe
from nanovllm_bento.kernels.moe import Config, PairConfig, SortedPairs

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """Arguments of experts_mlp. Experts that no rank of the test holds are NaN, so that using them shows."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    ids: Tensor


def make_case(
    num_tokens: int,
    hidden: int,
    inner: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    device: str,
    routing: str = "random",
) -> Case:
    """routing: random; one: all tokens ask the same experts; few: the upper half of the experts is asked by nobody."""
    scores = torch.rand(num_tokens, num_experts, device=device)
    if routing == "one":
        scores = scores[:1].expand(num_tokens, -1)
    elif routing == "few":
        scores[:, max(top_k, num_experts // 2) :] = 0
    ids = scores.argsort(-1, descending=True)[:, :top_k].int().contiguous()
    weights = torch.rand(num_tokens, top_k, device=device)
    return Case(
        torch.randn(num_tokens, hidden, device=device).to(dtype),
        (torch.randn(num_experts, 2 * inner, hidden, device=device) / hidden**0.5).to(dtype),
        (torch.randn(num_experts, hidden, inner, device=device) / inner**0.5).to(dtype),
        weights / weights.sum(-1, keepdim=True),
        ids,
    )


def naive64(case: Case, start: int = 0, stop: int | None = None, residual: Tensor | None = None) -> Tensor:
    """Token by token and place by place, in float64, with the experts [start, stop) alone."""
    out = torch.zeros_like(case.x, dtype=torch.float64) if residual is None else residual.double()
    stop = len(case.gate_up) if stop is None else stop
    for token, experts in enumerate(case.ids.tolist()):
        for place, expert in enumerate(experts):
            if start <= expert < stop:
                gate, up = (case.gate_up[expert].double() @ case.x[token].double()).chunk(2)
                h = gate / (1 + (-gate).exp()) * up
                out[token] += case.weights[token, place].double() * (case.down[expert].double() @ h)
    return out


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def run(case: Case, config: Config, start: int = 0, stop: int | None = None, residual: Tensor | None = None) -> Tensor:
    """The Triton kernels with the experts [start, stop)."""
    from nanovllm_bento.kernels.moe_triton import experts_mlp

    stop = len(case.gate_up) if stop is None else stop
    gate_up, down = case.gate_up[start:stop].contiguous(), case.down[start:stop].contiguous()
    return experts_mlp(case.x, gate_up, down, case.weights, case.ids, start, residual, config)


def assert_equals_float64(case: Case, config: Config, start: int = 0, stop: int | None = None) -> None:
    """Once alone with the whole of the experts, once with a residual and those of [start, stop)."""
    tolerance = TOLERANCE[case.x.dtype]
    assert relative_error(run(case, config), naive64(case)) < tolerance
    residual = torch.randn_like(case.x)
    wanted = naive64(case, start, stop, residual)
    found = run(case, config, start, stop, residual)
    assert found is residual
    assert relative_error(found, wanted) < tolerance


def assert_each_part_equals_its_reference(case: Case, config: Config, start: int, stop: int) -> None:
    """One after the other on the same inputs: sorting, both products, the sum."""
    from nanovllm_bento.kernels import moe_triton

    assert not isinstance(config, PairConfig)
    gate_up, down = case.gate_up[start:stop].contiguous(), case.down[start:stop].contiguous()
    top_k, tolerance = case.ids.shape[1], TOLERANCE[case.x.dtype]
    wanted = moe.sort_pairs_reference(case.ids, start, stop - start, config.block_m)
    found = moe_triton.sort_pairs(case.ids, start, stop - start, config.block_m)
    assert_same_blocks(found, wanted)
    rows = int(wanted.num_blocks) * config.block_m
    h = moe.grouped_gate_up_reference(case.x, gate_up, wanted, top_k)
    close(moe_triton.grouped_gate_up(case.x, gate_up, wanted, top_k, config.gate_up)[:rows], h[:rows], tolerance)
    y = moe.grouped_down_reference(h, down, wanted, case.weights)
    held = ((case.ids >= start) & (case.ids < stop)).flatten()
    close(moe_triton.grouped_down(h, down, wanted, case.weights, config.down)[held], y[held], tolerance)
    y[~held] = float("nan")  # nobody may read those
    for residual in (None, torch.randn_like(case.x)):
        total = moe.combine_reference(y, case.ids, start, stop - start, residual)
        close(moe_triton.combine(y, case.ids, start, stop - start, residual), total, tolerance)


def assert_same_blocks(found: SortedPairs, wanted: SortedPairs) -> None:
    blocks = int(wanted.num_blocks)
    assert int(found.num_blocks) == blocks and found.block_m == wanted.block_m
    assert found.pairs.shape == wanted.pairs.shape and found.experts.shape == wanted.experts.shape
    assert torch.equal(found.experts[:blocks], wanted.experts[:blocks])
    assert torch.equal(found.pairs[: blocks * wanted.block_m], wanted.pairs[: blocks * wanted.block_m])


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel() and wanted.double().norm() > 0:
        assert relative_error(found, wanted.double()) < tolerance
    else:
        assert torch.equal(found, wanted)
