"""How long tokens of a stream are joined in one chunk: not at all where the worker has time, else for a moment.

A chunk costs the worker about the same however many tokens it holds. So when its event loop is busy for most of the
time, or late, the tokens that come within a moment are joined, and the moment doubles until it is not. A bound in time
and not in tokens: of a fast engine many tokens are joined, which nobody sees; a slow one's come one by one as ever, as
a gap between chunks is never longer than the moment and one token's time.
"""

import asyncio
import time

from nanovllm_bento.engine.client import Pace

INTERVAL = 0.1  # seconds between looks
BUSY, IDLE = 0.75, 0.35  # shares of the time; less than half of BUSY, as joining twice as many halves the work
LATE = 0.05  # seconds behind
SHORTEST = 0.0025  # seconds


class AdaptivePace(Pace):
    """``seconds`` follows the load of the event loop that ``start`` was called on, between none and ``longest``."""

    __slots__ = ("_cpu", "_handle", "_loop", "_wall", "longest")

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest
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
            self.seconds = min(self.longest, max(SHORTEST, 2 * self.seconds))
        elif busy < IDLE and self.seconds:
            self.seconds = self.seconds / 2 if self.seconds > SHORTEST else 0.0


def pace_of(stream_interval: int | None, max_delay_ms: float) -> Pace:
    """What ServiceConfig.stream_interval and max_stream_delay_ms ask for."""
    return AdaptivePace(max_delay_ms / 1000) if stream_interval is None else Pace(stream_interval)
