"""The EngineClient of an API worker: keeps one engine process alive together with the other workers, and talks to it.

Whoever holds the lock file supervises: starts the engine, or adopts the one that a worker before it started, watches
it and restarts it. Every worker keeps its open requests' prompts, parameters and tokens; after a restart it adds them
again and the streams go on. The engine is tied to the service's main process (``owner_pid``), not to a worker.
"""

import asyncio
import fcntl
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import zmq

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.client import EVERY_STEP, OutputBuffer, Pace
from nanovllm_bento.engine.ipc_folder import ipc_folder, remove_folder
from nanovllm_bento.engine.messages import (
    DEADLINE_EXCEEDED,
    INVALID_REQUEST,
    Abort,
    Add,
    EngineArgs,
    EngineInfo,
    EngineStats,
    Heartbeat,
    Hello,
    OutputItem,
    Ready,
    StepOutput,
    ToEngine,
    encoder,
    pack_tokens,
    to_worker_decoder,
)
from nanovllm_bento.engine.processes import name_process, open_pidfd, process_named_by, start_time, write_whole
from nanovllm_bento.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    InvalidRequestError,
    ShuttingDownError,
)
from nanovllm_bento.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FAILURE_FILE = "failure"
"""In the service's folder: why no engine will come, once that is certain."""
_HELLO_INTERVAL = 0.5  # seconds between greetings to an engine that has not answered
_RESTART_WINDOW = 600.0  # seconds over which engine_max_restarts counts
_LOCK_INTERVAL = 0.5  # seconds between tries to become the supervisor
_TURN_SECONDS = 0.0005
"""Where many requests end in one step, time for some of them until the event loop has its turn: their clients' next
ones then reach the engine while the others are still being ended, and it need not wait for all."""
_DEADLINE_GRACE = 0.1
"""Seconds after a request's deadline at which it is ended here. The engine does it earlier, if it lives and its step is
a short one, and knows how far the request was."""
_MAX_FRAMES = 8
"""Messages that go to the engine as one of ZeroMQ's, which it reads at one go between two steps. So many do not wait
for others of the same turn of the event loop; nor do fewer, where the engine runs no more than that from here."""


class _OpenRequest(OutputBuffer):
    """A request, with what another engine needs to go on from it."""

    __slots__ = ("add", "num_resumes", "token_ids")

    def __init__(self, add: Add, pace: Pace, on_due: Callable[[], None], close: Callable[[], None]) -> None:
        super().__init__(pace, on_due, close)
        self.add = add
        self.token_ids = array("i")
        """All its output tokens so far."""
        self.num_resumes = 0

    def end(self, item: OutputItem) -> None:
        """The last of it has come."""
        if item.finish_reason != "error":
            self.put(item)
            return
        if item.new_token_ids:  # they are the reader's, who learns of the error then
            self.put(OutputItem(item.request_id, item.new_token_ids, num_cached_tokens=item.num_cached_tokens))
        self.fail(_error_of(item))


class ProcessEngineClient:
    """Implements engine.client.EngineClient. ``owner_pid``: the process whose end ends the engine (default: this)."""

    def __init__(
        self,
        engine_config: EngineConfig,
        service_config: ServiceConfig,
        *,
        owner_pid: int | None = None,
        engine_module: str | None = None,
    ) -> None:
        if engine_module is not None:
            service_config = service_config.model_copy(update={"engine_module": engine_module})
        self.engine_config, self.service_config = engine_config, service_config
        self.owner_pid = os.getpid() if owner_pid is None else owner_pid
        self.failure: str | None = None  # why no engine will come, once that is certain
        self._folder = Path()
        self._client_id = uuid.uuid4().bytes
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._requests: dict[str, _OpenRequest] = {}
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._epoch = -1
        self._engine_pid = 0
        self._last_heard = 0.0
        self._outbox: list[bytes] = []
        self._items: deque[OutputItem] = deque()  # received, but not handed out yet
        self._variables = copy_context()  # what one request's task makes known is not for the others' output
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()  # the engine this client is connected to has ended
        self._tasks: list[asyncio.Task[None]] = []

    # -- EngineClient -------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def is_up(self) -> bool:
        return self.is_ready or process_named_by(self._folder / "engine.ready") is not None

    @property
    def folder(self) -> Path:
        """Where the workers of the service share files; made by ``start``."""
        return self._folder

    @property
    def is_responsive(self) -> bool:
        silence = time.monotonic() - self._last_heard
        return self.is_ready and silence < self.service_config.engine_heartbeat_timeout / 4

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineNotReadyError(self.failure or "The engine is starting.")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    async def start(self) -> None:
        self._folder = ipc_folder(self.owner_pid, self.service_config.ipc_dir)
        self._context = zmq.Context()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._stay_connected())]

    async def wait_ready(self) -> None:
        """Return once the engine serves. Raises EngineDeadError if it cannot start."""
        while not self.is_ready:
            if self.failure is not None:
                raise EngineDeadError(self.failure)
            try:
                await asyncio.wait_for(self._ready.wait(), timeout=0.1)
            except TimeoutError:
                continue

    async def close(self) -> None:
        self.abort_all("The service is shutting down.")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._flush()
        self._disconnect(linger=500)
        if self._context is not None:
            self._context.term()
        if self.owner_pid == os.getpid() and self._engine_pid:
            await _terminate(self._engine_pid)

    def abort_all(self, why: str) -> None:
        if self._requests:
            self._send(Abort(list(self._requests)))
        self._fail_all(ShuttingDownError(why))

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        on_due: Callable[[], None],
        *,
        cache_salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        pace: Pace = EVERY_STEP,
        num_scored: int = 0,
    ) -> OutputBuffer:
        if not self.is_ready:
            raise EngineNotReadyError(self.failure or "The engine is starting or being restarted.")
        if request_id in self._requests:
            raise InvalidRequestError(f"A request {request_id!r} is running already.", param="request_id")
        add = Add(
            request_id,
            pack_tokens(list(prompt_token_ids)),
            sampling,
            task="score" if num_scored else "generate",
            cache_salt=cache_salt,
            priority=priority,
            deadline=deadline,
            num_scored=num_scored,
        )
        close = partial(self._close_request, request_id)
        if deadline is not None:
            seconds = deadline - time.time() + _DEADLINE_GRACE
            timer = asyncio.get_running_loop().call_later(seconds, self._expire, request_id)
            close = partial(_close_timed, timer, close)
        request = _OpenRequest(add, pace, on_due, close)
        self._requests[request_id] = request
        self._send(add)
        return request

    def _close_request(self, request_id: str) -> None:
        # Not there any more: the engine has ended it, or it was aborted with all others.
        if self._requests.pop(request_id, None) is not None and self.is_ready:
            self._send(Abort([request_id]))

    def _expire(self, request_id: str) -> None:
        """The engine did not end the request at its deadline: it is being restarted, hangs, or is in a long step."""
        self._hand_out()
        request = self._requests.get(request_id)
        if request is not None:
            self._close_request(request_id)
            request.fail(DeadlineExceededError("The request's deadline passed; the engine has not answered since."))

    # -- connection ---------------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        """Connect, greet until answered, watch the engine live, and begin again when it ended."""
        while True:
            self._connect()
            while not self._ready.is_set():
                self._learn_failure()
                self._send(Hello(os.getpid()))
                try:
                    await asyncio.wait_for(self._ready.wait(), _HELLO_INTERVAL)
                except TimeoutError:
                    continue
            await self._gone.wait()
            self._ready.clear()
            self._gone.clear()
            self._disconnect(linger=0)  # drops what the dead engine did not read; it is added again when one answers

    def _connect(self) -> None:
        assert self._context is not None
        self._socket = socket = self._context.socket(zmq.DEALER)
        socket.identity = self._client_id
        socket.set_hwm(0)
        socket.connect(f"ipc://{self._folder}/engine.sock")
        asyncio.get_running_loop().add_reader(socket.fileno(), self._receive)

    def _disconnect(self, *, linger: int) -> None:
        self._hand_out()  # before requests are added to another engine
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close(linger)
            self._socket = None
            self._outbox.clear()

    def _send(self, message: ToEngine) -> None:
        """Goes out with others that are sent in this turn of the event loop: ZeroMQ's thread is woken once for them."""
        if self._socket is not None:
            if not self._outbox:
                asyncio.get_running_loop().call_soon(self._exchange, context=self._variables)
            self._outbox.append(encoder.encode(message))
            num_running = len(self._requests) - len(self._items) - len(self._outbox)
            if len(self._outbox) >= min(_MAX_FRAMES, max(1, num_running)):
                self._flush()

    def _exchange(self) -> None:
        self._flush()
        self._receive()  # the descriptor tells of changes only, and sending may have swallowed one

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if self._socket is not None:
            for i, data in enumerate(outbox, 1):
                self._socket.send(data, zmq.NOBLOCK if i == len(outbox) else zmq.NOBLOCK | zmq.SNDMORE)

    def _receive(self) -> None:
        """Take what the engine has sent, in several turns of the event loop where many requests end at once."""
        until = time.monotonic() + _TURN_SECONDS
        while True:
            self._hand_out(until)
            if self._items:
                asyncio.get_running_loop().call_soon(self._receive, context=self._variables)
                return
            if self._socket is None or not _has_message(self._socket):
                return
            message = to_worker_decoder.decode(self._socket.recv(zmq.NOBLOCK))
            if message.epoch < self._epoch:
                continue
            self._last_heard = time.monotonic()
            if isinstance(message, StepOutput):
                self._items.extend(message.items)
            elif isinstance(message, Heartbeat):
                self._stats = message.stats
                self._stats.epoch = message.epoch
            elif isinstance(message, Ready):
                self._on_ready(message)

    def _hand_out(self, until: float = math.inf) -> None:
        """Give requests what has come for them; no further after one that ended when ``until`` is over."""
        items, requests = self._items, self._requests
        while items:
            item = items.popleft()
            request = requests.get(item.request_id)
            if request is None:
                continue
            request.token_ids.extend(item.new_token_ids)
            if item.finish_reason is None:
                request.put(item)
                continue
            del requests[item.request_id]  # whether read yet or not, it is not to be added again
            request.end(item)
            if time.monotonic() > until:
                return

    def _on_ready(self, message: Ready) -> None:
        if self._ready.is_set():
            return
        pidfd = open_pidfd(message.pid)
        if pidfd is None:
            return  # it ended just now; the next one will answer
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._gone.set()

        loop.add_reader(pidfd, on_end)
        resumed = message.epoch > self._epoch >= 0
        self._epoch, self._engine_pid, self._info = message.epoch, message.pid, message.info
        self._stats = EngineStats(epoch=message.epoch)
        self._ready.set()
        if resumed:
            self._resume()

    def _resume(self) -> None:
        """Add what is open to an engine that has just started, except what has seen too many of them end."""
        limit = self.service_config.engine_max_resumes
        for request_id, request in list(self._requests.items()):
            if request.num_resumes >= limit:
                del self._requests[request_id]
                request.fail(EngineDeadError(f"The engine ended {limit + 1} times while this request ran."))
                continue
            request.num_resumes += 1
            self._send(msgspec.structs.replace(request.add, output_token_ids=pack_tokens(list(request.token_ids))))
        logger.warning("engine restarted; %d open requests go on", len(self._requests))

    # -- supervision --------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        lock = os.open(self._folder / "engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_INTERVAL)
            if not self._learn_failure():  # of the supervisor before this one
                await self._keep_alive()
            # No engine will come. Keep the lock, or the next worker would try again, and when the service ends remove
            # the folder, as an engine would have.
            with _end_of(self.owner_pid) as ended:
                await ended.wait()
            remove_folder(self._folder, self.owner_pid)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            logger.exception("supervision of the engine failed")
            self._fail(f"Supervision of the engine failed: {e}")
        finally:
            os.close(lock)

    async def _keep_alive(self) -> None:
        while True:
            process = None
            pid = _running_engine(self._folder)
            error = self._folder / "engine.error"
            if pid is None and error.exists():  # of one that was started before this worker supervised
                return self._fail(error.read_text())
            if pid is None:
                if start_time(self.owner_pid) is None:
                    return  # the service is over, and this worker about to end
                num_starts = _num_starts(self._folder)
                if num_starts > self.service_config.engine_max_restarts:
                    return self._fail(f"The engine ended {num_starts} times in {_RESTART_WINDOW:.0f} seconds.")
                process = _spawn_engine(self._folder, self.engine_config, self.service_config, self.owner_pid)
                pid = process.pid
            self._engine_pid = pid
            await self._watch(pid)
            code = process.wait() if process is not None else None
            if error.exists():  # it cannot start as configured, so the next one could not either
                return self._fail(error.read_text())
            logger.error("the engine (pid %d) ended%s", pid, "" if code is None else f" with code {code}")

    async def _watch(self, pid: int) -> None:
        """Return when the engine has ended; kill it if it is silent for too long."""
        started = self._last_heard = time.monotonic()
        with _end_of(pid) as ended:
            while not ended.is_set():
                try:
                    await asyncio.wait_for(ended.wait(), self.service_config.engine_heartbeat_interval)
                except TimeoutError:
                    now = time.monotonic()
                    self._receive()  # what came while this process itself was held up is no silence of the engine
                    late_start = not self.is_ready and now - started > self.service_config.engine_start_timeout
                    silent = self.is_ready and now - self._last_heard > self.service_config.engine_heartbeat_timeout
                    if late_start or silent:
                        logger.error("the engine (pid %d) %s; killing it", pid, "hangs" if silent else "does not start")
                        os.kill(pid, signal.SIGKILL)

    def _fail(self, why: str) -> None:
        """No engine will come: end what is open, stay not ready, and tell the other workers."""
        self._give_up(why)
        write_whole(self._folder / FAILURE_FILE, why)

    def _give_up(self, why: str) -> None:
        self.failure = why
        logger.error("%s", why)
        self._fail_all(EngineDeadError(why))

    def _fail_all(self, why: Exception) -> None:
        self._hand_out()  # what has ended has not failed
        requests = list(self._requests.values())
        self._requests.clear()
        for request in requests:
            request.fail(why)

    def _learn_failure(self) -> bool:
        """Whether no engine will come, as the worker that supervised it has found."""
        if self.failure is None and (told := self._folder / FAILURE_FILE).exists():
            self._give_up(told.read_text())
        return self.failure is not None


@contextmanager
def _end_of(pid: int) -> Iterator[asyncio.Event]:
    """An event that is set when the process has ended."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    pidfd = open_pidfd(pid)
    if pidfd is None:
        ended.set()
        yield ended
        return
    loop.add_reader(pidfd, ended.set)
    try:
        yield ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _close_timed(timer: asyncio.TimerHandle, close: Callable[[], None]) -> None:
    timer.cancel()
    close()


def _has_message(socket: zmq.Socket[bytes]) -> bool:
    """At a third of the cost of a recv that raises Again."""
    return bool(cast(int, socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _num_starts(folder: Path) -> int:
    """How often this service's engine was started lately, by whichever process."""
    try:
        starts = (folder / "starts").read_text().split()
    except FileNotFoundError:
        return 0
    return sum(float(start) > time.monotonic() - _RESTART_WINDOW for start in starts)


def _error_of(item: OutputItem) -> Exception:
    """The error that an item with finish_reason "error" stands for."""
    message = item.error or "The engine could not finish the request."
    if item.error_code == DEADLINE_EXCEEDED:
        return DeadlineExceededError(message)
    if item.error_code == INVALID_REQUEST:
        return InvalidRequestError(message)
    return EngineError(message)


def prestart_engine(engine_config: EngineConfig, service_config: ServiceConfig, owner_pid: int) -> None:
    """Start the engine of a service whose workers do not run yet, so that it loads while they start.

    The worker that becomes the supervisor adopts it. Does nothing where somebody supervises already.
    """
    folder = ipc_folder(owner_pid, service_config.ipc_dir)
    with open(folder / "engine.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if _running_engine(folder) is None:
            _spawn_engine(folder, engine_config, service_config, owner_pid)


def _running_engine(folder: Path) -> int | None:
    """The pid of the engine that serves this folder and still lives."""
    return process_named_by(folder / "engine.pid")


def _spawn_engine(
    folder: Path, engine_config: EngineConfig, service_config: ServiceConfig, owner_pid: int
) -> subprocess.Popen[bytes]:
    """Start an engine of the next epoch; the caller holds the lock."""
    epoch_file, seed_file = folder / "epoch", folder / "hash_seed"
    epoch = int(epoch_file.read_text()) + 1 if epoch_file.exists() else 0
    write_whole(epoch_file, str(epoch))
    if not seed_file.exists():
        write_whole(seed_file, str(secrets.randbits(64)))
    (folder / "engine.error").unlink(missing_ok=True)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{time.monotonic()}\n")
    args = EngineArgs(
        config=engine_config.model_dump(),
        folder=str(folder),
        epoch=epoch,
        owner_pid=owner_pid,
        hash_seed=int(seed_file.read_text()),
        heartbeat_interval=service_config.engine_heartbeat_interval,
        drain_timeout=service_config.shutdown_grace_seconds,
        log_format=service_config.log_format,
        log_level=service_config.log_level,
    )
    # A session of its own: Ctrl-C at the terminal is for the service.
    process = subprocess.Popen(
        [sys.executable, "-m", service_config.engine_module], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(args))
    process.stdin.close()
    name_process(folder / "engine.pid", process.pid)
    return process


async def _terminate(pid: int, grace: float = 5.0) -> None:
    """SIGTERM, then SIGKILL after ``grace`` seconds; returns when the process is gone."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return
    try:
        for signum, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
            os.kill(pid, signum)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if start_time(pid) is None:
                    return
                await asyncio.sleep(0.02)
    finally:
        os.close(pidfd)
