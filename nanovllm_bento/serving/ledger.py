"""What each caller uses, counted over all API workers: open sequences, and leaky buckets of requests and tokens.

The workers of a service map one file of the IPC folder; a lock makes check and count one act, so that together they
never allow more than the limit. Each worker counts its open sequences in a column of its own, which counts no more
once that worker has ended, however it did. Without a folder the table is this process's own.

A bucket holds what was used and leaks at the limit's rate, a minute's worth at most: an empty one (zeros) is an unused
one, and a limit that changes needs no conversion.
"""

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nanovllm_bento.errors import ConfigError
from nanovllm_bento.serving.counters import is_locked
from nanovllm_bento.serving.errors import OverloadedError

MAX_WORKERS = 64
_NUM_ROWS = 4096  # twice the callers' limit and more: names come and go with the keys' file
_LOCK_PATIENCE = 0.05  # seconds; the lock is held for microseconds, unless its holder was stopped
_DIGEST = 16
_BUCKETS = struct.Struct("<ddd")  # requests used, tokens used, when they were last true (CLOCK_MONOTONIC)
_OPEN = struct.Struct(f"<{MAX_WORKERS}i")
_CELL = struct.Struct("<i")
_ROW = _DIGEST + _BUCKETS.size + _OPEN.size
_MINUTE = 60.0


class Ledger:
    """The table, and as a context manager its lock. Raises ConfigError where more than MAX_WORKERS workers share it."""

    def __init__(self, folder: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, int] = {}
        self._column = 0
        self._folder = folder
        self._table: mmap.mmap | bytearray
        self._lock_file = self._alive_file = -1
        self._num_locks = 0
        if folder is None:
            self._table = bytearray(_NUM_ROWS * _ROW)
            return
        self._lock_file = _open(folder / "limits")
        with self:
            if os.fstat(self._lock_file).st_size != _NUM_ROWS * _ROW:
                os.ftruncate(self._lock_file, 0)
                os.ftruncate(self._lock_file, _NUM_ROWS * _ROW)
            self._table = mmap.mmap(self._lock_file, _NUM_ROWS * _ROW)
            self._claim_column(folder)

    def close(self) -> None:
        """Let go of the file; what this worker had open counts no more."""
        for file in (self._alive_file, self._lock_file):
            if file >= 0:
                os.close(file)
        self._lock_file = self._alive_file = -1
        if isinstance(self._table, mmap.mmap):
            self._table.close()

    def __enter__(self) -> "Ledger":
        """Nobody else changes the table inside. May be nested. Raises OverloadedError if the lock stays taken."""
        if self._lock_file >= 0 and not self._num_locks:
            deadline = 0.0
            while True:
                try:
                    fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    now = time.monotonic()
                    deadline = deadline or now + _LOCK_PATIENCE
                    if now > deadline:
                        raise OverloadedError("The limits cannot be looked up now. Try again later.") from None
                    os.sched_yield()
        self._num_locks += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._num_locks -= 1
        if self._lock_file >= 0 and not self._num_locks:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    # -- open sequences -----------------------------------------------------------------------------------------------

    def num_open(self, name: str) -> int:
        """Sequences of a caller that living workers have open. To be called with the lock."""
        counts = _OPEN.unpack_from(self._table, self._row(name) + _DIGEST + _BUCKETS.size)
        return sum(n for column, n in enumerate(counts) if n and self._is_alive(column))

    def add_open(self, name: str, num: int) -> None:
        """Count sequences as open in this worker, or with a negative number as closed. Needs no lock."""
        cell = self._row(name) + _DIGEST + _BUCKETS.size + self._column * _CELL.size
        _CELL.pack_into(self._table, cell, max(0, _CELL.unpack_from(self._table, cell)[0] + num))

    # -- buckets ------------------------------------------------------------------------------------------------------

    def used(self, name: str, rates: tuple[int | None, int | None]) -> tuple[float, float]:
        """Requests and tokens in a caller's buckets now; ``rates`` are their limits a minute. With the lock."""
        requests, tokens, then = _BUCKETS.unpack_from(self._table, self._row(name) + _DIGEST)
        minutes = (self._clock() - then) / _MINUTE
        if minutes < 0:  # the table is from before the machine was started
            return 0.0, 0.0
        requests = requests - rates[0] * minutes if rates[0] else 0.0
        tokens = tokens - rates[1] * minutes if rates[1] else 0.0
        return (requests if requests > 0 else 0.0), (tokens if tokens > 0 else 0.0)

    def set_used(self, name: str, requests: float, tokens: float) -> None:
        """What is in a caller's buckets now. With the lock that ``used`` was called with."""
        _BUCKETS.pack_into(self._table, self._row(name) + _DIGEST, requests, tokens, self._clock())

    # -- rows and columns ---------------------------------------------------------------------------------------------

    def _row(self, name: str) -> int:
        """Where a caller's row begins: found by its name's hash, taken if there is none yet."""
        offset = self._rows.get(name)
        if offset is not None:
            return offset
        digest = hashlib.sha256(name.encode()).digest()[:_DIGEST]
        start = int.from_bytes(digest[:4], "little")
        with self:
            for i in range(_NUM_ROWS):
                offset = (start + i) % _NUM_ROWS * _ROW
                there = self._table[offset : offset + _DIGEST]
                if there == bytes(_DIGEST):
                    self._table[offset : offset + _DIGEST] = digest
                    there = digest
                if there == digest:
                    self._rows[name] = offset
                    return offset
        raise OverloadedError("There were too many different API keys since the service started.")

    def _claim_column(self, folder: Path) -> None:
        for column in range(MAX_WORKERS):
            file = _open(folder / f"limits.{column}")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            self._alive_file, self._column = file, column
            for row in range(0, _NUM_ROWS * _ROW, _ROW):  # what a worker that was killed left behind
                cell = row + _DIGEST + _BUCKETS.size + column * _CELL.size
                if self._table[cell : cell + _CELL.size] != bytes(_CELL.size):
                    _CELL.pack_into(self._table, cell, 0)
            return
        raise ConfigError(f"at most {MAX_WORKERS} workers can share limits.")

    def _is_alive(self, column: int) -> bool:
        """Whether the worker of a column still runs."""
        return self._folder is None or column == self._column or is_locked(self._folder / f"limits.{column}")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
