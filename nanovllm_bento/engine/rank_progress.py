"""Which tensor-parallel rank hangs: judged from what each has received and finished, and from who computes meanwhile.

A rank that is behind and has done nothing for ``timeout`` seconds hangs, with one exception. On a CPU, where launching
a step is computing it, a step may rightly take longer than that, and then no rank can be told from another by its
counts. But some thread computes: as long as rank 0's does, nothing is wrong, and when it has long been idle in the
middle of a step it waits in a collective for a rank that does not come. Only counts, clocks and /proc are needed, so
the ranks send nothing for it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")  # of /proc's CPU times, a second
_BUSY = 0.5
"""Share of the time that a rank must have computed to be the one whom all others wait for."""
_AT_WORK = 0.02
"""Share of the time between two looks that rank 0's thread must have computed for its step to be going on."""


class Usage(NamedTuple):
    """What a thread is at. seconds: of CPU, since it began. is_stopped: by SIGSTOP or a debugger."""

    seconds: float
    is_stopped: bool


def usage(pid: int, thread_id: int | None = None) -> Usage:
    """Of one thread of a process, by default its main thread; nothing used if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/task/{thread_id or pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Usage(0.0, False)
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, fields 14 and 15 of proc(5)'s list; state is field 3
    return Usage(ticks / _TICKS, fields[0] in "Tt")


class RankState(NamedTuple):
    """num_taken: steps received; num_done: steps finished, that is the next one was asked for."""

    num_taken: int
    num_done: int
    usage: Usage


class Hang(NamedTuple):
    """Ranks (their place among those looked at) that hang, all for the same reason, which follows their names."""

    places: list[int]
    reason: str


@dataclass(slots=True)
class _Seen:
    num_taken: int = 0
    num_done: int = 0
    since: float = 0.0
    seconds: float = 0.0


class StopDetector:
    """Fed with looks at ranks that start, says who has been stopped for ``timeout`` seconds (a debugger, SIGSTOP).

    Nothing else can be told then: a rank that waits for the others or for a slow disk computes nothing either.
    """

    def __init__(self, num_ranks: int, timeout: float) -> None:
        self.timeout = timeout
        self._stopped_since: list[float | None] = [None] * num_ranks

    def look(self, now: float, usages: Sequence[Usage]) -> Hang | None:
        """now: of a monotonic clock."""
        for place, usage in enumerate(usages):
            since = self._stopped_since[place]
            self._stopped_since[place] = (now if since is None else since) if usage.is_stopped else None
        late = [i for i, since in enumerate(self._stopped_since) if since is not None and now - since >= self.timeout]
        have = "has" if len(late) == 1 else "have"
        return Hang(late, f"{have} been stopped for {self.timeout:g} s while starting") if late else None


class HangDetector:
    """Fed with looks at the ranks, says who hangs. It needs several looks within ``timeout`` seconds.

    launch_computes: whether a rank's step has been computed when it is launched (CPUs); if not, launching is quick.
    """

    def __init__(self, num_ranks: int, timeout: float, *, launch_computes: bool) -> None:
        self.timeout, self.launch_computes = timeout, launch_computes
        self._ranks = [_Seen() for _ in range(num_ranks)]
        self._num_published = 0
        self._publisher_seconds = 0.0
        self._looked = float("-inf")

    def look(self, now: float, num_published: int, publisher_seconds: float, ranks: Sequence[RankState]) -> Hang | None:
        """now: of a monotonic clock. publisher_seconds: CPU time of the thread that publishes the steps."""
        elapsed = now - self._looked
        goes_on = (
            num_published != self._num_published
            or elapsed > self.timeout / 2  # this process was held up itself, and so may the ranks have been
            or (self.launch_computes and publisher_seconds - self._publisher_seconds > _AT_WORK * elapsed)
        )
        self._looked, self._num_published, self._publisher_seconds = now, num_published, publisher_seconds
        late = []
        for place, (seen, rank) in enumerate(zip(self._ranks, ranks, strict=True)):
            counts = (rank.num_taken, rank.num_done)
            if goes_on or rank.num_done == num_published or counts != (seen.num_taken, seen.num_done):
                seen.num_taken, seen.num_done = counts
                seen.since, seen.seconds = now, rank.usage.seconds
            elif now - seen.since >= self.timeout:
                late.append(place)
        return self._judge(now, num_published, ranks, late) if late else None

    def _judge(self, now: float, num_published: int, ranks: Sequence[RankState], late: list[int]) -> Hang:
        """Who of those that are late makes the others wait."""
        if stopped := [place for place in late if ranks[place].usage.is_stopped]:
            return self._hang(now, stopped, num_published, ranks, " (it is stopped)")
        if behind := [place for place in late if ranks[place].num_taken < num_published]:
            return self._hang(now, behind, num_published, ranks)
        busy = [place for place in late if self._share(now, place, ranks) > _BUSY]
        if busy and len(busy) < len(late):
            return self._hang(now, busy, num_published, ranks, " (it computes, the others wait)")
        return self._hang(now, late, num_published, ranks)

    def _share(self, now: float, place: int, ranks: Sequence[RankState]) -> float:
        seen = self._ranks[place]
        return (ranks[place].usage.seconds - seen.seconds) / (now - seen.since)

    def _hang(
        self, now: float, places: list[int], num_published: int, ranks: Sequence[RankState], remark: str = ""
    ) -> Hang:
        first = ranks[places[0]]
        have = "has" if len(places) == 1 else "have"
        what = "taken up" if first.num_taken < num_published else "finished"
        step = first.num_taken + 1 if first.num_taken < num_published else first.num_taken
        seconds = now - min(self._ranks[place].since for place in places)
        return Hang(places, f"{have} not {what} step {step} for {seconds:.0f} s{remark}")
