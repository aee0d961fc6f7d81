"""A folder for sockets and shared files that belongs to exactly one service.

It names its owner, the service's main process, in the file ``owner``, and the owner locks it (flock on the folder
itself) for as long as it lives. The kernel takes the lock from one that ends, however it does, and shows it to other
containers too, which see none of its processes. Whoever takes a folder over, or removes one, holds that lock meanwhile.
Workers and engine only use the folder. Without a main process of ours (a service within a program that is not its own
owner) nobody holds the lock; such a folder is another's as long as its owner is seen to live.
"""

import contextlib
import fcntl
import os
import re
import select
import stat
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nanovllm_bento.engine.processes import open_pidfd, start_time, write_whole
from nanovllm_bento.errors import ConfigError, EngineDeadError

_MAX_SOCKET_PATH = 100  # bytes; sun_path holds 108 with its end
_OWNER = "owner"
_FILES = re.compile(r"(owner|engine\d*|worker\d+|epoch|hash_seed|starts|failure|limits)(\.\w+)*")
"""Names of what a service keeps in its folder. Whatever else lies in a folder that somebody configured is not ours."""
_PATIENCE = 1.0  # seconds for which a folder may be locked by one that looks at it, or removes it
_held: dict[Path, int] = {}
"""The folders that this process owns, and the descriptors that hold their locks."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A main process. ``started`` and ``namespace`` (the inode of its PID namespace) tell it from others of its pid."""

    pid: int
    started: int
    namespace: int

    @classmethod
    def of(cls, pid: int) -> "Owner | None":
        """A process that this one sees; None if it has ended."""
        started = start_time(pid)
        return None if started is None else cls(pid, started, _namespace())

    @classmethod
    def named_by(cls, folder: Path) -> "Owner | None":
        """The one that the folder was made for; None if there is no word of it."""
        try:
            return cls(*map(int, (folder / _OWNER).read_text().split()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def is_near(self) -> bool:
        """Whether it is or was in this process's PID namespace."""
        return self.namespace == _namespace()

    @property
    def is_seen(self) -> bool:
        """Whether it lives and can be seen from here. In another PID namespace it never can."""
        return self.is_near and start_time(self.pid) == self.started

    def name(self, folder: Path) -> None:
        """Write it into the folder, whose lock the caller holds."""
        write_whole(folder / _OWNER, f"{self.pid} {self.started} {self.namespace}")


def ipc_folder(owner_pid: int, configured: str | None = None) -> Path:
    """The folder (mode 0700) for the sockets of the service whose main process is ``owner_pid``; made if missing.

    Where that is the calling process, it is the folder's owner until it ends. A folder whose owner has ended is taken
    over, without the files that it left there. Named after the owner if not ``configured``; those of services that are
    gone are then removed on the way. Raises ConfigError if it is in use by another service, holds files of others, is
    open to other users or too long a path for a socket, and EngineDeadError if the main process has ended: whoever
    removes the folder then may have done so, and would not come again.
    """
    gone = f"The service's main process (pid {owner_pid}) has ended, and with it the engine."
    owner = Owner.of(owner_pid)
    if owner is None:
        raise EngineDeadError(gone)
    folder = _default_folder(owner) if configured is None else Path(configured)
    if len(os.fsencode(folder / "engine.sock")) > _MAX_SOCKET_PATH:
        raise ConfigError(f"ipc_dir {folder} is too long a path for a socket. Set NANOVLLM_IPC_DIR to a shorter one.")
    until = time.monotonic() + _PATIENCE
    while not _claim(folder, owner):
        if time.monotonic() > until:
            raise ConfigError(
                f"ipc_dir {folder} is in use by another service{_pid_of(Owner.named_by(folder))}. Give each service "
                "its own NANOVLLM_IPC_DIR, or leave it unset."
            )
        time.sleep(0.02)
    if start_time(owner_pid) != owner.started:  # it ended in between, so the folder may have been made once more
        remove_folder(folder, owner_pid)
        raise EngineDeadError(gone)
    return folder


def remove_folder(folder: Path, owner_pid: int) -> None:
    """Remove the files of the service whose main process is or was ``owner_pid``, and the folder if that empties it.

    Leaves alone what has another owner by now, and what an owner that lives (if it is not this process) still uses.
    Also works while processes that are about to end still put files there; gives up after two seconds.
    """
    for _ in range(40):
        found = Owner.named_by(folder)
        is_mine = owner_pid == os.getpid()
        if found is not None and (found.pid != owner_pid or not found.is_near or (found.is_seen and not is_mine)):
            return
        fd = _held.pop(folder, None) if is_mine else None
        fd = _lock(folder) if fd is None else fd
        if fd is not None:
            try:
                if _is_at(fd, folder) and Owner.named_by(folder) == found:
                    _empty(fd)
                    with contextlib.suppress(OSError):  # not empty, or a mount point
                        folder.rmdir()
            finally:
                os.close(fd)
        try:
            if not any(map(_FILES.fullmatch, os.listdir(folder))):
                return
        except OSError:
            return
        time.sleep(0.05)


def end_with_owner(owner_pid: int, folder: Path) -> None:
    """Have a thread remove ``folder`` and end this process when the owner ends, also while a step hangs.

    Where it has ended already, so does this process, here: what its main thread would do next puts files there.
    """

    def end() -> NoReturn:
        remove_folder(folder, owner_pid)
        os._exit(0)

    pidfd = open_pidfd(owner_pid)
    if pidfd is None or start_time(owner_pid) is None:
        end()

    def wait() -> None:
        select.select([pidfd], [], [])
        end()

    threading.Thread(target=wait, daemon=True).start()


def keep_folders_over_exec() -> None:
    """Let the program that this process is about to become own its folders: it finds them when it asks for them."""
    for fd in _held.values():
        os.set_inheritable(fd, True)


def _default_folder(owner: Owner) -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir())
    prefix = f"nanovllm-{os.getuid()}-"
    for old in base.glob(f"{prefix}*"):
        pid, _, rest = old.name.removeprefix(prefix).partition("-")
        started, _, namespace = rest.partition("-")
        with contextlib.suppress(ValueError, OSError):  # not a name of ours; not our folder
            if not Owner(int(pid), int(started), int(namespace, 16) if namespace else _namespace()).is_seen:
                _remove_stale(old)
    return base / f"{prefix}{owner.pid}-{owner.started}-{owner.namespace:x}"


def _remove_stale(folder: Path) -> None:
    fd = _lock(folder)
    if fd is None:  # its owner lives, where this process cannot see it
        return
    try:
        if os.fstat(fd).st_uid == os.getuid():
            _empty(fd)
            folder.rmdir()
    finally:
        os.close(fd)


def _claim(folder: Path, owner: Owner) -> bool:
    """Make the folder and make it this owner's, if it is not. Returns False as long as another has it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass
    except OSError as e:
        raise ConfigError(f"ipc_dir {folder} cannot be made: {e}. Set NANOVLLM_IPC_DIR to another folder.") from e
    try:
        status = folder.lstat()
    except FileNotFoundError:  # somebody else has just removed it
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"ipc_dir {folder} must be a folder of this user with mode 0700.")
    if owner.pid == os.getpid():
        if folder in _held and not _is_at(_held[folder], folder):
            os.close(_held.pop(folder))
        if folder in _held or (Owner.named_by(folder) == owner and _inherit(folder)):
            return True
    elif Owner.named_by(folder) == owner:
        return True
    fd = _lock(folder)
    if fd is None:
        return False
    try:
        found = Owner.named_by(folder)
        if found != owner:
            if found is not None and found.is_seen:
                return False
            _refuse_files_of_others(folder, found)
            _empty(fd)
            owner.name(folder)
        if owner.pid == os.getpid():
            _held[folder], fd = fd, -1
        return True
    finally:
        if fd >= 0:
            os.close(fd)


def _refuse_files_of_others(folder: Path, found: Owner | None) -> None:
    others = [name for name in os.listdir(folder) if not _FILES.fullmatch(name)]
    if found is None and others:
        raise ConfigError(
            f"ipc_dir {folder} holds files of others ({min(others)}). Set NANOVLLM_IPC_DIR to a folder that is empty "
            "or does not exist."
        )


def _pid_of(owner: Owner | None) -> str:
    if owner is None:
        return ""
    return f" (pid {owner.pid})" if owner.is_near else f" (pid {owner.pid} in another PID namespace)"


def _namespace() -> int:
    """The inode of this process's PID namespace, 0 where the kernel does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None if another holds it or there is no folder.

    Not inherited by programs that are started: workers and engine may live longer than the owner.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, folder):
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_at(fd: int, folder: Path) -> bool:
    """Whether the path still leads to the open folder: one that was locked may have been removed before that."""
    try:
        return os.path.samestat(os.fstat(fd), folder.lstat())
    except FileNotFoundError:
        return False


def _inherit(folder: Path) -> bool:
    """Whether this process has owned the folder since before it became another program."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed again: the list's own
            if os.get_inheritable(fd) and _is_at(fd, folder):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.set_inheritable(fd, False)
                _held[folder] = fd
                return True
    return False


def _empty(fd: int) -> None:
    """Remove the files of a service from an open folder, whose lock the caller holds."""
    for name in os.listdir(fd):
        if _FILES.fullmatch(name):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=fd)


def _let_go() -> None:
    """A fork is another process and owns nothing; with its copy of the descriptors it would keep the locks."""
    for fd in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
