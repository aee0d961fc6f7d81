"""Small facts about processes: who is alive, when they end, and what they tell each other in files."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path


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


def name_process(file: Path, pid: int) -> None:
    """Write which process it is, for ``process_named_by``."""
    write_whole(file, f"{pid} {start_time(pid)}")


def process_named_by(file: Path) -> int | None:
    """The pid of the process that ``file`` names, if there is such a file and the process still lives."""
    try:
        pid, started = map(int, file.read_text().split())
    except (OSError, ValueError):
        return None
    return pid if start_time(pid) == started else None


def write_whole(file: Path, text: str) -> None:
    """Write a file that other processes read at any time, or after this one was killed: they find all of it or none."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)
