"""ParallelGroup over gloo: real processes that meet in a file, sum, gather, and fail when one of them dies."""

import os
from typing import Any

import pytest
import torch

from nanovllm_bento.errors import RankError
from nanovllm_bento.kernels.all_reduce import all_reduce_add_rms_norm_reference, all_reduce_reference
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from tests.kernels.all_reduce_checks import parts_of
from tests.kernels.rank_processes import run_ranks

CPU = torch.device("cpu")


def all_collectives(group: ParallelGroup) -> dict[str, Any]:
    rank, size = group.rank, group.size
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = parts_of(size, 5, 32, dtype)
        x = parts[rank].clone()
        assert group.all_reduce(x) is x
        assert torch.equal(x, all_reduce_reference(parts))
        found[f"sum of {dtype}"] = x.double().tolist()
        row = parts[rank][3:4].clone()
        assert torch.equal(group.all_reduce(row), x[3:4])  # whatever the number of rows

        residual, weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(9)).to(dtype), torch.ones(32)
        weight = weight.to(dtype)
        wanted = all_reduce_add_rms_norm_reference(parts, residual.clone(), weight, 1e-6)
        normed, total = group.all_reduce_add_rms_norm(parts[rank].clone(), residual, weight, 1e-6)
        assert torch.equal(normed, wanted[0]) and torch.equal(total, wanted[1])
        assert torch.equal(group.all_gather(parts[rank]), torch.cat(parts, dim=1))
    counts = torch.tensor([rank, 10], dtype=torch.int64)
    assert group.all_reduce(counts).tolist() == [size * (size - 1) // 2, 10 * size]
    assert group.all_reduce(torch.empty(0, 8)).shape == (0, 8)
    assert group.all_gather(torch.empty(0, 8)).shape == (0, 8 * size)
    found["minimum"] = group.minimum(100 - rank, CPU)
    found["maximum"] = group.maximum(torch.tensor([rank, -rank])).tolist()
    group.all_reduce(torch.zeros(1))  # nobody leaves before all are here
    group.close()
    return found


def test_all_ranks_get_the_same_sums_and_the_whole(tmp_path):
    size = 4
    answers = run_ranks(size, tmp_path / "store", all_collectives)
    assert isinstance(answers[0], dict), answers
    assert answers[0]["minimum"] == 100 - (size - 1)
    assert answers[0]["maximum"] == [size - 1, 0]
    for answer in answers[1:]:
        assert answer == answers[0]


def last_rank_dies(group: ParallelGroup) -> str:
    group.all_reduce(torch.ones(4))
    if group.rank == group.size - 1:
        os._exit(1)
    group.all_reduce(torch.ones(4))
    return "went on without it"


def test_a_rank_that_dies_fails_the_others_call(tmp_path):
    survivor, dead = run_ranks(2, tmp_path / "store", last_rank_dies)
    assert dead is None
    assert isinstance(survivor, RuntimeError), survivor


def test_a_group_of_one_leaves_everything_as_it_is():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    assert SINGLE.all_reduce(x) is x and SINGLE.all_gather(x) is x
    assert SINGLE.minimum(7, CPU) == 7
    wanted = all_reduce_add_rms_norm_reference([x], residual, weight, 1e-6)
    found = SINGLE.all_reduce_add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    SINGLE.close()


def test_ranks_that_do_not_come_to_the_meeting_are_named(tmp_path):
    with pytest.raises(RankError, match=r"^tensor-parallel ranks 0, 2 of 3 did not get ready to meet within 0.1 s"):
        ParallelGroup.connect(1, 3, tmp_path / "store", CPU, timeout=0.1)
