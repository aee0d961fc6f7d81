"""Starts the real ``bentoml serve`` in a process of its own, and knows all processes that come of it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 240.0  # seconds; the demo's first start also builds its tokenizer


@dataclass
class Server:
    """A running service. ``statuses``: what /readyz and /health said while it started, in order.

    temp_dir: where its processes keep temporary files, those of BentoML included. seen: what ``processes`` ever found.
    """

    process: subprocess.Popen[bytes]
    port: int
    ipc_dir: str
    log_path: Path
    temp_dir: str = ""
    shared_memory: set[str] = field(default_factory=set)
    seen: dict[int, str] = field(default_factory=dict)
    statuses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Return once /readyz says 200."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            with contextlib.suppress(httpx.TransportError):
                health = httpx.get(self.url + "/health").status_code
                ready = httpx.get(self.url + "/readyz").status_code
                self.statuses.append((ready, health))
                if ready == 200:
                    self._find_ipc_dir()
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in {START_TIMEOUT} s:\n{self.log}")

    def _find_ipc_dir(self) -> None:
        """Where it chose the folder itself, that is named after its main process."""
        if not self.ipc_dir:
            (found,) = Path(self.temp_dir).glob(f"nanovllm-*-{self.process.pid}-*")
            self.ipc_dir = str(found)

    def wait_for_failure(self) -> None:
        """Return once the service says that it will never be ready (/livez is 503)."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/livez").status_code == 503:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server has not failed in {START_TIMEOUT} s:\n{self.log}")

    @property
    def engine_pid(self) -> int:
        """The engine of now; it may have ended."""
        return int((Path(self.ipc_dir) / "engine.pid").read_text().split()[0])

    @property
    def worker_pids(self) -> list[int]:
        """The API workers that live."""
        return [pid for pid in self.processes() if "_bentoml_impl.worker" in _command(pid)]

    @property
    def is_ready(self) -> bool:
        """Whether /readyz says 200 now."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + "/readyz").status_code == 200
        return False

    def leftovers(self) -> list[str]:
        """Files of the service that exist: sockets and folders for temporary files, and shared memory it mapped."""
        left = [str(path) for path in Path(self.temp_dir).rglob("*")]
        return left + [path for path in self.shared_memory if Path(path).exists()]

    def note_shared_memory(self) -> None:
        """Remember which shared memory the service's processes have mapped, for ``leftovers``."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                self.shared_memory |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}

    def processes(self) -> dict[int, str]:
        """Pid and start time of the server's process, of everything below it, and of the engine wherever it is.

        Also of what was found before and lives: without the server's process it is below another.
        """
        found = {pid: self.seen[pid] for pid in alive(self.seen)}
        found[self.process.pid] = start_time(self.process.pid) or ""
        with contextlib.suppress(OSError, IndexError, ValueError):
            if (started := start_time(self.engine_pid)) is not None:
                found[self.engine_pid] = started
        grew = True
        while grew:
            grew = False
            for path in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    pid, fields = int(path.parent.name), _stat(path)
                    if int(fields[1]) in found and pid not in found:
                        found[pid] = fields[19]
                        grew = True
        self.seen |= found
        return found


def _stat(path: Path) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on."""
    return path.read_text().rpartition(")")[2].split()


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot; None if it has ended (a zombie has)."""
    with contextlib.suppress(OSError):
        fields = _stat(Path(f"/proc/{pid}/stat"))
        if fields[0] not in "ZX":
            return fields[19]
    return None


def alive(processes: dict[int, str]) -> list[int]:
    """Those of ``processes`` that still run."""
    return [pid for pid, started in processes.items() if start_time(pid) == started]


def wait_ended(processes: dict[int, str], timeout: float = 30.0) -> list[int]:
    """Wait for the end of all; returns those that are left after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def kill(processes: dict[int, str]) -> None:
    """End those of ``processes`` that still run, at once: all are stopped first, or one might see another end."""
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for pid in alive(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        deadline = time.monotonic() + 5.0
        while not all(map(_is_stopped, alive(processes))) and time.monotonic() < deadline:
            time.sleep(0.01)


def _is_stopped(pid: int) -> bool:
    """Whether none of the process's threads runs any more."""
    with contextlib.suppress(OSError):
        return all(_stat(path)[0] in "TtZX" for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return True


@contextlib.contextmanager
def serve(
    model: str = "demo",
    *,
    wait: bool = True,
    arguments: tuple[str, ...] = (),
    runtime_dir: str | None = None,
    **settings: object,
) -> Iterator[Server]:
    """A server of ``model`` on a free port; ``wait``: until it is ready. At the end no process of it may be left.

    It has a folder for sockets and one for temporary files of its own; with ``runtime_dir`` both are in there, where
    the service chooses. ``arguments``: more of ``bentoml serve``; ``settings``: NANOVLLM_*.
    """
    temp_dir = tempfile.mkdtemp(prefix="nanovllm-")  # short, for a socket's path has 108 bytes at most
    ipc_dir = os.path.join(temp_dir, "ipc") if runtime_dir is None else ""
    settings = {"ipc_dir": ipc_dir, "model": model, **settings}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if runtime_dir is None:
        runtime_dir = os.path.join(temp_dir, "run")
        os.mkdir(runtime_dir)
    env = os.environ | {"TMPDIR": runtime_dir, "XDG_RUNTIME_DIR": runtime_dir}
    env |= {f"NANOVLLM_{name.upper()}": str(value) for name, value in settings.items()}
    command = ["bentoml", "serve", "service:NanoVLLM", "--host", "127.0.0.1", "--port", str(port), *arguments]
    log_path = Path(temp_dir) / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, ipc_dir, log_path, runtime_dir)
    seen: dict[int, str] = {}
    try:
        if wait:
            server.wait_ready()
        seen = server.processes()
        yield server
        seen |= server.processes()
        end(server)
        left = wait_ended(seen)
        assert left == [], f"left after the server's end: {left}\n{server.log}"
    finally:
        kill(seen | server.processes())
        process.wait()
        shutil.rmtree(temp_dir, ignore_errors=True)


def end(server: Server) -> int:
    """SIGTERM, if it still runs, and the exit code."""
    with contextlib.suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the server did not end after SIGTERM:\n{server.log}") from None
