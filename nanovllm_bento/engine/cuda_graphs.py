"""CUDA graphs of the decode step, one per batch-size bucket, and of steps of prompts, per bucket of tokens.

A graph replays the very kernels an eager step would launch, for a few microseconds of host time instead of some
milliseconds (14 ms of host time beside an H100 to launch Qwen3-0.6B's prefill kernel by kernel). Its inputs are static
buffers; a batch smaller than its bucket runs with padding rows or tokens, which read and store nothing. All graphs
share one memory pool, as only one replays at a time.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

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


class GraphPool:
    """Records graphs into one memory pool, from one stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of what ``run`` launches, and what it returns. Its kernels must have been launched before.

        Raises torch.OutOfMemoryError; nothing else is lost then.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says again that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, out


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection during capture could free device memory, which is not allowed there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DecodeGraphs:
    """Captures and finds the graphs. ``forward(size)`` computes logits of the first ``size`` static rows,
    ``sample(logits, filtered)`` their tokens; both run without a host sync once warmed up. ``within(size)`` is in force
    while they are captured. ``must_fit``: raise torch.OutOfMemoryError rather than leave a bucket out, where other
    ranks would not."""

    def __init__(
        self,
        pool: GraphPool,
        max_num_seqs: int,
        forward: Callable[[int], Tensor],
        sample: Callable[[Tensor, bool], Tensor],
        *,
        within: Callable[[int], AbstractContextManager[None]] = lambda size: contextlib.nullcontext(),
        must_fit: bool = False,
    ) -> None:
        self._forward, self._sample, self._within = forward, sample, within
        self._pool, self._must_fit = pool, must_fit
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
        for size in reversed(self.wanted):
            try:
                self.capture_one(size)
                continue
            except torch.OutOfMemoryError:
                if self._must_fit:
                    raise
                # and let go of the tensors that the exception holds
            torch.cuda.empty_cache()
            logger.warning("no memory for the CUDA graph of %d sequences; such steps run eagerly", size)
        torch.cuda.synchronize()
        bucket = None
        for n in range(len(self._bucket_of) - 1, 0, -1):
            bucket = n if n in self._graphs else bucket
            self._bucket_of[n] = bucket

    def find(self, num_rows: int) -> int | None:
        """The size of the smallest captured graph with at least num_rows rows."""
        return self._bucket_of[num_rows]

    def __getitem__(self, size: int) -> DecodeGraph:
        return self._graphs[size]

    def capture_one(self, size: int) -> None:
        """Capture a bucket, once more if it was before."""
        self._graphs.pop(size, None)
        with _no_collection(), self._within(size):
            self._graphs[size] = self._capture(size)

    def _capture(self, size: int) -> DecodeGraph:
        with torch.cuda.stream(self._pool.stream):  # compiles and warms up what capture must not
            logits = self._forward(size)
            for filtered in (False, True):
                self._sample(logits, filtered)
            del logits
        self._pool.stream.synchronize()
        graph, logits = self._pool.record(lambda: self._forward(size))
        samplers = {}
        for filtered in (False, True):
            samplers[filtered] = self._pool.record(lambda filtered=filtered: self._sample(logits, filtered))  # type: ignore[misc]
        return DecodeGraph(size, graph, logits, samplers)


class PromptShape(NamedTuple):
    """What a graph of prompts is made for, at most: tokens, rows (sequences), and blocks of a row.

    whole: for steps of whole prompts alone.
    """

    num_tokens: int
    num_rows: int
    num_blocks: int
    whole: bool


_PROMPT_ROWS = (1, 16, 64)
_MIN_TOKENS, _MIN_CONTEXT = 16, 1024
_MAX_PROMPT_GRAPHS = 192
_MAX_LIKELY = 144  # of these; the others are left to what comes
_LATER_TOKENS, _LATER_CONTEXTS = 1024, (1024, 2048)  # of a prompt whose start is cached: new ones; all of them


class PromptGraphs:
    """Graphs of steps of prompts, each captured when a step first needs it, which runs eagerly, or ahead of that.

    ``forward(shape)`` computes logits, [rows, vocab_size], of the last token of each of the first static rows.
    """

    def __init__(
        self,
        pool: GraphPool,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        forward: Callable[[PromptShape], Tensor],
    ) -> None:
        self._pool, self._forward = pool, forward
        self.max_num_tokens, self.max_model_len, self.block_size = max_num_tokens, max_model_len, block_size
        self.max_num_rows = min(max_num_seqs, _PROMPT_ROWS[-1])
        self._graphs: dict[PromptShape, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def shape(self, num_tokens: int, num_rows: int, context: int, whole: bool = False) -> PromptShape | None:
        """The bucket of a step of prompts; context: tokens of its longest row. None if there is none.

        Tokens rise by a quarter of a power of two; contexts, which attention's splits depend on, by powers of two.
        """
        if num_rows > self.max_num_rows or num_tokens > self.max_num_tokens:
            return None
        tokens = min(token_bucket(num_tokens), self.max_num_tokens)
        rows = min(next(rows for rows in _PROMPT_ROWS if rows >= num_rows), self.max_num_rows)
        longest = tokens if whole else max(_MIN_CONTEXT, 1 << (context - 1).bit_length())
        longest = min(longest, self.max_model_len)
        return PromptShape(tokens, rows, -(-longest // self.block_size), whole)

    def likely(self, *, whole: bool, later_turns: bool) -> list[PromptShape]:
        """Buckets that steps may well need, in the order to capture them in.

        The largest comes first, so that the others fit into its memory; then steps of few prompts, large ones first.
        Prompts are taken to have 16 tokens or more; whole: attention reads them as whole prompts. later_turns: some
        will find their start in the prefix cache; of these, one a step, of up to 1,024 new tokens.
        """
        sizes = [*range(_MIN_TOKENS, self.max_num_tokens, _MIN_TOKENS), self.max_num_tokens]
        found, fewest = [], 1
        for rows in _PROMPT_ROWS:
            possible = {min(n, rows * self.max_model_len) for n in sizes if n >= fewest * _MIN_TOKENS}
            found += [self.shape(n, fewest, n if rows == 1 else min(n, _MIN_CONTEXT), whole) for n in possible]
            fewest = rows + 1
        if later_turns:
            lens = [n for n in sizes if n <= min(_LATER_TOKENS, self.max_model_len)]
            found += [self.shape(n, 1, min(context, self.max_model_len)) for n in lens for context in _LATER_CONTEXTS]
        shapes = {shape for shape in found if shape is not None}
        largest = max(shapes)

        def order(shape: PromptShape) -> tuple[bool, bool, int, int, int]:
            return shape != largest, shape.whole != whole, shape.num_rows, -shape.num_tokens, -shape.num_blocks

        return sorted(shapes, key=order)[:_MAX_LIKELY]

    def __contains__(self, shape: PromptShape) -> bool:
        """Whether it was captured, or tried to."""
        return shape in self._graphs

    def run(self, shape: PromptShape) -> Tensor:
        """Logits of what lies in the static buffers, valid until the next step."""
        found = self._graphs.get(shape)
        if found is not None:
            graph, logits = found
            graph.replay()
            return logits
        logits = self._forward(shape)
        if shape not in self._graphs and len(self._graphs) < _MAX_PROMPT_GRAPHS:
            self._graphs[shape] = self._capture(shape)
        return logits

    def _capture(self, shape: PromptShape) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        with _no_collection():
            try:
                return self._pool.record(lambda: self._forward(shape))
            except torch.OutOfMemoryError:
                pass  # and let go of the tensors that the exception holds
        logger.warning("no memory for the CUDA graph of %d prompt tokens; such steps run eagerly", shape[0])
        return None


def token_bucket(num_tokens: int) -> int:
    """num_tokens rounded up to a quarter of a power of two, and to 16."""
    quarter = max(_MIN_TOKENS, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // quarter) * quarter
