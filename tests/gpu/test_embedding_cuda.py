"""The embedding as a compiled kernel: values, CUDA graphs, large matrices, and when the kernels after it may start."""

import pytest
import torch
import triton
import triton.language as tl

from nanovllm_bento.kernels.embedding import embedding
from nanovllm_bento.kernels.launch import use_pdl
from tests.kernels import embedding_checks as checks

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 40, 896, 1024, 5120, 7000])
def test_each_token_gets_its_row(n, dtype):
    checks.check_embedding(embedding, 500, n, dtype, "cuda")


def test_an_id_without_a_row_takes_the_nearest():
    checks.check_ids_without_a_row(embedding, "cuda")
    weight = torch.randn(500, 1024, device=CUDA)
    assert torch.equal(embedding(torch.tensor([500, -1], device=CUDA), weight), weight[[499, 0]])


def test_ids_at_any_address_run_the_same_kernel(monkeypatch):
    checks.check_no_tokens(embedding, "cuda")
    embedding(torch.zeros(1, dtype=torch.int64, device=CUDA), torch.randn(30, 48, device=CUDA), 0)
    asked_for = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **found: asked_for.append(found["src"].name))
    checks.check_ids_at_any_address(embedding, "cuda")
    assert not asked_for


def test_a_graph_follows_its_ids():
    weight = torch.randn(5000, 2048, dtype=torch.bfloat16, device=CUDA)
    ids = torch.zeros(9, dtype=torch.int64, device=CUDA)
    embedding(ids, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = embedding(ids, weight)
    for _ in range(3):
        ids.copy_(torch.randint(5000, (9,)))
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, weight[ids])


def test_a_matrix_of_more_than_2_31_elements():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    num_rows = 2**31 // 4096 + 5
    weight = torch.zeros(num_rows, 4096, dtype=torch.bfloat16, device=CUDA)
    weight[-1] = torch.randn(4096, device=CUDA)
    ids = torch.tensor([0, num_rows - 1], device=CUDA)
    assert torch.equal(embedding(ids, weight), weight[ids])


@triton.jit
def _store_late(ids_ptr, value, scratch_ptr, delay):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    count = tl.load(scratch_ptr)
    for _ in range(delay):
        count = tl.atomic_add(scratch_ptr, tl.where(count < 0, 2, 1))  # each needs the one before
    tl.store(ids_ptr, tl.where(count < 0, 0, value).to(tl.int64))


@triton.jit
def _read_early(ids_ptr, seen_ptr):
    seen = tl.load(ids_ptr)
    tl.extra.cuda.gdc_wait()
    tl.store(seen_ptr, seen)


def test_kernels_after_it_may_read_what_came_before_it_without_waiting():
    """As attention in decode does with context lengths; the kernel before lets others start long before it stores."""
    if not use_pdl(CUDA):
        pytest.skip("needs programmatic dependent launch")
    weight = torch.randn(100, 1024, dtype=torch.bfloat16, device=CUDA)
    ids, seen, scratch = (torch.zeros(1, dtype=torch.int64, device=CUDA) for _ in range(3))
    for value in range(20, 40):
        ids.fill_(0)
        torch.cuda._sleep(1_000_000)  # until all of it is launched
        _store_late[(1,)](ids, value, scratch, 500, num_warps=1, launch_pdl=True)
        found = embedding(ids, weight)
        _read_early[(1,)](ids, seen, num_warps=1, launch_pdl=True)
        assert torch.equal(found[0], weight[value])
        assert seen.item() == value
