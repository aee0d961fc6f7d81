"""What ``bentoml serve`` itself, the workers' parent, adds to BentoML: its exit code tells the truth.

0: it was told to stop, and nothing was wrong. 1: it gave up, because workers ended too often or because no engine will
come. BentoML replaces workers that end without bound, but in a container none, and a service that has lost some of them
looks like a whole one. Here they are replaced everywhere, ``worker_max_restarts`` times in ten minutes; after that the
service ends, as it does with BentoML alone when the last worker has, for whoever restarts containers to see.

Not here: how a worker ends (lifetime.py), and the engine's own restarts (engine/process_client.py).
"""

import atexit
import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
from bentoml.exceptions import BentoMLException

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.engine.ipc_folder import ipc_folder, remove_folder
from nanovllm_bento.engine.process_client import FAILURE_FILE
from nanovllm_bento.engine.processes import start_time
from nanovllm_bento.errors import ConfigError

logger = logging.getLogger(__name__)

WINDOW = 600.0
"""Seconds over which worker_max_restarts counts."""
INTERVAL = 0.5
"""Seconds between two looks at the workers."""
LATE = 8.0
"""Seconds after the grace time at which workers that hang are killed: later than any other's end (lifetime.GRACE), and
before the ten seconds are over after which Kubernetes kills all (docs/operations.md)."""
_CONTAINER = "BENTOML_CONTAINERIZED"
_WORKER = "_bentoml_impl.worker"
_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


def guard(config: ServiceConfig) -> None:
    """Take the service's folder, and begin to watch the workers, which do not run yet. That the service has failed is
    written in the folder, which is removed at the end, as there may be no engine that would.

    To be called in the main process by BentoML's hook ``on_deployment``. Does nothing in a program that serves within
    itself, nor with ``--reload``, which ends workers all the time, but take the folder. Raises BentoMLException where
    that is not possible: BentoML then says why and ends with exit code 1.
    """
    try:
        folder = ipc_folder(os.getpid(), config.ipc_dir)
    except ConfigError as e:
        raise BentoMLException(str(e)) from e
    if not _is_bentoml_serve(sys.argv) or threading.current_thread() is not threading.main_thread():
        return
    in_container = _CONTAINER in os.environ
    if config.worker_max_restarts:
        # BentoML asks for it when it makes the workers, which is next.
        os.environ.pop(_CONTAINER, None)
    ends = in_container if config.end_on_failure is None else config.end_on_failure
    told, wake = os.pipe()
    os.set_blocking(wake, False)
    if signal.set_wakeup_fd(wake, warn_on_full_buffer=False) != -1:
        raise RuntimeError("another part of this process listens for signals already")
    watch = Watch(told, config, folder / FAILURE_FILE if ends else None)
    atexit.register(watch.tell)
    atexit.register(remove_folder, folder, os.getpid())  # before tell, which may end the process
    threading.Thread(target=watch.run, name="guard", daemon=True).start()


def _is_bentoml_serve(argv: list[str]) -> bool:
    program = Path(argv[0])
    return "bentoml" in (program.name, program.parent.name) and "serve" in argv and "--reload" not in argv


class Watch:
    """Counts the ends of workers that nobody asked for. told: a descriptor with the numbers of signals that come."""

    def __init__(self, told: int, config: ServiceConfig, failure: Path | None) -> None:
        self.config = config
        self.fault: str | None = None
        """Why the service ends by itself."""
        self.is_stopping = False
        self._told = told
        self._failure = failure
        self._workers: dict[int, int | None] = {}
        self._ends: list[float] = []

    def run(self) -> None:
        """Until the process's end."""
        while not self.is_stopping:
            fault = self.look()
            if fault is not None and self.fault is None:
                self.fault = fault
                logger.error("%s The service ends.", fault)
                os.kill(os.getpid(), signal.SIGTERM)
            self._listen(INTERVAL)
        time.sleep(self.config.shutdown_grace_seconds + LATE)
        for pid in self._find_workers():
            self.fault = f"The worker {pid} has not ended."
            logger.error("%s It is killed.", self.fault)
            os.kill(pid, signal.SIGKILL)

    def look(self) -> str | None:
        """Note the workers that have come and gone. Returns why the service should end, if it should."""
        if self._failure is not None and self._failure.exists():
            return self._failure.read_text()
        workers = self._find_workers()
        gone = [pid for pid, started in self._workers.items() if workers.get(pid) != started]
        self._listen(0)
        if self.is_stopping:  # so they were told to end
            return None
        now, limit = time.monotonic(), self.config.worker_max_restarts
        self._workers = workers
        self._ends = [end for end in self._ends if end > now - WINDOW] + [now] * len(gone)
        for pid in gone:
            logger.error("a worker (pid %d) has ended; %d of %d in ten minutes", pid, len(self._ends), limit)
        if len(self._ends) > limit:
            return f"{len(self._ends)} workers have ended in ten minutes, worker_max_restarts={limit}."
        return None

    def tell(self) -> None:
        """At the interpreter's end: the process's exit code, if it is not 0."""
        self._listen(0)
        if self.fault is not None or not self.is_stopping:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _listen(self, seconds: float) -> None:
        if select.select([self._told], [], [], seconds)[0]:
            self.is_stopping |= not _STOPS.isdisjoint(os.read(self._told, 4096))

    @staticmethod
    def _find_workers() -> dict[int, int | None]:
        """Pid and start time of the workers that live."""
        found = {}
        for child in psutil.Process().children():
            try:
                if any(_WORKER in argument for argument in child.cmdline()):
                    found[child.pid] = start_time(child.pid)
            except psutil.Error:
                continue  # it has just ended
        return {pid: started for pid, started in found.items() if started is not None}
