"""How many tokens a chunk of a stream joins: one where the worker has time for it, more where it has not.

A chunk costs the worker about the same however many tokens it holds. So when its event loop is busy for most of the
time, or late, tokens are joined until it is not: streams get fewer chunks and no fewer tokens.
"""

import asyncio
import time

from nanovllm_bento.engine.client import Pace

INTERVAL = 0.1  # seconds between looks
BUSY, IDLE = 0.75, 0.35  # shares of the time; less than half of BUSY, as joining twice as many halves the work
LATE = 0.05  # seconds behind


class AdaptivePace(Pace):
    """``tokens`` follows the load of the event loop that ``start`` was called on, between 1 and ``most``."""

    __slots__ = ("_cpu", "_handle", "_loop", "_wall", "most")

    def __init__(self, most: int) -> None:
        super().__init__(1)
        self.most = most
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch the running event loop, on its own thread."""
        self._loop = asyncio.get_running_loop()
        self._wall, self._cpu = time.perf_counter(), time.thread_time()
        self._handle = self._loop.call_later(INTERVAL, self._look)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _look(self) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        self.adapt(wall - self._wall, cpu - self._cpu)
        self._wall, self._cpu = wall, cpu
        self._handle = self._loop.call_later(INTERVAL, self._look)

    def adapt(self, wall: float, cpu: float) -> None:
        """Take note of how the time between two looks, which should be INTERVAL, was spent; in seconds."""
        busy, late = cpu / wall, wall - INTERVAL
        if busy > BUSY or late > LATE:
            self.tokens = min(self.most, 2 * self.tokens)
        elif busy < IDLE and self.tokens > 1:
            self.tokens //= 2


def pace_of(stream_interval: int | None, most: int) -> Pace:
    """What ServiceConfig.stream_interval and max_stream_interval ask for."""
    return AdaptivePace(most) if stream_interval is None else Pace(stream_interval)
