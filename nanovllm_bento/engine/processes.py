"""Small facts about processes: who is alive, and a folder for sockets that belongs to exactly one service."""

import os
import select
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nanovllm_bento.errors import ConfigError, EngineDeadError

_MAX_SOCKET_PATH = 100  # bytes; sun_path holds 108 with its end


def start_time(pid: int) -> int | None:
    """The process's start in clock ticks since boot, which tells it from a later one of the same pid; None if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])  # state is field 3 of proc(5)'s list, starttime field 22


def open_pidfd(pid: int) -> int | None:
    """A file descriptor that turns readable when the process ends; None if it is gone already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def on_sigterm(owner_pid: int, act: Callable[[], None]) -> None:
    """Have a thread call ``act`` at every SIGTERM but one: ``bentoml serve`` (the owner), when it ends, signals what
    its workers have started. An engine that one of them has started ends with the owner in any case, and not before.

    To be called before there are other threads: each of them leaves the signal to this one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while True:
            info = signal.sigwaitinfo({signal.SIGTERM})
            if info.si_pid != owner_pid or os.getppid() == owner_pid:
                act()

    threading.Thread(target=wait, daemon=True).start()


def end_with_owner(owner_pid: int, folder: Path) -> None:
    """Have a thread remove ``folder`` and end this process when the owner ends, also while a step hangs.

    Where it has ended already, so does this process, here: what its main thread would do next puts files there.
    """

    def end() -> NoReturn:
        remove_folder(folder)
        os._exit(0)

    pidfd = open_pidfd(owner_pid)
    if pidfd is None or start_time(owner_pid) is None:
        end()

    def wait() -> None:
        select.select([pidfd], [], [])
        end()

    threading.Thread(target=wait, daemon=True).start()


def write_whole(file: Path, text: str) -> None:
    """Write a file that other processes read at any time, or after this one was killed: they find all of it or none."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


def remove_folder(folder: Path) -> None:
    """Remove it, also while processes that are about to end still put files there; gives up after two seconds."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def ipc_folder(owner_pid: int, configured: str | None = None) -> Path:
    """The folder (mode 0700) for the sockets of the service whose main process is ``owner_pid``; made if missing.

    Named after that process and its start, so that two services never meet. Folders of services that are gone are
    removed on the way. Raises ConfigError if it is somebody else's or too long a path for a socket, and EngineDeadError
    if the main process has ended: whoever removes the folder then may have done so, and would not come again.
    """
    gone = f"The service's main process (pid {owner_pid}) has ended, and with it the engine."
    owner_started = start_time(owner_pid)
    if owner_started is None:
        raise EngineDeadError(gone)
    if configured is not None:
        folder = Path(configured)
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        base = Path(runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir())
        prefix = f"nanovllm-{os.getuid()}-"
        for old in base.glob(f"{prefix}*"):
            pid, _, started = old.name.removeprefix(prefix).partition("-")
            if pid.isdecimal() and str(start_time(int(pid))) != started:
                shutil.rmtree(old, ignore_errors=True)
        folder = base / f"{prefix}{owner_pid}-{owner_started}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"ipc_dir {folder} must be a folder of this user with mode 0700.")
    if len(os.fsencode(folder / "engine.sock")) > _MAX_SOCKET_PATH:
        raise ConfigError(f"ipc_dir {folder} is too long a path for a socket. Set NANOVLLM_IPC_DIR to a shorter one.")
    if start_time(owner_pid) != owner_started:  # it ended in between, so the folder may have been made once more
        remove_folder(folder)
        raise EngineDeadError(gone)
    return folder
