"""The engine's own process: an EngineCore behind a ZeroMQ socket. Started by process_client, as ``python -m`` this.

It serves every API worker of one service and outlives each of them: it ends when the service's main process ends, or on
SIGTERM once nothing is running, at the latest after ``drain_timeout``. What it did not finish or begin by then is left
unanswered: the workers add it to the next engine. A client whose process ends has its requests aborted.

No message can end the engine: what cannot be decoded is dropped, what cannot be served is answered with an error.
"""

import gc
import logging
import math
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

from nanovllm_bento import log_format
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.connections import Connections
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.ipc_folder import end_with_owner
from nanovllm_bento.engine.messages import (
    ENGINE_FAULT,
    INVALID_REQUEST,
    Add,
    EngineArgs,
    OutputItem,
    StepOutput,
)
from nanovllm_bento.engine.processes import name_process, on_sigterm, write_whole
from nanovllm_bento.engine.sequence import Sequence
from nanovllm_bento.errors import EngineError, InvalidRequestError, NanoVLLMError, RankError

logger = logging.getLogger("nanovllm_bento.engine.worker")  # its __name__ is __main__

_RECEIVE_SECONDS = 0.001
"""Time for messages between two steps, at most: thousands of requests at once must not hold up those that run. On a GPU
it costs nothing, as the step before is still computed."""
_IDLE_SECONDS = 0.5
"""After work, before the engine captures graphs ahead: between two requests of one client is no time for that."""


class EngineServer:
    """Moves messages between the socket and the core, one pass of ``run_once`` per step."""

    def __init__(self, core: EngineCore, socket: zmq.Socket[bytes], epoch: int, heartbeat_interval: float) -> None:
        self.core, self.epoch = core, epoch
        self.connections = Connections(
            core, socket, epoch, heartbeat_interval, add=self._add, requests_of=self._requests_of
        )
        self.drain_until: float | None = None
        self._idle_at = time.monotonic()  # before the first request is the best time to capture graphs

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end when those that run have finished or ``seconds`` are over."""
        self.drain_until = time.monotonic() + seconds

    def run(self) -> None:
        """Serve until drained."""
        while self.drain_until is None or (self.core.has_work and time.monotonic() < self.drain_until):
            self.run_once()
        if self.core.has_work:
            logger.warning("%d requests had not finished in time", len(self.core.scheduler.sequences))

    def run_once(self) -> None:
        self.connections.wait(self._patience())
        self.connections.receive(_RECEIVE_SECONDS)
        if self.core.has_work:
            self._send_outputs(self.core.step())
            self._idle_at = time.monotonic() + _IDLE_SECONDS
        elif self.core.may_capture and time.monotonic() >= self._idle_at:
            self.core.capture_ahead()
        self.connections.beat()

    def _patience(self) -> float:
        """Seconds to wait for a message, at most."""
        if self.core.has_work:
            return 0.0
        return max(0.0, self._idle_at - time.monotonic()) if self.core.may_capture else math.inf

    def _add(self, client: bytes, message: Add) -> None:
        if self.drain_until is not None:
            return
        try:
            self.core.add(message, client)
            return
        except InvalidRequestError as e:
            item = OutputItem(message.request_id, [], "error", error=e.message, error_code=INVALID_REQUEST)
        except Exception:  # a fault of ours that this request alone brings out must not end the others
            logger.exception("a request could not be added")
            why = "The engine could not take the request; its log says more."
            item = OutputItem(message.request_id, [], "error", error=why, error_code=ENGINE_FAULT)
        self.connections.send(client, StepOutput(self.epoch, self.core.scheduler.step, [item]))

    def _requests_of(self, client: bytes) -> list[str]:
        return [s.request_id for s in self.core.scheduler.sequences.values() if s.client_id == client]

    def _send_outputs(self, outputs: list[tuple[Sequence, OutputItem]]) -> None:
        by_client: dict[bytes, list[OutputItem]] = defaultdict(list)
        for seq, item in outputs:
            by_client[seq.client_id].append(item)
        for client, items in by_client.items():
            self.connections.send(client, StepOutput(self.epoch, self.core.scheduler.committed_step, items))


def main() -> None:
    """Entry point of the process. Exit code 0: drained or owner gone; 2: cannot start as configured; 1: a fault."""
    args = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineArgs)
    log_format.set_up(args.log_format, "engine", level=args.log_level)
    folder = Path(args.folder)
    server: EngineServer | None = None

    def drain() -> None:
        if server is None:  # it still loads
            os._exit(0)
        server.drain(args.drain_timeout if server.drain_until is None else 0.0)  # the second signal: at once

    def fail(error: NanoVLLMError) -> NoReturn:
        """End at once: a step may hang in another thread. What cannot start as configured is not started again."""
        is_hopeless = server is None and not isinstance(error, EngineError)
        if is_hopeless:
            write_whole(folder / "engine.error", str(error))
        logger.error("the engine cannot start: %s" if server is None else "the engine ends: %s", error)
        os._exit(2 if is_hopeless else 1)

    on_sigterm(args.owner_pid, drain)
    end_with_owner(args.owner_pid, folder)
    name_process(folder / "engine.pid", os.getpid())

    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    socket.linger = 1000  # ms, for the last outputs of a drain
    socket.set_hwm(0)
    socket.bind(f"ipc://{folder}/engine.sock")
    started = time.perf_counter()
    try:
        core = EngineCore.from_model(
            EngineConfig.create(env={}, **args.config),
            hash_seed=args.hash_seed,
            on_rank_failure=fail,
            log_format=args.log_format,
            log_level=args.log_level,
        )
    except NanoVLLMError as e:
        fail(e)
    core.info.startup_seconds["total_engine"] = time.perf_counter() - started
    server = EngineServer(core, socket, args.epoch, args.heartbeat_interval)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which drains and then ends us
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in core.info.startup_seconds.items())
    logger.info("ready on %s in %s: %s", core.info.device, core.info.dtype, phases)
    gc.collect()
    gc.freeze()  # what start-up made stays; the collector need not look at it again in the middle of a step
    name_process(folder / "engine.ready", os.getpid())
    try:
        server.run()
    except RankError as e:
        fail(e)
    except Exception:
        logger.exception("the engine failed")
        os._exit(1)  # what is open goes on in the next engine; do not wait for sockets
    core.close()
    socket.close()


if __name__ == "__main__":
    main()
