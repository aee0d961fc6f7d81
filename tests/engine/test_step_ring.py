"""The step ring: whatever is published arrives, in order, at every reader, however slow it is."""

import os
import socket
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm_bento.engine.step_ring import RingReader, RingShape, RingWriter, create_ring
from nanovllm_bento.errors import RankError

SLOT = 64
CAPACITY = RingShape(1, 4, SLOT).capacity


class Ring:
    """A writer and readers in one process; each maps the memory for itself."""

    def __init__(self, num_readers: int, num_slots: int = 4, spin_seconds: float = 0.0, **writer: object) -> None:
        shape = RingShape(num_readers, num_slots, SLOT)
        fd = create_ring(shape)
        self.pairs = [socket.socketpair() for _ in range(num_readers)]
        self.writer = RingWriter(fd, shape, [ours for ours, _ in self.pairs], **writer)  # type: ignore[arg-type]
        self.readers = [
            RingReader(fd, shape, i, theirs, spin_seconds=spin_seconds) for i, (_, theirs) in enumerate(self.pairs)
        ]
        os.close(fd)

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self.pairs:
            for end in pair:
                end.close()
        for side in (self.writer, *self.readers):
            side.close()


class Received(threading.Thread):
    """A reader at work: takes ``count`` messages, when it is allowed to."""

    def __init__(self, reader: RingReader, count: int) -> None:
        super().__init__(daemon=True)
        self.reader, self.count = reader, count
        self.messages: list[bytes] = []
        self.gate = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        self.gate.wait()
        try:
            for _ in range(self.count):
                self.messages.append(bytes(self.reader.receive()))
        except Exception as e:
            self.error = e

    @classmethod
    def at(cls, ring: Ring, count: int, *, at_once: bool = True) -> "list[Received]":
        threads = [cls(reader, count) for reader in ring.readers]
        for thread in threads:
            thread.start()
            if at_once:
                thread.gate.set()
        return threads


sizes = st.one_of(
    st.integers(0, 3),
    st.integers(1, 12).flatmap(lambda slots: st.integers(-2, 2).map(lambda off: slots * CAPACITY + off)),
)


@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("spin_seconds", [0.0, 1e-4])
@given(lengths=st.lists(sizes, max_size=12))
@example(lengths=[CAPACITY * 50])
@example(lengths=[0] * 20)
def test_messages_of_all_sizes_arrive_in_order_and_unharmed(num_readers, spin_seconds, lengths):
    messages = [os.urandom(length) for length in lengths]
    with Ring(num_readers, spin_seconds=spin_seconds) as ring:
        threads = Received.at(ring, len(messages))
        for message in messages:
            ring.writer.publish(message)
        for thread in threads:
            thread.join(30)
            assert thread.messages == messages


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: memoryview(data).cast("i")])
def test_a_payload_is_whatever_has_bytes(kind):
    with Ring(1) as ring:
        ring.writer.publish(kind(bytes(range(40))))
        assert ring.readers[0].receive() == bytes(range(40))


def test_a_message_stays_as_it_was_received():
    with Ring(1, num_slots=1) as ring:
        (reader,) = ring.readers
        ring.writer.publish(b"first")
        first = reader.receive()
        ring.writer.publish(b"other")
        assert (first, reader.receive()) == (b"first", b"other")


def test_a_slow_reader_holds_the_writer_up_and_loses_nothing():
    messages = [str(i).encode() for i in range(50)]
    waits = threading.Event()
    with Ring(3, while_waiting=waits.set) as ring:
        quick, slow, other = Received.at(ring, len(messages), at_once=False)
        quick.gate.set()
        other.gate.set()
        writer = threading.Thread(target=lambda: [ring.writer.publish(m) for m in messages], daemon=True)
        writer.start()
        assert waits.wait(30), "the ring must fill up"
        assert ring.writer.num_published == ring.writer.shape.num_slots + 1 and writer.is_alive()
        assert slow.messages == [] and len(quick.messages) <= ring.writer.shape.num_slots
        slow.gate.set()
        for thread in (writer, quick, slow, other):
            thread.join(30)
        assert quick.messages == slow.messages == other.messages == messages


def test_a_reader_that_reads_nothing_is_named():
    with Ring(3, timeout=0.05) as ring:
        for i in range(7):
            ring.writer.publish(b"x")
            for reader in ring.readers:
                if i < 3 or reader is not ring.readers[1]:
                    reader.receive()
        with pytest.raises(RankError, match=r"rank 2 has read nothing for 0\.\d s, and all 4 slots"):
            ring.writer.publish(b"x")


def test_a_wait_for_room_can_be_ended():
    def stop() -> None:
        raise KeyError("rank 1 died")

    with Ring(1, while_waiting=stop) as ring, pytest.raises(KeyError, match="rank 1"):
        ring.writer.publish(bytes(1000))


@pytest.mark.parametrize("spin_seconds", [0.0, 0.01])
def test_readers_end_when_the_writer_has_gone(spin_seconds):
    with Ring(3, spin_seconds=spin_seconds) as ring:
        threads = Received.at(ring, 2)
        ring.writer.publish(b"one")
        for ours, _ in ring.pairs:
            ours.close()
        for thread in threads:
            thread.join(30)
            assert thread.messages == [b"one"] and isinstance(thread.error, EOFError)


def test_a_reader_that_has_gone_does_not_end_the_writer():
    with Ring(2) as ring:
        threads = Received.at(ring, 1)
        ring.pairs[0][1].shutdown(socket.SHUT_RDWR)
        threads[0].join(30)
        ring.writer.publish(b"one")
        threads[1].join(30)
        assert threads[1].messages == [b"one"]


def test_progress_tells_what_was_taken_from_what_is_done_with():
    with Ring(1) as ring:
        (reader,) = ring.readers
        assert ring.writer.progress(0) == (0, 0)
        for _ in range(2):
            ring.writer.publish(bytes(2 * CAPACITY))
        reader.receive()
        assert ring.writer.progress(0) == (1, 0)
        reader.receive()
        assert ring.writer.progress(0) == (2, 1)


def test_two_rings_do_not_meet():
    with Ring(1) as one, Ring(1) as other:
        one.writer.publish(b"one")
        other.writer.publish(b"other")
        assert (one.readers[0].receive(), other.readers[0].receive()) == (b"one", b"other")
