"""Who goes next: callers take turns at the engine, so that a long queue of one does not delay another's one request.

The engine's own queue is first come, first served. So a worker hands it only a little more than it can run at once, and
keeps the rest here, a queue per caller: the most urgent priority first, callers of the same priority in turn.
"""

import asyncio
from collections import OrderedDict, deque


class FairQueue:
    """``capacity``: sequences that may be beyond this queue at once; a larger request passes when there is none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_inside = 0
        self.num_held = 0
        """Sequences that wait here."""
        # priority -> caller -> its waiting requests; the caller whose turn it is comes first
        self._waiting: dict[int, OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]]] = {}

    async def enter(self, name: str, priority: int, num: int) -> None:
        """Return when it is the turn of ``num`` sequences of a caller; ``leave`` must be called for them then."""
        if not self._waiting and self._has_room(num):
            self.num_inside += num
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(priority, OrderedDict()).setdefault(name, deque()).append((num, turn))
        self.num_held += num
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self.leave(num)
            else:
                self._forget(name, priority, num, turn)
                self._let_in()
            raise

    def leave(self, num: int) -> None:
        """``num`` sequences have ended."""
        self.num_inside -= num
        self._let_in()

    def _has_room(self, num: int) -> bool:
        return self.num_inside + num <= self.capacity or not self.num_inside

    def _let_in(self) -> None:
        while self._waiting:
            priority = min(self._waiting)
            callers = self._waiting[priority]
            name = next(iter(callers))
            num, turn = callers[name][0]
            if not self._has_room(num):
                return
            callers.move_to_end(name)
            self._forget(name, priority, num, turn)
            self.num_inside += num
            turn.set_result(None)

    def _forget(self, name: str, priority: int, num: int, turn: "asyncio.Future[None]") -> None:
        callers = self._waiting[priority]
        callers[name].remove((num, turn))
        self.num_held -= num
        if not callers[name]:
            del callers[name]
            if not callers:
                del self._waiting[priority]
