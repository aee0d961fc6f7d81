"""What several GPU tests ask of a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_replays_give(
    run: Callable[[], object], out: Tensor, wanted: Tensor, *, times: int = 200
) -> torch.cuda.CUDAGraph:
    """Each replay of the graph of ``run``, whose kernels are compiled, writes ``wanted`` into ``out``, bit for bit.

    ``out`` is NaN before each. Returns the graph.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    differences = torch.zeros((), dtype=torch.int64, device=out.device)
    for _ in range(times):
        out.fill_(float("nan"))
        graph.replay()
        differences += (out != wanted).sum()
    assert differences.item() == 0
    return graph
