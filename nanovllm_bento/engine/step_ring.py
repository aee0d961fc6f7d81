"""A broadcast ring in shared memory: rank 0 publishes each step's inputs once, every other rank receives them.

The memory is a file without a name (memfd_create) that the ranks inherit, so there is nothing to collide with and
nothing to clean up. It holds a fixed number of slots of a fixed size. A message takes as many as it needs, one after
the other, also more than there are: the writer waits until the slowest reader has left the slot that it needs next. So
no message can overflow it, and none is lost.

Memory ordering. Every shared variable is an aligned 64-bit cell with one writer, stored and loaded by ``memoryview`` in
one instruction. Three orders matter: a slot's bytes before the count that announces it, the copy of a slot before the
count that frees it, and, between a reader that goes to sleep and the writer that must then wake it, each side's store
before its load of the other's cell. The last needs a full fence even on x86, all three need one on ARM. The standard
library's fence is a lock that is released and taken again: a locked read-modify-write each on x86; on ARM a
store-release followed by a load-acquire, which nothing passes in either direction.

Not responsible for who lives: a reader that has ended only stops reading, which the writer's ``timeout`` notices last.
"""

import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from nanovllm_bento.errors import RankError

_LINE = 128
"""Bytes that no two processes' cells share: a cache line, and the neighbour that is fetched with it."""
_CELL = 8
_HEADER = 8
"""Bytes before a slot's data: how much of its message is left, this slot's part included."""

_WRITTEN = 0
"""Cell of the writer: slots written so far. A slot is known by its number, the first is 1."""
_READ, _TAKEN, _DONE, _ASLEEP = range(4)
"""Cells of a reader: slots read; messages received; messages it has come back from; the slot it sleeps for, or 0."""

_LONGEST_NAP = 1e-3  # seconds between two looks of a writer that waits for room


class RingShape(msgspec.Struct, frozen=True):
    """Both sides must agree on it. The default holds a decode step of thousands of rows in one slot."""

    num_readers: int
    num_slots: int = 16
    slot_size: int = 64 * 1024
    """Bytes, a multiple of a cache line."""

    @property
    def num_bytes(self) -> int:
        return self.first_slot + self.num_slots * self.slot_size

    @property
    def first_slot(self) -> int:
        return (1 + self.num_readers) * _LINE

    @property
    def capacity(self) -> int:
        """Bytes of a message that fit one slot."""
        return self.slot_size - _HEADER


def create_ring(shape: RingShape) -> int:
    """The file descriptor of a new ring; it is not inherited unless the process is started with it in pass_fds."""
    assert shape.num_slots >= 1 and shape.slot_size > _HEADER and shape.slot_size % 64 == 0
    fd = os.memfd_create("nanovllm-step-ring", os.MFD_CLOEXEC)
    os.ftruncate(fd, shape.num_bytes)
    return fd


class _Ring:
    """The mapped memory, as bytes and as cells."""

    def __init__(self, fd: int, shape: RingShape) -> None:
        self.shape = shape
        self._map = mmap.mmap(fd, shape.num_bytes)
        self._bytes = memoryview(self._map)
        self._cells = self._bytes.cast("q")
        self._lock = threading.Lock()
        self._lock.acquire()

    def _fence(self) -> None:
        """No load or store moves across this, in the compiler or in the processor."""
        self._lock.release()
        self._lock.acquire()

    def _slot(self, number: int) -> int:
        """Where slot ``number`` begins, in bytes."""
        return self.shape.first_slot + (number - 1) % self.shape.num_slots * self.shape.slot_size

    def close(self) -> None:
        self._cells.release()
        self._bytes.release()
        self._map.close()


def _reader_cells(index: int) -> int:
    """The first cell of reader ``index`` (from 0)."""
    return (1 + index) * _LINE // _CELL


class RingWriter(_Ring):
    """Rank 0's side; for one thread at a time.

    doorbells: one connected socket a reader, on which a byte wakes it. timeout: seconds that a full ring waits for a
    reader which reads nothing; None: for ever. while_waiting: called now and then meanwhile; what it raises ends that.
    """

    def __init__(
        self,
        fd: int,
        shape: RingShape,
        doorbells: Sequence[socket.socket],
        *,
        timeout: float | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(fd, shape)
        assert len(doorbells) == shape.num_readers
        self.timeout, self.while_waiting = timeout, while_waiting
        self.num_published = 0
        self._num_written = 0
        self._last_free = shape.num_slots  # the last slot that is known to be free to write
        self._bells = [(_reader_cells(i), bell) for i, bell in enumerate(doorbells)]

    def publish(self, payload: bytes | bytearray | memoryview) -> None:
        """Put a message where all readers see it. Waits only while the ring is full.

        Raises RankError, which names the slowest rank, after ``timeout``; the ring is of no use then.
        """
        data = memoryview(payload)
        left, begin = data.nbytes, 0
        if left:
            data = data.cast("B")
        cells, capacity = self._cells, self.shape.capacity
        self.num_published += 1
        while True:
            number = self._num_written + 1
            if number > self._last_free:
                self._wait_for_room(number)
            start = self._slot(number)
            size = min(left, capacity)
            cells[start // _CELL] = left
            self._bytes[start + _HEADER : start + _HEADER + size] = data[begin : begin + size]
            self._fence()
            cells[_WRITTEN] = self._num_written = number
            self._fence()
            for reader, bell in self._bells:
                if cells[reader + _ASLEEP] == number:
                    _ring(bell)
            left -= size
            begin += size
            if not left:
                return

    def progress(self, index: int) -> tuple[int, int]:
        """Of reader ``index``: messages it has received, and messages it has done with (it asked for the next)."""
        cell = _reader_cells(index)
        return self._cells[cell + _TAKEN], self._cells[cell + _DONE]

    def _wait_for_room(self, number: int) -> None:
        nap, since, slowest = 20e-6, time.monotonic(), (-1, -1)
        while True:
            read = [self._cells[reader + _READ] for reader, _ in self._bells]
            now_slowest = min((count, index) for index, count in enumerate(read))
            self._last_free = now_slowest[0] + self.shape.num_slots
            if number <= self._last_free:
                self._fence()
                return
            if now_slowest != slowest:
                since, slowest = time.monotonic(), now_slowest
            silence = time.monotonic() - since
            if self.timeout is not None and silence > self.timeout:
                raise RankError(
                    f"tensor-parallel rank {slowest[1] + 1} has read nothing for {silence:.1f} s, and all "
                    f"{self.shape.num_slots} slots of the step ring wait for it."
                )
            self.while_waiting()
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)


def _ring(bell: socket.socket) -> None:
    try:
        bell.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass  # full: it has enough to wake up for; broken: it has ended, which is not our business


class RingReader(_Ring):
    """The side of rank ``index`` + 1.

    spin_seconds: how long it watches the memory before it sleeps on the doorbell. Watching costs a core and saves the
    wake-up, for both sides; worth it only where every rank has a core to itself and one to spare.
    """

    def __init__(
        self, fd: int, shape: RingShape, index: int, doorbell: socket.socket, *, spin_seconds: float = 0.0
    ) -> None:
        super().__init__(fd, shape)
        self.spin_seconds = spin_seconds
        self._doorbell = doorbell
        self._own = _reader_cells(index)
        self._num_read = self._num_taken = 0

    def receive(self) -> memoryview:
        """The next message, in memory of its own. To call it says that the message before is done with.

        Raises EOFError when the writer has gone.
        """
        self._cells[self._own + _DONE] = self._num_taken
        left, message = self._read_slot()
        if left > len(message):
            parts = [message]
            left -= len(message)
            while left:
                _, part = self._read_slot()
                parts.append(part)
                left -= len(part)
            message = b"".join(parts)
        self._num_taken += 1
        self._cells[self._own + _TAKEN] = self._num_taken
        return memoryview(message)

    def _read_slot(self) -> tuple[int, bytes]:
        """How much of the message is left, this slot's part included, and that part."""
        number = self._num_read + 1
        if self._cells[_WRITTEN] < number:
            self._wait_for(number)
        self._fence()
        start = self._slot(number)
        left = self._cells[start // _CELL]
        part = bytes(self._bytes[start + _HEADER : start + _HEADER + min(left, self.shape.capacity)])
        self._fence()
        self._cells[self._own + _READ] = self._num_read = number
        return left, part

    def _wait_for(self, number: int) -> None:
        cells, now = self._cells, time.perf_counter
        until = now() + self.spin_seconds
        while cells[_WRITTEN] < number:
            if now() < until:
                continue
            cells[self._own + _ASLEEP] = number
            self._fence()
            if cells[_WRITTEN] < number:  # else the writer may have looked before it could see that we sleep
                self._sleep()
            cells[self._own + _ASLEEP] = 0

    def _sleep(self) -> None:
        try:
            rung = self._doorbell.recv(4096)
        except ConnectionError:
            rung = b""
        if not rung:
            raise EOFError("the writer of the step ring has gone")
