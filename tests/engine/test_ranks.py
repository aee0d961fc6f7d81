"""The processes of tensor-parallel ranks: what reaches them, which one failed, and that none is ever left behind."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.processes import start_time
from nanovllm_bento.engine.rank_progress import Hang, HangDetector, RankState, Usage
from nanovllm_bento.engine.ranks import Ranks
from nanovllm_bento.errors import ConfigError, EngineDeadError, NanoVLLMError, RankError
from tests.engine.fake_rank import HOLDING_THE_GIL, digest

ROOT = Path(__file__).parents[2]
FAKE = "tests.engine.fake_rank"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def gone(pids: list[int]) -> bool:
    return all(start_time(pid) is None for pid in pids)


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    """The ranks can import the tests wherever pytest was started."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


class Failures(queue.SimpleQueue):
    """What on_failure was called with."""

    def only(self) -> NanoVLLMError:
        error = self.get(timeout=30)
        assert isinstance(error, NanoVLLMError)
        return error


@contextmanager
def started(
    size: int, executor: str = "Recorder", *, folder: Path | None = None, timeout: float = 15.0, **settings: object
) -> Iterator[tuple[Ranks, Failures]]:
    config = EngineConfig.create(env={}, model=str(folder or "none"), tensor_parallel_timeout=timeout)
    failures = Failures()
    settings = {"device": "cpu", "on_failure": failures.put} | settings
    ranks = Ranks(config, size, executor=f"{FAKE}:{executor}", **settings)  # type: ignore[arg-type]
    try:
        yield ranks, failures
    finally:
        ranks.close()
        assert gone(ranks.pids) and failures.empty()


def ready(ranks: Ranks) -> None:
    ranks.wait_ready(60)
    ranks.watch_steps()


def publish(ranks: Ranks, **what: str) -> None:
    """A step in which ranks misbehave: _1="sleep"."""
    ranks.publish(json.dumps({rank.removeprefix("_"): how for rank, how in what.items()}).encode())


def random_step(size: int) -> bytes:
    """A step that no rank takes for a JSON object."""
    return (b"-" + os.urandom(size))[:size]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_steps_reach_every_rank_in_order_and_sets_of_ranks_do_not_meet(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    capacity = 64 * 1024 - 8
    with started(4, folder=folders[0]) as (one, _), started(2, folder=folders[1], spin_seconds=0.001) as (other, _):
        assert one.store != other.store
        sent: list[list[bytes]] = [[], []]
        for size in (0, 1, 4096, capacity, capacity + 1, 2_000_000, 7):  # before and after they are ready
            for which, ranks in enumerate((one, other)):
                sent[which].append(random_step(size))
                ranks.publish(sent[which][-1])
            if size == 4096:
                startup = one.wait_ready(60)
                assert [seconds["load"] for seconds in startup] == [0.25, 0.5, 0.75]
                assert all(seconds["total"] >= 0 for seconds in startup)
        for ranks, folder, messages in zip((one, other), folders, sent, strict=True):
            expected = [digest(message) for message in messages]
            for rank in range(1, ranks.size):
                file = folder / f"rank{rank}"
                wait_for(lambda: file.exists() and len(file.read_text().split()) == 7, "all has arrived")  # noqa: B023
                assert file.read_text().split() == expected
        pids = one.pids + other.pids
        one.close()
        with pytest.raises(EngineDeadError, match="closed"):
            one.publish(b"")
        assert gone(pids[:3]) and not gone(pids[3:])


def test_ranks_outlive_the_thread_that_asked_for_them(tmp_path):
    made: list[Ranks] = []
    config = EngineConfig.create(env={}, model=str(tmp_path))
    thread = threading.Thread(target=lambda: made.append(Ranks(config, 2, device="cpu", executor=f"{FAKE}:Recorder")))
    thread.start()
    thread.join()
    (ranks,) = made
    try:
        ranks.wait_ready(60)
        ranks.publish(b"step")
        wait_for(lambda: (tmp_path / "rank1").read_text() == f"{digest(b'step')}\n", "it executes")
    finally:
        ranks.close()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_killed_is_named_and_the_others_end():
    with started(4, device="cuda") as (ranks, failures):
        ready(ranks)
        pids = ranks.pids
        os.kill(pids[1], signal.SIGKILL)
        error = failures.only()
        assert isinstance(error, RankError)
        assert str(error) == f"tensor-parallel rank 2 (pid {pids[1]}, GPU 2) died of signal 9 (SIGKILL)"
        assert ranks.cause() is error
        with pytest.raises(RankError, match="rank 2"):
            ranks.publish(b"")
        with pytest.raises(RankError, match="rank 2"):
            ranks.wait_ready(0)
        wait_for(lambda: gone(pids), "the others end")


def test_the_gpu_is_called_what_the_machine_calls_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with started(2, "exiting", device="cuda") as (_, failures):
        assert "GPU 7) exited with 3" in str(failures.only())


def test_all_ranks_are_killed_before_the_failure_is_told():
    """Whoever is told may have to wait for a thread that waits for a rank."""
    told = queue.SimpleQueue()

    def on_failure(error: NanoVLLMError) -> None:
        wait_for(lambda: gone(ranks.pids), "they end")
        told.put(str(error))
        raise KeyError("of on_failure")

    with started(3, on_failure=on_failure) as (ranks, _):
        ready(ranks)
        publish(ranks, _1="exit", _2=HOLDING_THE_GIL)
        assert "rank 1 " in told.get(timeout=30)


@pytest.mark.parametrize(
    ("executor", "kind", "message"),
    [
        ("refusing", ConfigError, r"^dtype=float16 is not possible here\. Choose another\.$"),
        ("raising", RankError, r"rank 2 \(pid \d+\) exited with 1: ValueError: first line$"),
        ("exiting", RankError, r"rank 2 \(pid \d+\) exited with 3$"),
        ("missing", RankError, r"rank \d \(pid \d+\) exited with 1: AttributeError: .*missing"),
    ],
)
def test_a_rank_that_fails_while_it_starts_gives_its_error(executor, kind, message):
    with started(3, executor) as (ranks, failures):
        with pytest.raises(kind, match=message):
            ranks.wait_ready(60)
        assert type(failures.only()) is kind


def test_ranks_that_are_not_ready_in_time_are_named():
    with started(3, "loading") as (ranks, _):
        wait_for(lambda: bool(ranks._ranks) and ranks._ranks[0].ready is not None, "rank 1 is ready")
        with pytest.raises(RankError, match=r"^tensor-parallel rank 2 \(pid \d+\) did not get ready within 0.1 s"):
            ranks.wait_ready(0.1)


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        ({"_2": "raise"}, RankError, "rank 2 .* exited with 1: ValueError: first line"),
        ({"_1": "refuse"}, ConfigError, "^dtype=float16"),
        ({"_1": "exit"}, RankError, "rank 1 .* exited with 3"),
    ],
)
def test_a_rank_that_fails_in_a_step_gives_its_error(step, kind, message):
    with started(3) as (ranks, failures):
        ready(ranks)
        publish(ranks, **step)
        error = failures.only()
        assert type(error) is kind
        with pytest.raises(kind, match=message):
            ranks.publish(b"")


def test_signals_that_end_programs_are_not_for_the_ranks(tmp_path):
    with started(2, folder=tmp_path) as (ranks, _):
        wait_for(lambda: len(ranks.pids) == 1, "it starts")
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(ranks.pids[0], signum)  # while Python itself starts
        ready(ranks)
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(ranks.pids[0], signum)
        ranks.publish(b"step")
        wait_for(lambda: (tmp_path / "rank1").read_text() == f"{digest(b'step')}\n", "it executes")


# -- hangs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stopped_rank_is_noticed_and_named(device):
    with started(3, device=device, timeout=0.5) as (ranks, failures):
        ready(ranks)
        os.kill(ranks.pids[1], signal.SIGSTOP)
        ranks.publish(b"step")
        assert "rank 2 " in (text := str(failures.only()))
        assert "has not taken up step 1 for " in text and text.endswith("(it is stopped)")


def test_a_rank_that_is_stopped_while_it_starts_is_noticed_and_named():
    with started(3, "loading", timeout=0.5) as (ranks, failures):
        wait_for(lambda: len(ranks.pids) == 2, "both have been started")
        os.kill(ranks.pids[1], signal.SIGSTOP)
        assert "rank 2 " in (text := str(failures.only())) and "rank 1" not in text
        assert text.endswith("has been stopped for 0.5 s while starting")


@pytest.mark.parametrize("how", ["sleep", "loop", HOLDING_THE_GIL])
def test_a_rank_that_hangs_in_a_step_is_noticed_and_named_and_shows_where(how, capfd):
    with started(3, timeout=1.0) as (ranks, failures):
        ready(ranks)
        ranks.publish(b"fine")
        publish(ranks, _1=how)
        assert "rank 1 " in (text := str(failures.only())) and "rank 2" not in text
        assert "has not finished step 2 for " in text
    assert "in misbehave" in capfd.readouterr().err


def test_a_rank_that_hangs_while_rank_0_goes_on_is_noticed_and_named():
    with started(3, device="cuda", timeout=0.5) as (ranks, failures):
        ready(ranks)
        publish(ranks, _2="sleep")
        for _ in range(5):
            ranks.publish(b"more")
        assert "rank 2 " in (text := str(failures.only()))
        assert "has not taken up step 2 for " in text


def test_a_full_ring_ends_with_the_rank_that_filled_it():
    with started(3, timeout=0.5) as (ranks, failures):
        ready(ranks)
        os.kill(ranks.pids[0], signal.SIGSTOP)
        with pytest.raises(RankError, match="rank 1"):
            for _ in range(100):
                ranks.publish(b"step")
        assert "rank 1" in str(failures.only())


class Looks:
    """A detector with a timeout of 10 seconds, and looks at ranks every second."""

    def __init__(self, num_ranks: int, *, launch_computes: bool = True) -> None:
        self.detector = HangDetector(num_ranks, 10.0, launch_computes=launch_computes)
        self.now = 100.0
        self.publisher_seconds = 0.0
        self.used = [0.0] * num_ranks
        self.counts = [(0, 0)] * num_ranks
        self.stopped: set[int] = set()
        self.num_published = 0

    def look(self) -> Hang | None:
        self.now += 1
        states = [
            RankState(*counts, Usage(used, place in self.stopped))
            for place, (counts, used) in enumerate(zip(self.counts, self.used, strict=True))
        ]
        return self.detector.look(self.now, self.num_published, self.publisher_seconds, states)

    def until_hang(self, limit: int = 30, *, busy: set[int] = frozenset(), publisher: float = 0.0) -> Hang | None:  # type: ignore[assignment]
        for _ in range(limit):
            self.used = [used + (place in busy) for place, used in enumerate(self.used)]
            self.publisher_seconds += publisher
            if (hang := self.look()) is not None:
                return hang
        return None


def test_idle_ranks_do_not_hang():
    looks = Looks(2)
    assert looks.until_hang() is None
    looks.num_published, looks.counts = 3, [(3, 3), (3, 3)]
    assert looks.until_hang() is None


def test_a_long_step_on_a_cpu_is_no_hang_while_somebody_computes():
    looks = Looks(2)
    looks.num_published, looks.counts = 1, [(1, 0), (1, 0)]
    assert looks.until_hang(200, busy={0, 1}, publisher=0.9) is None
    hang = looks.until_hang(12, busy={0})
    assert hang is not None and hang.places == [0], "rank 0 waits, and this one computes"


def test_a_long_launch_on_a_gpu_is_a_hang_whoever_computes():
    looks = Looks(2, launch_computes=False)
    looks.num_published, looks.counts = 1, [(1, 0), (1, 1)]
    hang = looks.until_hang(busy={0}, publisher=1.0)
    assert hang == Hang([0], "has not finished step 1 for 10 s")


def test_when_none_can_be_told_from_another_all_are_named():
    looks = Looks(3)
    looks.num_published, looks.counts = 5, [(5, 4), (5, 5), (5, 4)]
    assert looks.until_hang() == Hang([0, 2], "have not finished step 5 for 10 s")


def test_the_stopped_rank_is_to_blame_not_those_that_wait_for_it():
    looks = Looks(3)
    looks.num_published, looks.counts, looks.stopped = 5, [(5, 4), (5, 4), (5, 4)], {1}
    assert looks.until_hang() == Hang([1], "has not finished step 5 for 10 s (it is stopped)")


def test_the_rank_that_is_behind_is_to_blame_not_those_that_wait_for_it():
    looks = Looks(3, launch_computes=False)
    looks.num_published, looks.counts = 5, [(5, 4), (3, 2), (5, 4)]
    assert looks.until_hang() == Hang([1], "has not taken up step 4 for 10 s")


def test_every_step_has_its_own_time():
    looks = Looks(1, launch_computes=False)
    for step in range(1, 40):
        looks.num_published, looks.counts = step, [(step, step - 1)]
        assert looks.until_hang(8) is None


def test_a_machine_that_was_suspended_has_no_hung_ranks():
    looks = Looks(1)
    looks.num_published, looks.counts = 1, [(1, 0)]
    assert looks.until_hang(5) is None
    looks.now += 1000
    assert looks.until_hang(9) is None
    assert looks.until_hang(9) is not None


# -- no orphans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "executor", "step", "stopped"),
    [
        (4, "Recorder", {"1": "sleep", "2": "loop", "3": HOLDING_THE_GIL}, False),
        (3, "loading", None, False),
        (2, "stuck_in_c", None, False),
        (2, "Recorder", {}, True),
    ],
    ids=["in a step", "while they load", "while they load in C", "stopped"],
)
def test_no_rank_is_left_when_rank_0_is_killed(size, executor, step, stopped):
    what = {"size": size, "executor": f"{FAKE}:{executor}", "step": step}
    rank_0 = subprocess.Popen(
        [sys.executable, "-m", FAKE, json.dumps(what)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert rank_0.stdin is not None and rank_0.stdout is not None
    with rank_0.stdin, rank_0.stdout:
        pids = json.loads(rank_0.stdout.readline())
        assert len(pids) == size - 1 and not any(gone([pid]) for pid in pids)
        if stopped:
            os.kill(pids[0], signal.SIGSTOP)
        rank_0.kill()
        rank_0.wait()
    wait_for(lambda: gone(pids), f"all of {pids} end")


def test_no_rank_is_left_when_rank_0_forgets_to_close():
    code = f"""
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.ranks import Ranks
ranks = Ranks(EngineConfig.create(env={{}}), 2, device="cpu", executor="{FAKE}:Recorder")
ranks.wait_ready(60)
print(*ranks.pids)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: gone([int(done.stdout)]), "it ends")


def test_close_ends_ranks_in_the_middle_of_a_step_and_kills_those_that_cannot_end():
    with started(4) as (ranks, _):
        ranks.wait_ready(60)
        publish(ranks, _1=HOLDING_THE_GIL, _2="sleep", _3="loop")
        wait_for(lambda: all(ranks._writer.progress(i) == (1, 0) for i in range(3)), "they hang")
    assert [rank.process.returncode for rank in ranks._ranks] == [-signal.SIGKILL, 0, 0]


def test_closing_while_ranks_start_is_an_end_like_any():
    with started(3):
        pass
