"""CUDA graphs of the decode step: one per batch-size bucket for the model, and two for the sampler behind it.

A graph replays the very kernels an eager step would launch, for a few microseconds of host time instead of a few
milliseconds. Its inputs are static buffers; a batch smaller than its bucket runs with padding rows, which read and
store nothing. All graphs share one memory pool, as only one replays at a time.
"""

import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def graph_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending, max_num_seqs last: dense where a step is short (65 rows run as 80)."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass(slots=True)
class DecodeGraph:
    """One bucket. ``forward`` writes logits, which both samplers read; tokens are theirs."""

    size: int
    forward: torch.cuda.CUDAGraph
    logits: Tensor
    sample: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]]  # filtered or not -> (graph, tokens)


class DecodeGraphs:
    """Captures and finds the graphs. ``forward(size)`` computes logits of the first ``size`` static rows,
    ``sample(logits, filtered)`` their tokens; both run without a host sync once warmed up."""

    def __init__(
        self, max_num_seqs: int, forward: Callable[[int], Tensor], sample: Callable[[Tensor, bool], Tensor]
    ) -> None:
        self._forward, self._sample = forward, sample
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._graphs: dict[int, DecodeGraph] = {}
        self._bucket_of: list[int | None] = [None] * (max_num_seqs + 1)
        self.wanted = graph_buckets(max_num_seqs)

    def capture(self) -> None:
        """Capture every bucket, largest first, so that the smaller ones fit into its memory.

        Where memory runs out the remaining larger buckets are left out (with a warning): batches of those sizes run
        without a graph.
        """
        gc.collect()
        torch.cuda.synchronize()
        gc.disable()  # a collection during capture could free device memory, which is not allowed there
        try:
            for size in reversed(self.wanted):
                try:
                    self._graphs[size] = self._capture(size)
                    continue
                except torch.OutOfMemoryError:
                    pass  # and let go of the tensors that the exception holds
                torch.cuda.empty_cache()
                logger.warning("no memory for the CUDA graph of %d sequences; such steps run eagerly", size)
        finally:
            gc.enable()
        torch.cuda.synchronize()
        bucket = None
        for n in range(len(self._bucket_of) - 1, 0, -1):
            bucket = n if n in self._graphs else bucket
            self._bucket_of[n] = bucket

    def find(self, num_rows: int) -> DecodeGraph | None:
        """The smallest captured graph with at least num_rows rows."""
        size = self._bucket_of[num_rows]
        return None if size is None else self._graphs[size]

    def _capture(self, size: int) -> DecodeGraph:
        with torch.cuda.stream(self._stream):  # compiles and warms up what capture must not
            logits = self._forward(size)
            for filtered in (False, True):
                self._sample(logits, filtered)
            del logits
        self._stream.synchronize()
        graph, logits = self._record(lambda: self._forward(size))
        samplers = {}
        for filtered in (False, True):
            samplers[filtered] = self._record(lambda filtered=filtered: self._sample(logits, filtered))  # type: ignore[misc]
        return DecodeGraph(size, graph, logits, samplers)

    def _record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says again that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, out
