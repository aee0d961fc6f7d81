"""Bounds hold for all workers together, nobody is starved, and what is open is counted back to zero."""

import asyncio
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import InvalidRequestError, PromptTooLongError, SamplingParamsError
from nanovllm_bento.serving.admission import Admission
from nanovllm_bento.serving.auth import ANONYMOUS, Caller, KeyLimits
from nanovllm_bento.serving.errors import DrainingError, OverloadedError, error_object
from nanovllm_bento.serving.fairness import FairQueue
from nanovllm_bento.serving.ledger import Ledger

ALICE, BOB = Caller("alice"), Caller("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, **limits: object) -> Admission:
    return Admission(ServiceConfig.create(env={}, **limits), ledger=Ledger(clock=clock or Clock()))


def refusal(admission: Admission, caller: Caller, num: int = 1, tokens: int = 0) -> OverloadedError:
    """What both check and admit refuse with."""
    with pytest.raises(OverloadedError):
        admission.check(caller, num, tokens)
    before = admission.num_open
    with pytest.raises(OverloadedError) as error, admission.admit(caller, num, tokens):
        pass
    assert admission.num_open == before
    return error.value


# -- open sequences ---------------------------------------------------------------------------------------------------


def test_open_sequences_are_bounded_and_counted_back() -> None:
    admission = make(max_waiting_requests=4)
    with admission.admit(ANONYMOUS, 3):
        assert admission.num_open == 3
        assert refusal(admission, ANONYMOUS, 2).retry_after >= 1
        with admission.admit(ANONYMOUS, 1):
            assert admission.num_open == 4
    with pytest.raises(ValueError), admission.admit(ANONYMOUS, 4):
        raise ValueError
    assert admission.num_open == 0
    with pytest.raises(InvalidRequestError, match="at most 4"):
        admission.check(ANONYMOUS, 5)


def test_many_greedy_keys_leave_room_for_the_next_one() -> None:
    admission = make(max_waiting_requests=100)
    greedy = [Caller(f"greedy-{i}") for i in range(4)]
    tickets = []
    for _ in range(100):
        for caller in greedy:
            ticket = admission.admit(caller, 1)
            try:
                tickets.append(ticket.__enter__())
            except OverloadedError:
                continue
    assert 80 <= admission.num_open < 100
    with admission.admit(ALICE, 1):
        assert "this API key" in str(refusal(admission, greedy[0]))
    for ticket in tickets:
        ticket.__exit__(None, None, None)
    assert admission.num_open == 0 and not admission._open_by_name


def test_a_key_alone_gets_most_of_the_room() -> None:
    admission = make(max_waiting_requests=100)
    num = 0
    with pytest.raises(OverloadedError):
        while True:
            admission.admit(ALICE, 1).__enter__()
            num += 1
    assert num == 80


def test_one_keys_concurrency_is_its_own() -> None:
    admission = make(max_concurrency_per_key=2)
    with admission.admit(ALICE, 2):
        assert "at most 2" in str(refusal(admission, ALICE))
        with admission.admit(BOB, 1):
            pass
    with admission.admit(ALICE, 1), pytest.raises(InvalidRequestError, match="at most 2"):
        admission.check(ALICE, 3)


def test_a_keys_own_limits_go_before_the_settings() -> None:
    admission = make(max_concurrency_per_key=1)
    vip = Caller("vip", limits=KeyLimits(max_concurrency=3))
    with admission.admit(vip, 3):
        refusal(admission, vip)


# -- rates ------------------------------------------------------------------------------------------------------------


def test_requests_a_minute_come_back_evenly() -> None:
    clock = Clock()
    admission = make(clock, requests_per_minute=6)
    for _ in range(6):
        with admission.admit(ALICE, 1):
            pass
    error = refusal(admission, ALICE)
    assert error.retry_after == pytest.approx(10)
    status, body, headers = error_object(error)
    assert (status, headers["Retry-After"], body["error"]["code"]) == (429, "10", "rate_limit_exceeded")
    with admission.admit(BOB, 1):
        pass
    clock.now += 9.9
    refusal(admission, ALICE)
    clock.now += 0.2
    with admission.admit(ALICE, 1):
        pass
    refusal(admission, ALICE)
    clock.now += 3600
    for _ in range(6):
        with admission.admit(ALICE, 1):
            pass
    refusal(admission, ALICE)


def test_waiting_as_long_as_retry_after_says_is_enough() -> None:
    clock = Clock()
    admission = make(clock, requests_per_minute=7, tokens_per_minute=100)
    rng = random.Random(1)
    for _ in range(200):
        caller, tokens = rng.choice([ALICE, BOB]), rng.randrange(60)
        try:
            admission.check(caller, 1, tokens)
        except OverloadedError as e:
            clock.now += e.retry_after
        with admission.admit(caller, 1, tokens) as ticket:
            ticket.charge(rng.randrange(30))


def test_tokens_a_minute_count_prompt_and_output() -> None:
    clock = Clock()
    admission = make(clock, tokens_per_minute=100)
    with admission.admit(ALICE, 1, 60) as ticket:
        ticket.charge(100)
    assert refusal(admission, ALICE, 1, 40).retry_after == pytest.approx(60)  # 60 + 100 + 40 of 100
    clock.now += 60
    with admission.admit(ALICE, 1, 40):
        pass
    clock.now += 600
    with admission.admit(ALICE, 1, 5000):  # more than a minute's worth: when nothing else is used
        pass
    refusal(admission, ALICE, 1, 1)


def test_without_keys_all_clients_share_one_rate() -> None:
    admission = make(requests_per_minute=1)
    with admission.admit(ANONYMOUS, 1):
        pass
    refusal(admission, ANONYMOUS)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.floats(0, 20), st.booleans()), max_size=60),
    st.integers(1, 10),
)
def test_a_bucket_never_gives_more_than_a_burst_and_its_rate(
    steps: list[tuple[str, int, float, bool]], limit: int
) -> None:
    clock = Clock()
    admission = make(clock, requests_per_minute=limit, max_concurrency_per_key=5)
    start, given_, tickets = clock.now, Counter[str](), {"a": [], "b": []}  # type: ignore[var-annotated]
    for name, num, wait, closes in steps:
        clock.now += wait
        if closes and tickets[name]:
            tickets[name].pop()[0].__exit__(None, None, None)
        ticket = admission.admit(Caller(name), num)
        try:
            ticket.__enter__()
        except OverloadedError:
            continue
        tickets[name].append((ticket, num))
        given_[name] += 1
        assert sum(n for _, n in tickets[name]) <= 5
        assert given_[name] <= limit + limit * (clock.now - start) / 60 + 1e-3
        assert admission.num_open == sum(n for name in "ab" for _, n in tickets[name])


# -- several workers --------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.serving.admission import Admission
from nanovllm_bento.serving.auth import Caller
from nanovllm_bento.serving.errors import OverloadedError
admission = Admission(ServiceConfig.create(env={}, LIMITS), folder=Path(sys.argv[1]))
print("up", flush=True)
tickets = []
for line in sys.stdin:
    admitted = 0
    for _ in range(int(line)):
        try:
            tickets.append(admission.admit(Caller("alice"), 1).__enter__())
            admitted += 1
        except OverloadedError:
            pass
    print(admitted, flush=True)
"""


class Worker:
    """An API worker's admission in a process of its own."""

    def __init__(self, folder: Path, limits: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER.replace("LIMITS", limits), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, num: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("limits", ["requests_per_minute=50", "max_concurrency_per_key=50"])
def test_workers_together_stay_within_a_keys_limit_and_a_killed_one_counts_no_more(tmp_path: Path, limits: str) -> None:
    workers = [Worker(tmp_path, limits) for _ in range(3)]
    try:
        assert [worker.read() for worker in workers] == ["up"] * 3
        for worker in workers:
            worker.ask(60)
        admitted = [int(worker.read()) for worker in workers]
        leaked = 1 if "minute" in limits else 0  # what one request a 1.2 s gives back meanwhile
        assert 50 <= sum(admitted) <= 50 + 10 * leaked
        if not leaked:
            most = max(range(3), key=admitted.__getitem__)
            workers.pop(most).kill()
            workers[0].ask(60)
            assert int(workers[0].read()) == admitted[most]
    finally:
        for worker in workers:
            worker.kill()


def test_two_ledgers_of_a_folder_see_each_other_until_one_closes(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.add_open("alice", 2)
    second.add_open("alice", 3)
    with second:
        assert second.num_open("alice") == 5
    first.close()
    assert second.num_open("alice") == 3
    third = Ledger(tmp_path)  # takes the column that the first left, and not its counts
    assert third.num_open("alice") == 3
    for ledger in (second, third):
        ledger.close()
    assert (tmp_path / "limits").stat().st_mode & 0o777 == 0o600


# -- taking turns -----------------------------------------------------------------------------------------------------


async def test_a_long_queue_of_one_does_not_delay_another() -> None:
    queue = FairQueue(2)
    order: list[str] = []

    async def request(name: str, priority: int = 0, num: int = 1) -> None:
        await queue.enter(name, priority, num)
        order.append(name)

    tasks = [asyncio.create_task(request("greedy")) for _ in range(50)]
    tasks += [asyncio.create_task(request("small")) for _ in range(2)]
    tasks.append(asyncio.create_task(request("urgent", -1)))
    await asyncio.sleep(0)
    assert queue.num_held == 51 and order == ["greedy"] * 2
    for _ in range(53):
        queue.leave(1)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order[2:7] == ["urgent", "greedy", "small", "greedy", "small"]
    assert queue.num_inside == queue.num_held == 0


async def test_turns_survive_clients_that_leave() -> None:
    """Whoever leaves, at whatever moment, nobody else loses a turn and nothing stays counted."""
    rng = random.Random(7)
    queue = FairQueue(5)
    inside = 0

    async def request(i: int) -> None:
        nonlocal inside
        num = rng.choice([1, 1, 2, 9])
        await queue.enter(f"caller-{i % 4}", rng.randrange(2), num)
        inside += num
        assert inside <= 5 or inside == num
        try:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        finally:
            inside -= num
            queue.leave(num)

    tasks = [asyncio.create_task(request(i)) for i in range(300)]
    while not all(task.done() for task in tasks):
        rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
    assert any(result is None for result in results)
    assert queue.num_inside == queue.num_held == 0 and not queue._waiting


async def test_a_ticket_gives_its_turn_back() -> None:
    admission = Admission(ServiceConfig.create(env={}), max_num_seqs=4)
    assert admission.queue is not None and admission.queue.capacity == 5
    with admission.admit(ALICE, 5) as ticket:
        await ticket.turn()
        assert admission.queue.num_inside == 5
        with admission.admit(BOB, 1) as other:
            waiting = asyncio.create_task(other.turn())
            await asyncio.sleep(0)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        with admission.admit(ANONYMOUS, 1) as anonymous:
            await anonymous.turn()  # without keys there is nobody to be fair to
    assert admission.queue.num_inside == admission.num_open == 0


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_draining_refuses_new_requests_and_waits_for_open_ones() -> None:
    admission = make()
    with admission.admit(ALICE, 2):
        admission.drain()
        for ask in (lambda: admission.check(ALICE, 1), lambda: admission.admit(ALICE, 1).__enter__()):
            with pytest.raises(DrainingError) as error:
                ask()
        status, body, headers = error_object(error.value)
        assert (status, body["error"]["code"]) == (503, "shutting_down") and "Retry-After" in headers
        assert not await admission.drained(0.01)
        waiting = asyncio.create_task(admission.drained(5))
        await asyncio.sleep(0)
    assert await waiting
    assert await admission.drained(0)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_bounded_by_name() -> None:
    admission = make(max_messages=3, max_stop_strings=2, max_stop_chars=5)
    admission.check_messages(3)
    admission.check_stop(["12345", "1"])
    for refused, param in [
        (lambda: admission.check_messages(4), "messages"),
        (lambda: admission.check_stop(["a"] * 3), "stop"),
        (lambda: admission.check_stop(["123456"]), "stop"),
    ]:
        with pytest.raises(InvalidRequestError) as error:
            refused()
        assert error.value.param == param
    with pytest.raises(SamplingParamsError):
        admission.check_stop(["a"] * 3)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    admission = make()
    admission.check_prompt_chars(100, 100, lambda: 1 // 0)  # short: the vocabulary is not even looked at
    admission.check_prompt_chars(1200, 100, lambda: 12)
    with pytest.raises(PromptTooLongError, match=r"1201.*1200"):
        admission.check_prompt_chars(1201, 100, lambda: 12)
    with pytest.raises(PromptTooLongError):
        make(max_prompt_chars=10).check_prompt_chars(11, 100, lambda: 12)
