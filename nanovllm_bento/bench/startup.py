"""Start-up: from spawning ``bentoml serve`` to ready, and to the first token of the first request."""

import os
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import httpx

from nanovllm_bento.bench.environment import environment
from nanovllm_bento.bench.offline import model_name

POLL_SECONDS = 0.01


def bench_startup(
    command: list[str],
    cwd: Path,
    env: dict[str, str],
    *,
    model: str,
    port: int,
    repeat: int = 3,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Start the server ``repeat`` times, one after another, and stop it again.

    ``command`` serves on ``port``. Seconds since the process was spawned; the first run may find caches cold, so it is
    reported beside the median. Raises RuntimeError, with the server's last lines, if it ends or does not get ready.
    """
    runs = [_start_once(command, cwd, env, port, timeout) for _ in range(repeat)]
    names = list(runs[0]["seconds"])
    return {
        "benchmark": "startup",
        "environment": environment(),
        "model": model_name(model),
        "first": runs[0]["seconds"],
        "median": {n: round(statistics.median(run["seconds"][n] for run in runs), 3) for n in names},
        "engine_phases": runs[-1]["engine_phases"],
        "runs": runs,
    }


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _start_once(command: list[str], cwd: Path, env: dict[str, str], port: int, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        server = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                seconds = {}
                for name, path in (("http_up", "/livez"), ("ready", "/readyz")):
                    _wait_for(client, path, name, server, started + timeout)
                    seconds[name] = round(time.monotonic() - started, 3)
                model = client.get("/v1/models").json()["data"][0]["id"]
                body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
                client.post("/v1/completions", json=body).raise_for_status()
                seconds["first_token"] = round(time.monotonic() - started, 3)
        except (httpx.HTTPError, TimeoutError, ChildProcessError) as error:
            tail = _read(log).splitlines()[-15:]
            raise RuntimeError(f"the server did not start: {error}\n" + "\n".join(tail)) from None
        finally:
            _stop(server)
        return {"seconds": seconds, "engine_phases": engine_phases(_read(log))}


def _wait_for(client: httpx.Client, path: str, what: str, server: "subprocess.Popen[bytes]", deadline: float) -> None:
    """Poll until ``path`` answers 200 (for "http_up": answers at all)."""
    while True:
        if server.poll() is not None:
            raise ChildProcessError(f"it ended with exit status {server.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not answer 200 in time")
        try:
            response = client.get(path)
            if response.status_code == 200 or what == "http_up":
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)


def engine_phases(log: str) -> dict[str, float]:
    """The engine's own account of its start, in seconds, from the line it logs when it is ready; empty without one."""
    line = re.search(r"ready on \w+ in \w+: (.*)", log)
    return {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", line[1])} if line else {}


def _read(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
