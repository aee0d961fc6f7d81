"""all_reduce in Triton's interpreter, one rank after another: what each sends, sums and leaves behind."""

import pytest
import torch
from torch import Tensor

from nanovllm_bento.kernels.all_reduce import EMPTY
from nanovllm_bento.kernels.all_reduce_triton import all_reduce, all_reduce_add_rms_norm
from tests.kernels import all_reduce_checks as checks
from tests.kernels.all_reduce_checks import EPS, ITEM, Ranks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def words_of(part: Tensor) -> Tensor:
    """As they travel: int32, and none that means an empty inbox."""
    words = part.clone().view(torch.int32)
    words[words == EMPTY] = 0
    return words


def deliver(ranks: Ranks, to: int, parts: list[Tensor], turn: int) -> None:
    """What the other ranks' kernels write into one rank's inbox."""
    for source, part in enumerate(parts):
        if source != to:
            words = words_of(part)
            ranks.inboxes[to][turn, : words.shape[0], source, : words.shape[1]] = words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, rank", [(2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("n", [8, 40, 264])
def test_a_rank_sends_its_part_sums_all_and_empties_its_inbox(n, size, rank, dtype):
    rows = 3
    ranks = Ranks.on("cpu", size, max_rows=5, row_bytes=n * ITEM[dtype] + 16, max_programs=2)
    workspace = ranks.workspaces[rank]
    for call in range(3):
        turn = call % 2
        parts = checks.parts_of(size, rows, n, dtype, seed=call)
        deliver(ranks, rank, parts, turn)
        x = parts[rank].clone()
        assert workspace.takes(x)
        assert all_reduce(x, workspace) is x
        checks.check_sum(x, parts, truncates=dtype == torch.bfloat16)
        assert (ranks.inboxes[rank] == EMPTY).all()
        for other in set(range(size)) - {rank}:
            words = words_of(parts[rank])
            inbox = ranks.inboxes[other]
            assert torch.equal(inbox[turn, :rows, rank, : words.shape[1]], words)
            inbox[turn, :rows, rank, : words.shape[1]] = EMPTY
            assert (inbox == EMPTY).all()
        assert workspace.turns.tolist() == [1 - turn] * rows + [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, rank, n", [(2, 0, 256), (2, 1, 40), (3, 1, 264)])
def test_sum_then_residual_then_norm(size, rank, n, dtype):
    rows = 2
    ranks = Ranks.on("cpu", size, rows, n * ITEM[dtype])
    parts = checks.parts_of(size, rows, n, dtype)
    residual, weight = torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)
    deliver(ranks, rank, parts, turn=0)
    x, r = parts[rank].clone(), residual.clone()
    normed, total = all_reduce_add_rms_norm(x, r, weight, EPS, ranks.workspaces[rank])
    assert normed is x and total is r
    checks.check_norm(normed, total, parts, residual, weight, truncates=dtype == torch.bfloat16)
    assert (ranks.inboxes[rank] == EMPTY).all()


def test_rows_keep_turns_of_their_own():
    ranks = Ranks.on("cpu", 2, max_rows=4, row_bytes=32)
    for rows, turns in [(1, [1, 0, 0, 0]), (3, [0, 1, 1, 0]), (2, [1, 0, 1, 0])]:
        parts = checks.parts_of(2, rows, 8, torch.float32, seed=rows)
        for row in range(rows):
            turn = int(ranks.workspaces[0].turns[row])
            ranks.inboxes[0][turn, row, 1] = words_of(parts[1])[row]
        checks.check_sum(all_reduce(parts[0].clone(), ranks.workspaces[0]), parts)
        assert ranks.workspaces[0].turns.tolist() == turns


def test_what_a_workspace_does_not_take():
    workspace = Ranks.on("cpu", 2, max_rows=4, row_bytes=64).workspaces[0]
    assert workspace.takes(torch.ones(4, 16)) and workspace.takes(torch.ones(2, 2, 16))
    assert not workspace.takes(torch.ones(5, 16))  # rows
    assert not workspace.takes(torch.ones(1, 20))  # width
    assert not workspace.takes(torch.ones(1, 6))  # not whole vectors
    assert not workspace.takes(torch.ones(16, 4).t())
    assert not workspace.takes(torch.ones(17)[1:])  # not aligned
    assert not workspace.takes(torch.ones(1, 8, dtype=torch.float64))
    assert all_reduce(torch.empty(0, 16), workspace).shape == (0, 16)
