"""Ends an API worker with the process that it works for."""

import asyncio
import logging
import os
import signal

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds between SIGTERM, on which open answers may end, and the end."""


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
