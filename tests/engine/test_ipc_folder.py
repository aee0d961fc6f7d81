"""A service's folder is its own: taken while its owner lives, also where nobody sees that, and free after that."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from nanovllm_bento.engine import ipc_folder as module
from nanovllm_bento.engine.ipc_folder import ipc_folder, remove_folder
from nanovllm_bento.engine.processes import start_time
from nanovllm_bento.errors import ConfigError, EngineDeadError

PREAMBLE = """
import os, subprocess, sys
from nanovllm_bento.engine.ipc_folder import *
from nanovllm_bento.engine import ipc_folder as module
configured = sys.argv[1] or None
"""
TAKE = "folder = ipc_folder(os.getpid(), configured)\n"
SAY = "print(folder, flush=True)\n"
WAIT = "sys.stdin.read()\n"
NAMESPACE = ["unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child", "--mount-proc"]


class Service(NamedTuple):
    """A process that owns a folder."""

    process: "subprocess.Popen[str]"
    folder: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def service(
    configured: Path | str = "", script: str = TAKE + SAY + WAIT, prefix: tuple[str, ...] = ()
) -> Iterator[Service]:
    """One that lives as long as the context, or ``kill``; what its script starts reads from the same pipe."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", PREAMBLE + script, str(configured)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Service(process, Path(process.stdout.readline().strip()))
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def living() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that owns nothing, and is a service's main process for what asks."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where services make their folders; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ipc-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)


def is_free(folder: Path) -> bool:
    """Whether its lock could be taken."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def make_unseen(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another PID namespace does: the process lives, and this one finds nothing of it."""
    monkeypatch.setattr(module, "start_time", lambda other: None if other == pid else start_time(other))


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


# -- folders that services name themselves ---------------------------------------------------------------------------


def test_folders_of_services_that_are_gone_are_removed(base: Path) -> None:
    with service() as killed:
        put(killed.folder, engine__pid="1 2", worker0__metrics="", limits__3="")
        killed.kill()
    with living() as gone:
        unlocked = ipc_folder(gone.pid)
        assert not killed.folder.exists()
    assert unlocked.exists()
    mine = ipc_folder(os.getpid())
    assert list(base.iterdir()) == [mine]
    assert mine.stat().st_mode & 0o777 == 0o700


def test_a_service_that_cannot_be_seen_keeps_its_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with service() as other:
        put(other.folder, engine__pid="1 2")
        make_unseen(other.process.pid, monkeypatch)
        mine = ipc_folder(os.getpid())
        assert set(base.iterdir()) == {mine, other.folder}
        assert (other.folder / "engine.pid").exists()
        other.kill()
        ipc_folder(os.getpid())
        assert list(base.iterdir()) == [mine]


def test_a_service_that_only_its_pid_tells_of_keeps_its_folder(base: Path) -> None:
    """One in which no main process of ours holds a lock, and one of a version that had none."""
    with living() as owner:
        unlocked = ipc_folder(owner.pid)
        older = base / f"nanovllm-{os.getuid()}-{owner.pid}-{start_time(owner.pid)}"
        older.mkdir()
        ipc_folder(os.getpid())
        assert unlocked.exists() and older.exists()


def test_the_same_pid_and_start_in_two_namespaces_are_two_services(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with living() as owner:
        folders = set()
        for namespace in (4026531836, 4026532221):
            monkeypatch.setattr(module, "_namespace", lambda inode=namespace: inode, raising=False)
            folders.add(ipc_folder(owner.pid))
    assert len(folders) == 2


def test_other_peoples_folders_beside_ours_are_left_alone(base: Path) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        put(Path(elsewhere), epoch="1")
        names = [f"nanovllm-{os.getuid()}-{rest}" for rest in ("notes", "1-x", "1-2-xyz", "")]
        for name in names:
            (base / name).mkdir()
        link = base / f"nanovllm-{os.getuid()}-4194305-1-1"  # no process has this pid
        link.symlink_to(elsewhere)
        ipc_folder(os.getpid())
        assert all((base / name).exists() for name in names)
        assert (Path(elsewhere) / "epoch").exists(), "a link is not followed"


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "while another holds it"])
def test_a_folder_that_another_removes_while_it_is_taken_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """To whoever removes stale folders a new one looks like one, until it is locked."""
    lock, flock, sleep, folder = module._lock, fcntl.flock, time.sleep, base / "new"
    sweeper = -1

    def remove_before_open(path: Path) -> int | None:
        monkeypatch.setattr(module, "_lock", lock)
        folder.rmdir()
        return lock(path)

    def remove_before_flock(fd: int, operation: int) -> None:
        monkeypatch.setattr(module.fcntl, "flock", flock)
        folder.rmdir()
        flock(fd, operation)

    def remove_while_waiting(seconds: float) -> None:
        monkeypatch.setattr(module.time, "sleep", sleep)
        folder.rmdir()
        os.close(sweeper)

    if moment == "before it is opened":
        monkeypatch.setattr(module, "_lock", remove_before_open)
    elif moment == "before it is locked":
        monkeypatch.setattr(module.fcntl, "flock", remove_before_flock)
    else:
        folder.mkdir(mode=0o700)
        sweeper = os.open(folder, os.O_RDONLY)
        fcntl.flock(sweeper, fcntl.LOCK_EX)
        monkeypatch.setattr(module.time, "sleep", remove_while_waiting)
    assert ipc_folder(os.getpid(), str(folder)) == folder
    assert not is_free(folder)
    assert os.listdir(folder) == ["owner"]


def test_many_services_that_start_at_once_leave_each_other_their_folders(base: Path) -> None:
    """Each sweeps while the others make theirs. They see nothing of each other but the locks."""
    blind = "module._namespace = os.getpid\n"
    script = "for _ in range(200):\n  folder = ipc_folder(os.getpid())\n  module._let_go()\n" + TAKE
    script = blind + script + "(folder / 'engine.pid').write_text(str(os.getpid()))\n" + SAY + WAIT
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script, ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        folders = {process.pid: Path(process.stdout.readline().strip()) for process in started}  # type: ignore[union-attr]
        assert set(base.iterdir()) == set(folders.values()) and len(set(folders.values())) == len(started)
        for pid, folder in folders.items():
            assert (folder / "engine.pid").read_text() == str(pid) and not is_free(folder)
    finally:
        for process in started:
            process.kill()
            process.communicate()


# -- a folder that several services were given -----------------------------------------------------------------------


def test_a_folder_in_use_is_refused_by_name(base: Path) -> None:
    with service(base / "ipc") as first:
        put(first.folder, engine__pid="1 2", epoch="3")
        with pytest.raises(
            ConfigError, match=rf"{first.folder} is in use .*\(pid {first.process.pid}\).*NANOVLLM_IPC_DIR"
        ):
            ipc_folder(os.getpid(), str(first.folder))
        assert (first.folder / "epoch").read_text() == "3"
        assert (first.folder / "owner").read_text().split()[0] == str(first.process.pid)


def test_a_folder_in_use_by_a_service_that_cannot_be_seen_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(base / "ipc") as first:
        make_unseen(first.process.pid, monkeypatch)
        monkeypatch.setattr(module, "_namespace", lambda: 1)
        with pytest.raises(ConfigError, match=rf"in use .*\(pid {first.process.pid} in another PID namespace\)"):
            ipc_folder(os.getpid(), str(first.folder))


def test_a_folder_that_nobody_locks_is_in_use_while_its_owner_is_seen(base: Path) -> None:
    with living() as owner:
        folder = ipc_folder(owner.pid, str(base / "ipc"))
        assert ipc_folder(owner.pid, str(base / "ipc")) == folder, "each worker of the service asks for it"
        with pytest.raises(ConfigError, match=rf"in use .*pid {owner.pid}"):
            ipc_folder(os.getpid(), str(base / "ipc"))


def test_workers_use_what_their_main_process_holds(base: Path) -> None:
    with service(base / "ipc") as main:
        put(main.folder, epoch="3")
        assert ipc_folder(main.process.pid, str(base / "ipc")) == main.folder
        assert (main.folder / "epoch").read_text() == "3"
        main.kill()
        assert is_free(main.folder), "to use is not to hold"


def test_a_folder_of_a_dead_service_is_taken_without_what_it_left(base: Path) -> None:
    with service(base / "ipc") as dead:
        put(dead.folder, failure="no", epoch="7", starts="1\n2\n", hash_seed="1", engine__pid="1 2", engine__error="no")
        put(dead.folder, worker0__metrics="x", engine7__metrics="x", limits="x", limits__0="x", epoch__123="half")
        put(dead.folder, notes__md="somebody's")
        dead.kill()
    folder = ipc_folder(os.getpid(), str(base / "ipc"))
    assert sorted(os.listdir(folder)) == ["notes.md", "owner"]
    assert not is_free(folder)
    put(folder, epoch="0")
    assert ipc_folder(os.getpid(), str(base / "ipc")) == folder
    assert (folder / "epoch").exists(), "it is emptied once"


def test_a_folder_with_files_of_others_is_refused(base: Path) -> None:
    folder = base / "home"
    folder.mkdir(mode=0o700)
    put(folder, thesis__tex="years of work", engine__pid="1 2")
    with pytest.raises(ConfigError, match=r"home holds files of others \(thesis.tex\).*NANOVLLM_IPC_DIR"):
        ipc_folder(os.getpid(), str(folder))
    remove_folder(folder, os.getpid())
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_given(base: Path) -> None:
    folder = base / "made"
    folder.mkdir(mode=0o700)
    assert ipc_folder(os.getpid(), str(folder)) == folder


def test_a_folder_open_to_others_is_refused(base: Path) -> None:
    folder = base / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        ipc_folder(os.getpid(), str(folder))
    (base / "link").symlink_to(base)
    (base / "file").touch(mode=0o600)
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="0700"):
            ipc_folder(os.getpid(), str(base / name))


def test_a_path_that_cannot_be_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        ipc_folder(os.getpid(), str(base / ("x" * 100)))
    assert list(base.iterdir()) == []
    (base / "file").touch()
    with pytest.raises(ConfigError, match=r"file/ipc cannot be made: .*NANOVLLM_IPC_DIR"):
        ipc_folder(os.getpid(), str(base / "file" / "ipc"))


# -- how long a lock is held -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "child",
    [
        pytest.param("subprocess.Popen(['cat'], close_fds=False)\n" + SAY, id="program"),
        pytest.param("if os.fork() == 0:\n  " + SAY, id="fork"),  # parent and child wait
    ],
)
def test_what_an_owner_has_started_does_not_hold_its_folder(base: Path, child: str) -> None:
    """BentoML has workers inherit descriptors."""
    with service(base / "ipc", TAKE + child + WAIT) as owner:
        assert not is_free(owner.folder)
        owner.kill()
        assert is_free(owner.folder)
        assert ipc_folder(os.getpid(), str(owner.folder)) == owner.folder


def test_an_owner_that_becomes_another_program_holds_its_folder_all_the_time(base: Path) -> None:
    """As nanovllm-bento serve becomes bentoml serve. What that starts does not hold it."""
    again = SAY + "sys.stdin.readline()\n" + TAKE + "subprocess.Popen(['cat'], close_fds=False)\n" + SAY + WAIT
    again = PREAMBLE + "folder = configured\n" + again
    script = (
        TAKE + f"keep_folders_over_exec()\nos.execv(sys.executable, [sys.executable, '-c', {again!r}, sys.argv[1]])"
    )
    with service(base / "ipc", script) as owner:
        assert owner.process.stdin is not None and owner.process.stdout is not None
        put(owner.folder, epoch="3")
        assert not is_free(owner.folder)
        owner.process.stdin.write("\n")
        owner.process.stdin.flush()
        assert owner.process.stdout.readline().strip() == str(owner.folder)
        assert not is_free(owner.folder) and (owner.folder / "epoch").exists()
        owner.kill()
        assert is_free(owner.folder)


def test_a_folder_that_was_lost_is_taken_again(base: Path) -> None:
    folder = ipc_folder(os.getpid(), str(base / "ipc"))
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    assert is_free(folder)
    assert ipc_folder(os.getpid(), str(folder)) == folder
    assert not is_free(folder)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_removed_with_what_its_service_put_there(base: Path) -> None:
    folder = ipc_folder(os.getpid(), str(base / "ipc"))
    put(folder, epoch="0", engine__pid="1 2", engine0__metrics="", owner__123="")
    remove_folder(folder, os.getpid())
    assert list(base.iterdir()) == []
    remove_folder(folder, os.getpid())


def test_what_others_put_there_since_stays(base: Path) -> None:
    folder = ipc_folder(os.getpid(), str(base / "ipc"))
    put(folder, epoch="0", notes__md="somebody's")
    began = time.monotonic()
    remove_folder(folder, os.getpid())
    assert os.listdir(folder) == ["notes.md"] and time.monotonic() - began < 1
    assert is_free(folder)


def test_a_folder_is_removed_while_processes_still_put_files_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, empty, late = ipc_folder(os.getpid(), str(base / "ipc")), module._empty, ["starts", "failure.7"]

    def with_a_late_file(fd: int) -> None:
        empty(fd)
        if late:
            put(folder, **{late.pop().replace(".", "__"): "late"})

    monkeypatch.setattr(module, "_empty", with_a_late_file)
    remove_folder(folder, os.getpid())
    assert list(base.iterdir()) == [] and not late


def test_the_end_of_one_service_leaves_the_folder_to_the_next(base: Path) -> None:
    with service(base / "ipc") as old:
        remove_folder(old.folder, old.process.pid)
        assert old.folder.exists(), "its owner lives"
        old.kill()
    folder = ipc_folder(os.getpid(), str(base / "ipc"))
    put(folder, epoch="0", engine__pid="1 2")
    remove_folder(folder, old.process.pid)
    assert sorted(os.listdir(folder)) == ["engine.pid", "epoch", "owner"]


def test_the_end_of_one_service_leaves_a_folder_that_nobody_locks_to_its_owner(base: Path) -> None:
    with service(base / "ipc") as old:
        old.kill()
    with living() as owner:
        folder = ipc_folder(owner.pid, str(base / "ipc"))
        remove_folder(folder, old.process.pid)
        remove_folder(folder, owner.pid)
        assert folder.exists(), "its owner lives"
    remove_folder(folder, old.process.pid)
    assert folder.exists(), "its own engine will remove it"
    remove_folder(folder, owner.pid)
    assert not folder.exists()


def is_stopped(pid: int) -> bool:
    """Whether all of its threads are, one of which might take the folder's lock otherwise, and be stopped with it."""
    stats = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(stat.rpartition(")")[2].split()[0] in "Tt" for stat in stats)


def test_an_engine_that_ends_late_leaves_the_folder_to_the_next_service(base: Path) -> None:
    engine = "import sys, time, pathlib; from nanovllm_bento.engine.ipc_folder import end_with_owner as end\n"
    engine += "end(int(sys.argv[1]), pathlib.Path(sys.argv[2])); print('begun', flush=True); time.sleep(600)"
    with service(base / "ipc") as old:
        late = subprocess.Popen(
            [sys.executable, "-c", engine, str(old.process.pid), str(old.folder)], stdout=subprocess.PIPE
        )
        assert late.stdout is not None
        try:
            late.stdout.readline()
            late.send_signal(signal.SIGSTOP)
            while not is_stopped(late.pid):
                time.sleep(0.001)
            old.kill()
            folder = ipc_folder(os.getpid(), str(base / "ipc"))
            put(folder, epoch="0")
            late.send_signal(signal.SIGCONT)
            assert late.wait(30) == 0
            assert sorted(os.listdir(folder)) == ["epoch", "owner"]
        finally:
            late.kill()
            late.wait()
            late.stdout.close()


def test_an_engine_whose_service_has_ended_does_not_begin(base: Path) -> None:
    with service(base / "ipc") as main:
        main.kill()
    script = "import sys, pathlib; from nanovllm_bento.engine.ipc_folder import end_with_owner as end;"
    script += "end(int(sys.argv[1]), pathlib.Path(sys.argv[2])); print('it goes on')"
    command = [sys.executable, "-c", script, str(main.process.pid), str(main.folder)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == ""
    assert not main.folder.exists()


def test_a_folder_made_while_its_service_ends_is_removed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with living() as owner:
        started = [start_time(owner.pid)]
        monkeypatch.setattr(module, "start_time", lambda pid: started.pop() if started else None)
        with pytest.raises(EngineDeadError):
            ipc_folder(owner.pid, str(base / "ipc"))
    assert list(base.iterdir()) == []


# -- real PID namespaces ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def namespace() -> tuple[str, ...]:
    """A prefix of commands that run in a PID namespace of their own, as process 1."""
    try:
        subprocess.run([*NAMESPACE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody make a PID namespace")
    return tuple(NAMESPACE)


def test_services_in_containers_that_share_a_folder_do_not_meet(base: Path, namespace: tuple[str, ...]) -> None:
    script = TAKE + "(folder / 'engine.pid').write_text('1 2')\n" + SAY + WAIT
    with service("", script, namespace) as one, service("", script, namespace) as other:
        assert one.folder.name.split("-")[2] == other.folder.name.split("-")[2] == "1"
        mine = ipc_folder(os.getpid())
        assert set(base.iterdir()) == {one.folder, other.folder, mine}
        assert (one.folder / "engine.pid").exists() and (other.folder / "engine.pid").exists()
        one.kill()
        wait_for(lambda: is_free(one.folder), "the container's process has ended")
        ipc_folder(os.getpid())
        assert set(base.iterdir()) == {other.folder, mine}


def test_a_folder_in_use_in_a_container_is_refused_in_another(base: Path, namespace: tuple[str, ...]) -> None:
    script = "try:\n  folder = ipc_folder(os.getpid(), configured)\nexcept Exception as e:\n  folder = e\n" + SAY + WAIT
    with service(base / "ipc", prefix=namespace) as one:
        with service(base / "ipc", script, namespace) as other:
            assert "is in use by another service (pid 1 in another PID namespace)" in str(other.folder)
        one.kill()
        wait_for(lambda: is_free(one.folder), "the container's process has ended")
        assert ipc_folder(os.getpid(), str(base / "ipc")) == one.folder
