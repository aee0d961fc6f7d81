"""How an API worker ends: with the process that it works for, and on SIGTERM once its requests have."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds between SIGTERM, on which open answers may end, and the end."""
_MAIN_PID = "_NANOVLLM_MAIN_PID"


def name_main_process() -> None:
    """Tell the workers that this process is about to start that they are its own."""
    os.environ[_MAIN_PID] = str(os.getpid())


def main_pid() -> int:
    """The process that this worker works for: it has said so, or it is the parent.

    The parent alone will not do: a worker that still imports when ``bentoml serve`` is killed gets another, which never
    ends; nor would the worker then, with an engine of its own.
    """
    return int(os.environ.get(_MAIN_PID) or os.getppid())


def end_with(pid: int) -> None:
    """End this process when process ``pid`` ends. BentoML's workers would go on without ``bentoml serve``, on its port.

    To be called on the event loop's thread. Linux only; elsewhere it does nothing.
    """
    if not hasattr(os, "pidfd_open"):
        return
    loop = asyncio.get_running_loop()

    def end() -> None:
        logger.warning("Process %d, which this worker belongs to, has ended: ending too.", pid)
        loop.call_later(GRACE, os._exit, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        end()
        return

    def on_end() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        end()

    loop.add_reader(pidfd, on_end)


def drain_on_sigterm(drain: Callable[[], Awaitable[None]]) -> None:
    """On SIGTERM run ``drain`` while the server still answers (with 503), and only then have it end as it would have.

    The server's own way, which BentoML gives no bound by default, is to refuse connections at once and to wait for open
    requests for ever. To be called on the event loop's thread, with the server's handlers installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # a server within another program, which has the signals
    loop = asyncio.get_running_loop()
    server = signal.getsignal(signal.SIGTERM)
    tasks: list[asyncio.Task[None]] = []

    async def end() -> None:
        try:
            await drain()
        except Exception:
            logger.exception("draining failed")
        loop.call_later(GRACE, os._exit, 0)  # if clients that do not read hold the server up
        if callable(server):
            server(signal.SIGTERM, None)

    def begin() -> None:
        if not tasks:
            tasks.append(asyncio.create_task(end()))

    def on_signal(signum: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(begin)

    signal.signal(signal.SIGTERM, on_signal)
