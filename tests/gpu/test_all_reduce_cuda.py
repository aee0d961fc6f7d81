"""The one-shot all-reduce on GPUs: two processes with a GPU each, and two ranks on streams of one GPU.

Everything runs in processes of its own: a kernel that waits in vain traps, and then its process has no GPU any more.
"""

import hashlib
import multiprocessing
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm_bento.kernels.all_reduce import EMPTY, all_reduce, all_reduce_add_rms_norm
from nanovllm_bento.kernels.norm import add_rms_norm_reference
from nanovllm_bento.layers.parallel import ParallelGroup
from tests.kernels import all_reduce_checks as checks
from tests.kernels.all_reduce_checks import EPS, Ranks
from tests.kernels.rank_processes import run_ranks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 4096), (3, 5120), (16, 2048), (131, 4096), (256, 4096), (300, 1000), (7, 8)]
VARIANTS = 32
Act = Callable[[ParallelGroup], object]


@pytest.fixture
def two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def run(act: Act) -> list[object]:
        answers = run_ranks(2, tmp_path / "store", act, device="cuda")
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    return run


def bits(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def values(group: ParallelGroup) -> list[str]:
    assert group.workspace is not None, "the GPUs cannot share memory"
    found = []
    for dtype in DTYPES:
        for seed, (rows, n) in enumerate(SHAPES):
            parts = checks.parts_of(2, rows, n, dtype, seed)
            x = parts[group.rank].cuda()
            fits = n * x.element_size() <= group.workspace.row_bytes
            assert group.workspace.takes(x) == fits
            group.all_reduce(x)
            checks.check_sum(x, parts)
            if not fits:
                continue
            residual, weight = torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)  # another on each rank
            mine = parts[group.rank].cuda()
            normed, total = group.all_reduce_add_rms_norm(mine, residual.cuda(), weight.cuda(), EPS)
            checks.check_norm(normed, total, parts, residual, weight)
            residual, weight = torch.ones(rows, n, dtype=dtype), torch.full((n,), 0.5, dtype=dtype)
            mine = parts[group.rank].cuda()
            same = group.all_reduce_add_rms_norm(mine, residual.cuda(), weight.cuda(), EPS)
            found.append(bits(x, *same))
            last = parts[group.rank][-1:].cuda()
            alone = group.all_reduce_add_rms_norm(last, residual[-1:].cuda(), weight.cuda(), EPS)
            assert torch.equal(alone[0], same[0][-1:]) and torch.equal(alone[1], same[1][-1:])
    large = torch.ones(group.workspace.max_rows + 1, 4096, dtype=torch.bfloat16, device="cuda")
    assert not group.workspace.takes(large)
    assert (group.all_reduce(large) == 2).all()  # NCCL
    assert (
        group.all_gather(torch.full((2, 3), float(group.rank), device="cuda")).tolist() == [[0.0] * 3 + [1.0] * 3] * 2
    )
    assert group.minimum(5 - group.rank, torch.device("cuda", group.rank)) == 4
    return found


def test_values_and_the_same_bits_on_both_ranks(two_gpus):
    first, second = two_gpus(values)
    assert first == second


class Calls:
    """Calls whose data differ from one to the next, and a count on the device of numbers that came out wrong."""

    def __init__(self, group: ParallelGroup, rows: int, n: int = 4096) -> None:
        self.group = group
        place = torch.arange(rows * n).view(1, rows, n)
        variant = torch.arange(VARIANTS).view(-1, 1, 1)
        parts = [((place * 5 + variant * 11 + rank * 3) % 61 - 30).bfloat16() for rank in range(2)]  # sums are exact
        self.mine = parts[group.rank].cuda()
        self.sums = (parts[0] + parts[1]).cuda()
        self.weight = torch.rand(n, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
        self.residual = torch.ones(rows, n, dtype=torch.bfloat16, device="cuda")
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.which = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call(self) -> None:
        """One sum and one sum with norm of the variants that ``which`` names, and moves on to the next."""
        x, wanted = self.mine[self.which][0], self.sums[self.which][0]
        self.wrong += (self.group.all_reduce(x.clone()) != wanted).sum()
        normed, total = self.group.all_reduce_add_rms_norm(x, self.residual.clone(), self.weight, EPS)
        wanted_normed, wanted_total = add_rms_norm_reference(wanted, self.residual, self.weight, EPS)
        self.wrong += (total != wanted_total).sum()
        self.wrong += ((normed - wanted_normed).abs() > 0.02 + 0.02 * wanted_normed.abs()).sum()
        self.which += 1
        self.which %= VARIANTS

    def capture(self, calls: int) -> torch.cuda.CUDAGraph:
        self.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                self.call()
        return graph


def many_eager_calls(group: ParallelGroup) -> int:
    calls = Calls(group, rows=16)
    for _ in range(5000):  # two a call
        calls.call()
    return int(calls.wrong)


def test_ten_thousand_eager_calls(two_gpus):
    assert two_gpus(many_eager_calls) == [0, 0]


def bare_calls(group: ParallelGroup) -> int:
    """Back to back, nothing between them that would keep the ranks together."""
    x = torch.full((64, 4096), 1.0, device="cuda", dtype=torch.float32)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    group.all_reduce(x.clone())
    with torch.cuda.graph(graph):
        for _ in range(20):
            group.all_reduce(x)  # twice what it was, on both
        x /= 2.0**20
        wrong += (x != 1.0).sum()
    for _ in range(500):
        graph.replay()
    return int(wrong)


def test_calls_back_to_back(two_gpus):
    assert two_gpus(bare_calls) == [0, 0]


def graphs_and_eager_calls(group: ParallelGroup) -> int:
    calls = [Calls(group, rows) for rows in (1, 5, 64, 200)]
    graphs = [call.capture(count) for call, count in zip(calls, (1, 2, 3, 5), strict=True)]
    together, apart = random.Random(0), random.Random(group.rank)
    for _ in range(1500):
        chosen = together.randrange(4)
        if apart.random() < 0.1:
            torch.cuda._sleep(apart.randrange(1, 400_000))  # one rank comes late, by up to 0.2 ms
        if together.random() < 0.3:
            calls[chosen].call()
        else:
            graphs[chosen].replay()
    return int(sum(int(call.wrong) for call in calls))


def test_graphs_of_different_sizes_among_eager_calls_with_late_ranks(two_gpus):
    assert two_gpus(graphs_and_eager_calls) == [0, 0]


def two_ranks_on_one_gpu() -> None:
    torch.cuda.set_device(0)
    torch.cuda._sleep(1)  # a kernel is loaded when first called, which may wait for those that run
    for dtype in (torch.bfloat16, torch.float32):
        for rows, n in [(1, 4096), (40, 2048), (100, 1000)]:
            check_on_one_gpu(rows, n, dtype)


def check_on_one_gpu(rows: int, n: int, dtype: torch.dtype) -> None:
    ranks = Ranks.on("cuda", 2, max_rows=rows, row_bytes=n * dtype.itemsize, max_programs=32)
    parts = checks.parts_of(2, rows, n, dtype)
    residual, weight = torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype)
    streams = [torch.cuda.Stream() for _ in range(2)]
    mine = [part.cuda() for part in parts]
    sums, normed = [x.clone() for x in mine], [x.clone() for x in mine]
    totals = [residual.cuda() for _ in range(2)]
    device_weight = weight.cuda()

    def run(rank: int) -> None:
        sums[rank].copy_(mine[rank])
        normed[rank].copy_(mine[rank])
        all_reduce(sums[rank], ranks.workspaces[rank])
        all_reduce_add_rms_norm(normed[rank], totals[rank], device_weight, EPS, ranks.workspaces[rank])

    for inbox in ranks.inboxes:
        inbox.zero_()  # something has come for everyone, so that loading the kernels waits for nobody
    graphs = []
    for rank in range(2):
        run(rank)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(rank)
        graphs.append(graph)
    for rank in range(2):
        ranks.inboxes[rank].fill_(EMPTY)
        ranks.workspaces[rank].turns.zero_()

    for turn in range(200):
        for total in totals:
            total.copy_(residual)
        torch.cuda.synchronize()
        for rank in (0, 1) if turn % 2 else (1, 0):
            with torch.cuda.stream(streams[rank]):
                if turn % 3 == rank:
                    torch.cuda._sleep(100_000)
                graphs[rank].replay() if turn % 5 else run(rank)
        torch.cuda.synchronize()
        for rank in range(2):
            checks.check_sum(sums[rank], parts)
            checks.check_norm(normed[rank], totals[rank], parts, residual, weight)
    assert bits(normed[0], totals[0]) == bits(normed[1], totals[1])
    assert ranks.all_empty()


def test_two_ranks_on_one_gpu():
    process = multiprocessing.get_context("spawn").Process(target=two_ranks_on_one_gpu)
    process.start()
    process.join(200)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
