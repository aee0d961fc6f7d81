"""Numbers that several API workers count and any of them can sum: float64 in files of the service's IPC folder.

The files are mapped into memory, so that counting costs no system call, and an aligned float64 is written in one piece,
so that reading needs no lock. Knows nothing of what the numbers mean: that is metrics.py.
"""

import fcntl
import itertools
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

_HEADER = struct.Struct("<8sQ")  # magic, and what the numbers mean: files of another layout are not read
_MAGIC = b"nanovllm"
_FLOAT = 8  # bytes


class _Layout:
    """``size`` float64 values after a header; ``version`` is a number that changes with their meaning."""

    def __init__(self, size: int, version: int) -> None:
        self.size = size
        self.header = _HEADER.pack(_MAGIC, version)
        self.length = len(self.header) + size * _FLOAT

    def map(self, fd: int) -> "memoryview[float]":
        """The values of an open file, which is made anew if it is not of this layout."""
        if os.fstat(fd).st_size != self.length or os.pread(fd, len(self.header), 0) != self.header:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, self.length)
            os.pwrite(fd, self.header, 0)
        return memoryview(mmap.mmap(fd, self.length))[len(self.header) :].cast("d")

    def sum(self, files: Iterable[Path]) -> list[float]:
        """The sums over all files that can be read and are of this layout."""
        total = [0.0] * self.size
        for file in files:
            try:
                data = file.read_bytes()
            except OSError:
                continue
            if len(data) == self.length and data.startswith(self.header):
                total = [a + b for a, b in zip(total, array("d", data[len(self.header) :]), strict=True)]
        return total


class WorkerCounters:
    """This worker's values, private until ``open``, then in a file of its own beside those of the other workers.

    A file is locked by the worker that counts into it for as long as that lives. A new worker takes one that nobody
    holds and goes on from its numbers, so the sum never falls when workers end, and there are hardly ever more files
    than there were workers at one time. ``gauges``: the places of values that end with their worker.
    """

    def __init__(self, size: int, version: int, gauges: Sequence[int] = ()) -> None:
        self.values: memoryview[float] = memoryview(bytearray(size * _FLOAT)).cast("d")
        self._gauges = gauges
        self._layout = _Layout(size, version)
        self._folder: Path | None = None
        self._fd = -1

    def open(self, folder: Path) -> None:
        """Count into a file of ``folder`` from now on, beginning with what was counted so far. Raises OSError."""
        for number in itertools.count():
            fd = os.open(folder / f"worker{number}.metrics", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                os.close(fd)
        values = self._layout.map(fd)
        for place in self._gauges:
            values[place] = 0.0
        for i, value in enumerate(self.values):
            values[i] += value
        self._fd, self._folder, self.values = fd, folder, values

    def close(self) -> None:
        """Leave the file and its numbers to the next worker."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # closing is not enough: the mapping keeps a descriptor of its own
            os.close(self._fd)
            self._fd = -1

    def total(self) -> list[float]:
        """The sums over all workers, also those that ended."""
        files = self._files()
        return self._layout.sum(files) if files else list(self.values)  # the folder goes when the service ends

    def living(self) -> list[float]:
        """The sums over the workers that run: what gauges mean."""
        files = self._files()
        return self._layout.sum(filter(is_locked, files)) if files else list(self.values)

    def _files(self) -> list[Path]:
        return [] if self._folder is None else list(self._folder.glob("worker*.metrics"))


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of ``file``; the kernel takes it from one that ends, however it does."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class EpochTotals:
    """Totals of an engine that begins at 0 whenever it is restarted, as sums that never fall and never count twice.

    Each epoch of the engine has a file with the highest totals that any worker heard of it; their sum is the answer. A
    value in a file only grows, so it does not matter which worker hears what first, nor if one is killed as it writes.
    """

    def __init__(self, size: int, version: int) -> None:
        self._layout = _Layout(size, version)
        self._folder: Path | None = None
        self._epoch = -1
        self._fd = -1
        self._values: memoryview[float] = memoryview(b"").cast("d")
        self._private: dict[int, list[float]] = {}  # epoch → totals, until ``open``

    def open(self, folder: Path) -> None:
        """Share the totals with the other workers through files of ``folder``."""
        self._folder = folder
        for epoch, totals in sorted(self._private.items()):
            self.record(epoch, totals)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def record(self, epoch: int, totals: Sequence[float]) -> None:
        """Take the totals that the engine of ``epoch`` has reached. News of an older epoch changes nothing."""
        assert len(totals) == self._layout.size
        if self._folder is None:
            known = self._private.get(epoch, totals)
            self._private[epoch] = [float(max(pair)) for pair in zip(known, totals, strict=True)]
            return
        if epoch < self._epoch:
            return
        if epoch > self._epoch:
            self.close()
            file = self._folder / f"engine{epoch}.metrics"
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Held for microseconds; if it is not free, the next call brings the news, and the event loop never waits.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if epoch > self._epoch:
            self._values, self._epoch = self._layout.map(self._fd), epoch
        for i, value in enumerate(totals):
            if value > self._values[i]:
                self._values[i] = value
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def total(self) -> tuple[int, list[float]]:
        """The highest epoch that was heard of (-1: none), and the sums over all epochs."""
        if self._folder is None:
            nothing = [0.0] * self._layout.size
            return max(self._private, default=-1), [sum(c) for c in zip(nothing, *self._private.values(), strict=True)]
        files = list(self._folder.glob("engine[0-9]*.metrics"))
        epochs = [int(file.stem.removeprefix("engine")) for file in files]
        return max(epochs, default=-1), self._layout.sum(files)
