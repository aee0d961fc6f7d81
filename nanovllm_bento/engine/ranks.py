"""Rank 0's side of the tensor-parallel ranks 1..n-1: starts their processes, feeds them, notices which one fails.

A thread owns the processes from start to end. It starts them, so that the kernel ends them with that thread
(PR_SET_PDEATHSIG goes by threads) whichever thread asked for them; it hears what they report, sees them die, and looks
whether they get on (rank_progress). The first failure is final: it is told once, and all ranks are killed.

What the ranks inherit has no name and no port: the step ring and the file in which their ParallelGroup meets are memory
files, and a socket pair for each rank wakes it, brings what it has to say, and ends it when rank 0 ends.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from nanovllm_bento import errors
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.rank_progress import HangDetector, RankState, StopDetector, usage
from nanovllm_bento.engine.rank_worker import DUMP_SIGNAL, FromRank, RankArgs, RankFailed, RankReady
from nanovllm_bento.engine.step_ring import RingShape, RingWriter, create_ring
from nanovllm_bento.errors import EngineDeadError, NanoVLLMError, RankError

logger = logging.getLogger(__name__)

DEFAULT_EXECUTOR = "nanovllm_bento.engine.model_runner:rank_executor"
_MODULE = "nanovllm_bento.engine.rank_worker"

SPIN_SECONDS = 0.05
"""How long a rank watches for the next step before it sleeps, where there are cores for it: longer than decode steps
take, for a rank that watches has a step's inputs within half the time of one that sleeps (benchmarks/step_ring.py)."""
_CORES_TO_SPIN = 4  # a rank: one that launches, one that watches, the threads of NCCL and of everybody else
_GRACE_SECONDS = 2.0
"""For ranks to end by themselves; then they are killed."""
_TEARDOWN_SECONDS = 10.0
"""For a process that is killed to be gone: the driver takes its time to free a GPU's memory."""
_FOLLOW_SECONDS = 0.3
"""After a rank's error: time for its cause to show, another rank's death of which that error is but the consequence."""
_DUMP_SECONDS = 0.1  # for a rank to write its stacks

_decoder = msgspec.json.Decoder(FromRank)


@dataclass(slots=True, eq=False)
class _Rank:
    rank: int
    label: str
    process: subprocess.Popen[bytes]
    pidfd: int
    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    ready: RankReady | None = None
    error: RankFailed | None = None


class Ranks:
    """Ranks 1..size-1 of an engine whose rank 0 is this process; they start at once, in the background.

    device: "cuda" or "cpu", of all ranks; on a CPU a step is computed when it is launched. executor: a
    rank_worker.MakeExecutor as "module:name".

    on_failure: called once, from the watching thread, with what ended the ranks: a RankError that names the rank, or
    the NanoVLLMError that a rank raised (a ConfigError, say). It may end the process; it must not call ``close``. All
    ranks have been killed before, so that a collective of rank 0 that waits for them on a CPU fails.
    """

    def __init__(
        self,
        config: EngineConfig,
        size: int,
        *,
        device: Literal["cpu", "cuda"],
        on_failure: Callable[[NanoVLLMError], None] = lambda error: None,
        executor: str = DEFAULT_EXECUTOR,
        log_format: Literal["text", "json"] = "text",
        log_level: str = "info",
        spin_seconds: float | None = None,
    ) -> None:
        self.size, self.device, self.on_failure = size, device, on_failure
        self.failure: NanoVLLMError | None = None
        self._config, self._executor = config, executor
        self._log_format, self._log_level = log_format, log_level
        self._spin_seconds = _spin_seconds(device, size) if spin_seconds is None else spin_seconds
        self._timeout = config.tensor_parallel_timeout
        self._hangs: HangDetector | None = None
        self._publisher = (0, 0)  # ident and native id of the thread that publishes
        self._closing = False
        self._changed = threading.Condition()
        self._ranks: list[_Rank] = []

        shape = RingShape(size - 1)
        self._ring_fd = create_ring(shape)
        self._store_fd = os.memfd_create("nanovllm-store", os.MFD_CLOEXEC)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pairs = [socket.socketpair() for _ in range(size - 1)]
        self._writer = RingWriter(self._ring_fd, shape, [ours for ours, _ in pairs], while_waiting=self.check)
        self._thread = threading.Thread(target=self._run, args=(pairs,), name="tensor-parallel-ranks", daemon=True)
        self._thread.start()

    @property
    def store(self) -> Path:
        """The file for ParallelGroup.connect of rank 0; it has the same name in every rank's process."""
        return Path(f"/proc/self/fd/{self._store_fd}")

    @property
    def pids(self) -> list[int]:
        """Of the ranks' processes that have been started, of rank 1 first."""
        return [rank.process.pid for rank in self._ranks]

    def publish(self, payload: bytes | bytearray | memoryview) -> None:
        """Give every rank the inputs of its next step. From one thread at a time.

        Waits only while the ranks are many steps behind. Raises the failure of a rank if there is one.
        """
        self.check()
        ident = threading.get_ident()
        if ident != self._publisher[0]:
            self._publisher = (ident, threading.get_native_id())
        self._writer.publish(payload)

    def wait_ready(self, timeout: float) -> list[dict[str, float]]:
        """Return once all ranks wait for steps, with the seconds that their phases took, of rank 1 first.

        Raises the failure of a rank if there is one, and RankError after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self.check()
                startup = [r.ready.startup_seconds for r in self._ranks if r.ready is not None]
                if len(startup) == self.size - 1:
                    return startup
                left = deadline - time.monotonic()
                if left <= 0:
                    late = [r.label for r in self._ranks if r.ready is None] or ["the tensor-parallel ranks"]
                    raise RankError(f"{' and '.join(late)} did not get ready within {timeout:g} s")
                self._changed.wait(left)

    def watch_steps(self) -> None:
        """From now on a rank that makes no progress with a step for tensor_parallel_timeout seconds counts as hung.

        To be called when the engine has warmed up: first steps may compile kernels.
        """
        self._writer.timeout = self._timeout
        self._hangs = HangDetector(self.size - 1, self._timeout, launch_computes=self.device == "cpu")
        os.eventfd_write(self._wake_fd, 1)

    def check(self) -> None:
        """Raises the failure of a rank if there is one, and EngineDeadError after ``close``."""
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))  # not that one itself: it would gather tracebacks
        if self._closing:
            raise EngineDeadError("The tensor-parallel ranks have been closed.")

    def cause(self, seconds: float = 2.0) -> NanoVLLMError | None:
        """The failure of a rank, for which it waits a moment: a collective of rank 0 that broke may come from it."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, seconds)
        return self.failure

    def close(self) -> None:
        """End all ranks and return when their processes are gone. May be called again."""
        if self._closing:
            return
        assert threading.current_thread() is not self._thread
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_GRACE_SECONDS + _TEARDOWN_SECONDS)
        if self._thread.is_alive():
            logger.error("the tensor-parallel ranks do not end, or on_failure does not return")
            return
        self._writer.close()
        for fd in (self._ring_fd, self._store_fd, self._wake_fd):
            os.close(fd)

    # -- the watching thread ------------------------------------------------------------------------------------------

    def _run(self, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        try:
            self._start(pairs)
            self._watch()
        except Exception as e:
            logger.exception("watching the tensor-parallel ranks failed")
            self._fail(RankError(f"The tensor-parallel ranks cannot be watched: {e}"))
        finally:
            self._end()
            for ours, theirs in pairs:
                ours.close()
                theirs.close()

    def _start(self, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        # Inherited: signals that are for rank 0 must not end a rank before it can ignore them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        for rank, (ours, theirs) in enumerate(pairs, start=1):
            if self._closing:
                return
            args = RankArgs(
                config=self._config.model_dump(mode="json"),
                rank=rank,
                size=self.size,
                parent_pid=os.getpid(),
                connection_fd=theirs.fileno(),
                ring_fd=self._ring_fd,
                ring_shape=self._writer.shape,
                spin_seconds=self._spin_seconds,
                store=str(self.store),
                executor=self._executor,
                log_format=self._log_format,
                log_level=self._log_level,
            )
            process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno(), self._ring_fd, self._store_fd],
            )
            label = f"tensor-parallel rank {rank} (pid {process.pid}{_device_name(self.device, rank)})"
            with self._changed:
                self._ranks.append(_Rank(rank, label, process, os.pidfd_open(process.pid), ours))
            theirs.close()
            assert process.stdin is not None
            try:
                with process.stdin as pipe:
                    pipe.write(msgspec.json.encode(args))
            except BrokenPipeError:
                pass  # it has ended, which is seen below

    def _watch(self) -> None:
        """Return when the ranks are to be closed, or have failed."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        by_fd: dict[int, _Rank] = {}
        for rank in self._ranks:
            for fd in (rank.pidfd, rank.connection.fileno()):
                by_fd[fd] = rank
                poller.register(fd, select.POLLIN)
        failed: list[_Rank] = []  # in the order in which they did
        judge_at = float("inf")
        next_look = 0.0
        interval = min(0.5, self._timeout / 8)
        starting = StopDetector(len(self._ranks), self._timeout)
        while not self._closing:
            until = judge_at if failed else next_look
            for fd, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                rank = by_fd[fd]
                is_open = self._hear(rank)
                if not is_open or fd == rank.pidfd:
                    poller.unregister(fd)
                    if rank not in failed:
                        failed.append(rank)
                    has_ended = fd == rank.pidfd or rank.error is not None
                    judge_at = min(judge_at, time.monotonic() + (_FOLLOW_SECONDS if has_ended else _TEARDOWN_SECONDS))
            now = time.monotonic()
            killed = [rank for rank in failed if (rank.process.poll() or 0) < 0]
            if killed or now >= judge_at:
                return self._fail(_why(killed[0] if killed else failed[0]))
            if now >= next_look and not failed:
                next_look = now + interval
                if self._look(now, starting):
                    return

    def _hear(self, rank: _Rank) -> bool:
        """Take what a rank has sent; whether there may be more."""
        while True:
            try:
                data = rank.connection.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            rank.received += data
            *lines, rest = rank.received.split(b"\n")
            rank.received = rest
            for line in lines:
                message = _decoder.decode(line)
                with self._changed:
                    if isinstance(message, RankReady):
                        rank.ready = message
                    else:
                        rank.error = message
                    self._changed.notify_all()

    def _look(self, now: float, starting: StopDetector) -> bool:
        """Whether a rank hangs, which is then told."""
        usages = [usage(rank.process.pid) for rank in self._ranks]
        if self._hangs is None:
            hang = starting.look(now, usages)
        else:
            states = [RankState(*self._writer.progress(i), used) for i, used in enumerate(usages)]
            publisher = usage(os.getpid(), self._publisher[1])
            hang = self._hangs.look(now, self._writer.num_published, publisher.seconds, states)
        if hang is None:
            return False
        names = " and ".join(self._ranks[place].label for place in hang.places)
        logger.error("%s %s", names, hang.reason)
        for rank in self._ranks:
            logger.error("the stacks of %s:", rank.label)
            rank.process.send_signal(DUMP_SIGNAL)
            time.sleep(_DUMP_SECONDS)  # or they would write into each other's lines
        self._fail(RankError(f"{names} {hang.reason}"))
        return True

    def _fail(self, error: NanoVLLMError) -> None:
        with self._changed:
            if self.failure is not None or self._closing:
                return
            self.failure = error
            self._changed.notify_all()
        for rank in self._ranks:
            rank.process.kill()
        try:
            self.on_failure(error)
        except Exception:
            logger.exception("the failure of a rank could not be told")

    def _end(self) -> None:
        for rank in self._ranks:
            try:
                rank.connection.shutdown(socket.SHUT_RDWR)  # more than to close it: it may have been inherited
            except OSError:
                pass
        deadline = time.monotonic() + _GRACE_SECONDS
        for rank in self._ranks:
            ended, _, _ = select.select([rank.pidfd], [], [], max(0.0, deadline - time.monotonic()))
            if not ended:
                logger.warning("%s does not end; killing it", rank.label)
                rank.process.kill()
                select.select([rank.pidfd], [], [], _TEARDOWN_SECONDS)
            if rank.process.poll() is None:
                logger.error("%s does not end even when killed", rank.label)
            os.close(rank.pidfd)


def _why(rank: _Rank) -> NanoVLLMError:
    """The failure that the end of a rank, or its last words, amount to."""
    code, error = rank.process.poll(), rank.error
    if code is not None and code < 0:
        return RankError(f"{rank.label} died of signal {-code} ({signal.Signals(-code).name})")
    if error is None:
        return RankError(f"{rank.label} " + ("does not answer" if code is None else f"exited with {code}"))
    kind = getattr(errors, error.kind, None) if error.kind else None
    if isinstance(kind, type) and issubclass(kind, NanoVLLMError):
        return kind(error.text)
    return RankError(f"{rank.label} exited with 1: {error.text}")


def _device_name(device: str, rank: int) -> str:
    """Of a rank's GPU, as the machine counts them, after a comma; nothing on a CPU."""
    if device != "cuda":
        return ""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return f", GPU {visible[rank].strip() if rank < len(visible) else rank}"


def _spin_seconds(device: str, size: int) -> float:
    has_cores = len(os.sched_getaffinity(0)) >= _CORES_TO_SPIN * size
    return SPIN_SECONDS if device == "cuda" and has_cores else 0.0
