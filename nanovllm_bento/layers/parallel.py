"""The ranks of a tensor-parallel engine, and what they do together: sum and gather activations.

A column-parallel layer holds some of the outputs, so its results are parts; a row-parallel layer holds some of the
inputs, so its results are partial sums (Shoeybi et al., "Megatron-LM", 2019, section 3). Who needs the whole asks the
group. Between GPUs small messages go through memory that the ranks share (kernels/all_reduce.py) and the rest through
NCCL; between CPUs gloo moves them, over the loopback interface. The ranks find each other through a file, so nothing
here has a fixed port or name.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm_bento.errors import ConfigError, RankError
from nanovllm_bento.kernels import all_reduce as one_shot
from nanovllm_bento.kernels.norm import add_rms_norm
from nanovllm_bento.kernels.peer_memory import PeerMemory, PeerMemoryError

logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 16384
"""Rows of an all-reduce are taken to be no longer than 8,192 numbers of 16 bits unless ``connect`` is told."""


@dataclass(slots=True, eq=False)
class ParallelGroup:
    """Rank ``rank`` of ``size``. Every rank must make the same calls in the same order, with the same shapes.

    A group of one (``SINGLE``) does nothing and costs nothing. process_group: a torch ProcessGroup; None in it.
    workspace: through which small messages go on GPUs; None where their memory cannot be shared.
    batch_invariant: sums do not depend on the number of rows. Otherwise that holds for small messages, and for all of
    them between two ranks; NCCL adds in an order that depends on where in a large message a number stands.
    """

    rank: int = 0
    size: int = 1
    process_group: Any = None
    workspace: one_shot.Workspace | None = None
    memory: PeerMemory | None = None
    batch_invariant: bool = False

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        store: Path,
        device: torch.device,
        timeout: float = 600.0,
        *,
        max_row_bytes: int = MAX_ROW_BYTES,
        batch_invariant: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> "ParallelGroup":
        """Meet the other ranks in the file ``store`` (a new one for each group). Blocks until all are there.

        timeout: seconds, of meeting and of every collective on CPUs. check: called while others are still on their way;
        what it raises ends the waiting.
        max_row_bytes: the longest row that all_reduce is to get (hidden size times bytes a number). On GPUs each rank
        gives memory for the messages that do not go through NCCL: 4 times all_reduce.MOST_BYTES between two ranks.
        """
        from torch import distributed as dist

        meeting = dist.FileStore(str(store), size)
        wait = timedelta(seconds=timeout)
        meeting.set_timeout(wait)
        deadline = time.monotonic() + timeout
        meeting.set(f"rank {rank}", "")
        while absent := [other for other in range(size) if not meeting.check([f"rank {other}"])]:
            check()
            if time.monotonic() > deadline:
                names = f"{'rank' if len(absent) == 1 else 'ranks'} {', '.join(map(str, absent))}"
                raise RankError(f"tensor-parallel {names} of {size} did not get ready to meet within {timeout:g} s")
            time.sleep(0.005)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = wait
            nccl = dist.ProcessGroupNCCL(meeting, rank, size, options)
            group = cls(rank, size, nccl, batch_invariant=batch_invariant)
            group.minimum(0, device)  # NCCL connects at its first call, which must not be in a graph's capture
            group._share_memory(dist.PrefixStore("peer_memory", meeting), device, max_row_bytes, timeout)
            return group
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = wait
        return cls(rank, size, gloo(meeting, rank, size, options), batch_invariant=batch_invariant)

    def _share_memory(self, store: Any, device: torch.device, max_row_bytes: int, timeout: float) -> None:
        row_bytes = -(-max_row_bytes // 16) * 16
        max_rows = one_shot.MOST_BYTES.get(self.size, 0) // row_bytes
        if not max_rows:
            return
        try:
            self.memory = PeerMemory.share(
                store,
                self.rank,
                self.size,
                device,
                one_shot.Workspace.inbox_bytes(self.size, max_rows, row_bytes),
                one_shot.EMPTY,
            )
        except PeerMemoryError as error:
            logger.warning("the GPUs cannot share memory, so that every all-reduce goes through NCCL: %s", error)
            return
        inboxes = torch.tensor(self.memory.addresses, dtype=torch.int64, device=device)
        turns = torch.zeros(max_rows, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        max_polls = min(2**31 - 1, int(timeout * 1e7))
        self.workspace = one_shot.Workspace(self.rank, self.size, max_rows, row_bytes, inboxes, turns, max_polls)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in x's memory, the same bits on every rank."""
        if self.size == 1 or not x.numel():
            return x
        if not x.is_cuda:
            return x.copy_(one_shot.all_reduce_reference(self._exchange(x)))
        if self.workspace is not None and self.workspace.takes(x):
            return one_shot.all_reduce(x, self.workspace)
        if self.batch_invariant and self.size > 2:
            return x.copy_(one_shot.all_reduce_reference(self._exchange(x)))
        from torch import distributed as dist

        options = dist.AllreduceOptions()
        options.asyncOp = False  # on the caller's stream, without events to and from NCCL's own
        _wait(self.process_group.allreduce([x], options))
        return x

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [rows, n] -> [rows, size * n], the ranks' columns side by side, in ``out`` if given."""
        if self.size == 1:
            return x if out is None else out.copy_(x)
        return torch.cat(self._exchange(x), dim=1, out=out)

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``add_rms_norm`` of the sum of all ranks' x: the norm and the new residual; may overwrite x and residual."""
        if x.is_cuda and self.workspace is not None and x.numel() and self.workspace.takes(x):
            return one_shot.all_reduce_add_rms_norm(x, residual, weight, eps, self.workspace)
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        return -int(self.maximum(torch.tensor([-value], dtype=torch.int64, device=device)))

    def maximum(self, x: Tensor) -> Tensor:
        """The element-wise largest of all ranks' x, in x's memory."""
        if self.size > 1:
            from torch import distributed as dist

            options: Any = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            options.asyncOp = not x.is_cuda
            _wait(self.process_group.allreduce([x], options))
        return x

    def close(self) -> None:
        """Leave the group; a collective that waits for this rank fails on the others."""
        self.workspace = None
        process_group, self.process_group = self.process_group, None  # first, as another thread may do the same
        memory, self.memory = self.memory, None
        if process_group is not None:
            process_group.abort()
        if memory is not None:
            memory.close()

    def _exchange(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in the order of the ranks."""
        from torch import distributed as dist

        if x.is_cuda:
            parts = x.new_empty(self.size, *x.shape)
            options: Any = dist.distributed_c10d.AllgatherOptions()
            options.asyncOp = False
            _wait(self.process_group._allgather_base(parts, x.contiguous(), options))
        else:
            # Each rank sends all of x to every other at once. gloo's own all-reduce and all-gather go round a ring, in
            # several waits of two processes for each other: 2 to 4 times as long for what a CPU test sends.
            copies = x.expand(self.size, *x.shape).contiguous()
            parts = torch.empty_like(copies)
            _wait(self.process_group.alltoall_base(parts, copies, [], []))
        return list(parts.unbind())


def _wait(work: Any) -> None:
    """A collective on the caller's stream may have no work to wait for."""
    if work is not None:
        work.wait()


SINGLE = ParallelGroup()


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """One rank's attention heads. first_kv_head: the first of its num_kv_heads in the checkpoint's order."""

    num_heads: int
    num_kv_heads: int
    first_head: int
    first_kv_head: int


def split_heads(num_heads: int, num_kv_heads: int, group: ParallelGroup) -> HeadSplit:
    """Query heads are split evenly; KV heads too, or, where they are fewer than the ranks, each is held by several.

    Raises ConfigError if they do not divide.
    """
    size = group.size
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        possible = [n for n in range(1, 9) if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)]
        raise ConfigError(
            f"tensor_parallel_size={size} does not divide this model's {num_heads} attention heads and {num_kv_heads} "
            f"key-value heads. Possible: {', '.join(map(str, possible))}."
        )
    if num_kv_heads >= size:
        local = num_kv_heads // size
        return HeadSplit(num_heads // size, local, group.rank * num_heads // size, group.rank * local)
    return HeadSplit(num_heads // size, 1, group.rank * num_heads // size, group.rank * num_kv_heads // size)
