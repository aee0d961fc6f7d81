"""Looks at a running engine from outside of its service: what it counts, and who supervises it.

It speaks the engine's protocol and nothing else. ProcessEngineClient would do more than look: when a worker dies, it
would take the supervisor's place.
"""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import zmq

from nanovllm_bento.engine.messages import EngineStats, Heartbeat, Hello, encoder, to_worker_decoder
from tests.e2e.server import Server

TIMEOUT = 30.0


class Observer:
    """Reads the counts in the heartbeats of a server's engine; also of the next engine after a restart."""

    def __init__(self, server: Server) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = uuid.uuid4().bytes
        self._socket.linger = 0
        self._socket.connect(f"ipc://{server.ipc_dir}/engine.sock")

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def stats(self, timeout: float = TIMEOUT) -> EngineStats:
        """What the engine counts now: the first heartbeat that comes after this call."""
        deadline = time.monotonic() + timeout
        while self._socket.poll(0):
            self._socket.recv()
        while time.monotonic() < deadline:
            self._socket.send(encoder.encode(Hello(os.getpid())))
            until = time.monotonic() + 0.5
            while (left := until - time.monotonic()) > 0 and self._socket.poll(int(left * 1000) + 1):
                message = to_worker_decoder.decode(self._socket.recv())
                if isinstance(message, Heartbeat):
                    return message.stats
        raise AssertionError(f"no heartbeat of the engine in {timeout} s")

    def until(self, condition: Callable[[EngineStats], bool], what: str, timeout: float = TIMEOUT) -> EngineStats:
        """Return once ``condition`` holds."""
        deadline = time.monotonic() + timeout
        while not condition(stats := self.stats(timeout)):
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}; {stats}"
        return stats

    def until_idle(self, timeout: float = TIMEOUT) -> EngineStats:
        """Return once nothing runs, nothing waits and no block is in use."""
        return self.until(
            lambda s: s.num_requests_running == s.num_requests_waiting == s.num_blocks_used == 0, "idle", timeout
        )


def supervisor(server: Server) -> int | None:
    """The pid of the worker that supervises the engine: it holds the lock. None while nobody does."""
    inode = os.stat(Path(server.ipc_dir) / "engine.lock").st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "FLOCK" in fields and fields[5].split(":")[-1] == str(inode):
            return int(fields[4])
    return None
