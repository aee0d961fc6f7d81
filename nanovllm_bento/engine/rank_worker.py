"""The process of a tensor-parallel rank other than 0: takes up each step's inputs and executes them. See ranks.py.

It lives for rank 0 alone. It ends when rank 0's process ends in whatever way, also while it loads or hangs in a
collective: a thread waits for the end of the socket between the two, and the kernel kills the process in case that
thread cannot run. Signals that end programs are rank 0's business.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import msgspec

from nanovllm_bento import log_format
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.step_ring import RingReader, RingShape
from nanovllm_bento.errors import NanoVLLMError

logger = logging.getLogger("nanovllm_bento.engine.rank_worker")  # its __name__ is __main__

DUMP_SIGNAL = signal.SIGUSR1
"""At which a rank writes the stacks of its threads to standard error."""
_PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """What runs a rank's steps."""

    def execute(self, payload: memoryview) -> None:
        """Do this rank's part of a step, as far as the host has one; the payload stays valid as long as it is held."""


MakeExecutor = Callable[[EngineConfig, int, int, Path], Executor]
"""(config, rank, size, store) -> the executor of that rank. It may have ``startup_seconds``, a dict of str to float.

store: for ParallelGroup.connect, the same file on all ranks.
"""


class RankArgs(msgspec.Struct):
    """What a rank's process is told on its standard input (JSON). config: keywords of EngineConfig.

    parent_pid: rank 0's process. *_fd: inherited file descriptors. executor: a MakeExecutor, as "module:name".
    """

    config: dict[str, Any]
    rank: int
    size: int
    parent_pid: int
    connection_fd: int
    ring_fd: int
    ring_shape: RingShape
    spin_seconds: float
    store: str
    executor: str
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


class RankReady(msgspec.Struct, tag="ready"):
    """rank → rank 0: it waits for steps. startup_seconds: of its executor's phases."""

    startup_seconds: dict[str, float]


class RankFailed(msgspec.Struct, tag="failed"):
    """rank → rank 0: why it ends. kind: the class of errors.py that ``text`` is the message of; "" for any other."""

    kind: str
    text: str


FromRank = RankReady | RankFailed
"""Sent as JSON, one message a line."""


def end_with_rank_0(connection: socket.socket, parent_pid: int) -> None:
    """See to it that this process ends when rank 0's does."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        logger.warning("no prctl here: this rank notices the end of rank 0 only while Python can run")
    if os.getppid() != parent_pid:  # it ended before the kernel knew that we care
        os._exit(0)

    def wait() -> None:
        poller = select.poll()
        poller.register(connection, 0)  # nothing but its end
        poller.poll()
        os._exit(0)

    threading.Thread(target=wait, name="end-with-rank-0", daemon=True).start()


def main() -> None:
    """Entry point of the process. Exit code 0: rank 0 has gone; 1: an error, of which rank 0 is told."""
    args = msgspec.json.decode(sys.stdin.buffer.read(), type=RankArgs)
    connection = socket.socket(fileno=args.connection_fd)
    log_format.set_up(args.log_format, f"rank {args.rank}", level=args.log_level)
    end_with_rank_0(connection, args.parent_pid)
    signals = {signal.SIGTERM, signal.SIGINT}
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # rank 0 starts us with them blocked
    faulthandler.register(DUMP_SIGNAL, all_threads=True)

    started = time.perf_counter()
    try:
        executor = _executor_maker(args.executor)(
            EngineConfig.create(env={}, **args.config), args.rank, args.size, Path(args.store)
        )
        seconds = dict(getattr(executor, "startup_seconds", {})) | {"total": time.perf_counter() - started}
        ring = RingReader(args.ring_fd, args.ring_shape, args.rank - 1, connection, spin_seconds=args.spin_seconds)
        gc.collect()
        gc.freeze()  # what start-up made stays
        _send(connection, RankReady(seconds))
        while True:
            executor.execute(ring.receive())
    except EOFError:
        os._exit(0)
    except BaseException as e:
        _fail(connection, e)


def _executor_maker(dotted: str) -> MakeExecutor:
    module, _, name = dotted.partition(":")
    maker: MakeExecutor = getattr(import_module(module), name)
    return maker


def _fail(connection: socket.socket, error: BaseException) -> NoReturn:
    if isinstance(error, NanoVLLMError):
        failed = RankFailed(type(error).__name__, str(error))
    else:
        logger.critical("the rank failed", exc_info=error)
        failed = RankFailed("", traceback.format_exception_only(error)[-1].splitlines()[0])
    try:
        _send(connection, failed)
    finally:
        os._exit(1)  # without waiting for threads, of which some may hang in a collective


def _send(connection: socket.socket, message: FromRank) -> None:
    connection.sendall(msgspec.json.encode(message) + b"\n")


if __name__ == "__main__":
    main()
