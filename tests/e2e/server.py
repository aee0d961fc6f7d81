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
    """A running service. ``statuses``: what /readyz and /health said while it started, in order."""

    process: subprocess.Popen[bytes]
    port: int
    ipc_dir: str
    log_path: Path
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
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in {START_TIMEOUT} s:\n{self.log}")

    def wait_for_failure(self) -> None:
        """Return once the service says that it will never be ready (/livez is 503)."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/livez").status_code == 503:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server has not failed in {START_TIMEOUT} s:\n{self.log}")

    def processes(self) -> dict[int, str]:
        """Pid and start time of the server's process and of everything below it."""
        found = {self.process.pid: start_time(self.process.pid) or ""}
        grew = True
        while grew:
            grew = False
            for path in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    pid, fields = int(path.parent.name), _stat(path)
                    if int(fields[1]) in found and pid not in found:
                        found[pid] = fields[19]
                        grew = True
        return found


def _stat(path: Path) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on."""
    return path.read_text().rpartition(")")[2].split()


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
    """End those of ``processes`` that still run, at once."""
    for pid in alive(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serve(model: str = "demo", *, wait: bool = True, **settings: object) -> Iterator[Server]:
    """A server of ``model`` on a free port with its own IPC folder; ``wait``: until it is ready."""
    ipc_dir = tempfile.mkdtemp(prefix="nanovllm-")  # short, for a socket's path has 108 bytes at most
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"NANOVLLM_MODEL": model, "NANOVLLM_IPC_DIR": ipc_dir}
    env |= {f"NANOVLLM_{name.upper()}": str(value) for name, value in settings.items()}
    log_path = Path(ipc_dir) / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", "service:NanoVLLM", "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, ipc_dir, log_path)
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        processes = server.processes()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        wait_ended(processes)
        kill(processes)
        process.wait()
        shutil.rmtree(ipc_dir, ignore_errors=True)
