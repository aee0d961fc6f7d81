"""The engine's end of the socket to the API workers: who is connected, what they ask, what they are told.

No message can end the engine: what cannot be decoded is dropped. A client whose process ends has its requests aborted.
Without torch, for the engine without a model too (bench/fake_engine.py).
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import zmq

from nanovllm_bento.engine.messages import (
    Abort,
    Add,
    EngineInfo,
    EngineStats,
    Heartbeat,
    Hello,
    Ready,
    ToWorker,
    encoder,
    to_engine_decoder,
)
from nanovllm_bento.engine.processes import open_pidfd

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What is connected."""

    info: EngineInfo

    @property
    def stats(self) -> EngineStats: ...

    def abort(self, request_id: str) -> object: ...


class Connections:
    """add: takes a request and the id of its client. requests_of: the ids of a client's unfinished requests."""

    def __init__(
        self,
        engine: Engine,
        socket: zmq.Socket[bytes],
        epoch: int,
        heartbeat_interval: float,
        *,
        add: Callable[[bytes, Add], None],
        requests_of: Callable[[bytes], Iterable[str]],
    ) -> None:
        self.engine, self.socket, self.epoch = engine, socket, epoch
        self.heartbeat_interval = heartbeat_interval
        self._add, self._requests_of = add, requests_of
        self._next_heartbeat = 0.0
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._clients: dict[bytes, int] = {}  # client id → pidfd

    def wait(self, seconds: float) -> None:
        """Until there is a message, a client has ended or a heartbeat is due; at most ``seconds``."""
        seconds = min(seconds, max(0.0, self._next_heartbeat - time.monotonic()))
        for source, _ in self._poller.poll(int(seconds * 1000) + 1 if seconds else 0):
            if source is not self.socket:
                self._forget(source)

    def receive(self, seconds: float = math.inf) -> None:
        """Act on the messages that are there, for ``seconds`` at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                client, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for frame in frames:
                self._act_on(client, frame)

    def _act_on(self, client: bytes, data: bytes) -> None:
        try:
            message = to_engine_decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            logger.error("dropped a message that is none of ours: %s", e)
            return
        if isinstance(message, Add):
            self._add(client, message)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self.engine.abort(request_id)
        elif isinstance(message, Hello):
            self._greet(client, message.pid)

    def send(self, client: bytes, message: ToWorker) -> None:
        self.socket.send_multipart([client, encoder.encode(message)])

    def beat(self) -> None:
        """Send every client a heartbeat if one is due."""
        if time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + self.heartbeat_interval
            heartbeat = Heartbeat(self.epoch, self.engine.stats)
            for client in self._clients:
                self.send(client, heartbeat)

    def _greet(self, client: bytes, pid: int) -> None:
        if client not in self._clients:
            pidfd = open_pidfd(pid)
            if pidfd is None:
                return
            self._clients[client] = pidfd
            self._poller.register(pidfd, zmq.POLLIN)
        self.send(client, Ready(self.epoch, os.getpid(), self.engine.info))

    def _forget(self, pidfd: int) -> None:
        """A client's process ended: nobody waits for its requests."""
        client = next(c for c, fd in self._clients.items() if fd == pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        del self._clients[client]
        orphans = list(self._requests_of(client))
        for request_id in orphans:
            self.engine.abort(request_id)
        logger.warning("a client's process ended; %d of its requests were aborted", len(orphans))
