"""What callers can do to a running engine: leave in crowds, be late, send nonsense, or everything at once."""

import os
import random
import time
from collections import defaultdict

import pytest
import zmq

from nanovllm_bento.engine import worker
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import (
    ITERATION_TOKENS_BUCKETS,
    Abort,
    Add,
    Heartbeat,
    Hello,
    OutputItem,
    Ready,
    StepOutput,
    encoder,
    pack_tokens,
    to_worker_decoder,
)
from nanovllm_bento.engine.worker import EngineServer
from nanovllm_bento.errors import InvalidRequestError
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.fake_runner import add, add_score, check, expected_tokens, make_core, run, tokens_of

# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds by which both of the core's clocks run ahead."""
    ahead = [0.0]
    monotonic, wall = time.monotonic, time.time
    monkeypatch.setattr("nanovllm_bento.engine.core.time.monotonic", lambda: monotonic() + ahead[0])
    monkeypatch.setattr("nanovllm_bento.engine.core.time.time", lambda: wall() + ahead[0])
    return ahead


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_a_request_ends_at_its_deadline_wherever_it_is(mode, clock):
    core = make_core(max_num_seqs=2, schedule_mode=mode, max_num_batched_tokens=8)
    soon = time.time() + 60
    add(core, "decoding", [1, 2, 3], 100, ignore_eos=True, deadline=soon)
    core.step()
    core.step()
    add_score(core, "in-prefill", [4] * 60, 30, deadline=soon)
    core.step()
    add(core, "waiting", [5], 10, deadline=soon)
    later = add(core, "later", [6], 10, deadline=soon + 3600)
    free = add(core, "free", [7], 10)
    assert core.scheduler.prefilling and core.scheduler.decoding and core.scheduler.num_waiting == 3
    clock[0] = 61
    ended = {item.request_id: item for _, item in core.step() if item.finish_reason}
    assert set(ended) == {"decoding", "in-prefill", "waiting"}
    assert {item.error_code for item in ended.values()} == {"deadline_exceeded"}
    assert "while it waited" in ended["waiting"].error and "tokens" in ended["decoding"].error
    check(core)
    results = run(core)
    assert tokens_of(results["later"]) == expected_tokens([6], later)
    assert tokens_of(results["free"]) == expected_tokens([7], free)
    assert core.block_manager.num_used_blocks == 0


def test_a_deadline_that_has_passed_ends_the_request_before_it_costs_anything():
    core = make_core()
    add(core, "late", [1, 2, 3], deadline=time.time() - 1)
    (item,) = run(core)["late"]
    assert (item.finish_reason, item.error_code) == ("error", "deadline_exceeded") and not core.runner.batches


def test_what_an_expired_request_wrote_is_found_again(clock):
    core = make_core(block_size=4)
    add(core, "a", [1] * 12, 50, ignore_eos=True, deadline=time.time() + 60)
    core.step()
    core.step()
    clock[0] = 61
    run(core)
    clock[0] = 0
    add(core, "again", [1] * 12)
    assert run(core)["again"][0].num_cached_tokens == 11


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), float("-inf")])
def test_a_deadline_is_a_time(deadline):
    with pytest.raises(InvalidRequestError, match="deadline"):
        add(make_core(), "a", [1], deadline=deadline)


def test_an_id_used_again_has_its_own_deadline(clock):
    core = make_core()
    add(core, "a", [1, 2], 3, deadline=time.time() + 60)
    run(core)
    params = add(core, "a", [1, 2], 20, ignore_eos=True)
    clock[0] = 61
    assert tokens_of(run(core)["a"]) == expected_tokens([1, 2], params)


def test_requests_that_ended_are_not_remembered():
    core = make_core(max_num_seqs=1, scheduling_policy="priority")
    add(core, "running", [1], 150, ignore_eos=True, priority=-1)
    core.step()
    for i in range(5000):
        add(core, str(i), [2] * 10, deadline=time.time() + 3600, priority=i)
        core.abort(str(i))
    assert len(core.scheduler.waiting) < 200 and len(core.scheduler.deadlines) < 200


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_an_abort_storm_at_any_moment_frees_every_block_within_one_step(mode):
    for after in range(12):
        core = make_core(schedule_mode=mode, max_num_seqs=6, max_num_batched_tokens=16, num_blocks=40)
        rng = random.Random(after)
        ids = [str(i) for i in range(30)]
        for i in ids:
            prompt = [rng.randrange(4) for _ in range(rng.randrange(2, 40))]
            if rng.random() < 0.3:
                add_score(core, i, prompt, rng.randrange(1, len(prompt)))
            else:
                add(core, i, prompt, rng.randrange(1, 30), ignore_eos=True)
        for _ in range(after):
            core.step()
            check(core)
        rng.shuffle(ids)
        for i in [*ids, *ids, "never-heard-of"]:
            core.abort(i)
            check(core)
        assert core.step() == []
        check(core)
        assert core.block_manager.num_used_blocks == 0 and not core.has_work
        assert core.stats.num_requests_running == core.stats.num_requests_waiting == 0
        params = add(core, "after", [3, 1, 2], 10)
        assert tokens_of(run(core)["after"]) == expected_tokens([3, 1, 2], params)


# -- what is told about the engine ------------------------------------------------------------------------------------


def test_steps_are_counted_by_their_tokens():
    core = make_core(max_num_batched_tokens=32)
    add(core, "a", [2] * 60, 3, ignore_eos=True)
    run(core)
    stats = core.stats
    assert [b.num_tokens for b in core.runner.batches] == [32, 28, 1, 1]
    counts = dict(zip(ITERATION_TOKENS_BUCKETS, stats.iteration_tokens, strict=False))
    assert counts[1] == 2 and counts[32] == 2 and sum(stats.iteration_tokens) == 4
    assert stats.iteration_tokens_sum == 62 and len(stats.iteration_tokens) == len(ITERATION_TOKENS_BUCKETS) + 1


def test_items_say_when_the_request_was_first_scheduled():
    core = make_core(max_num_seqs=1)
    before = time.monotonic()
    add(core, "a", [1, 2], 4, ignore_eos=True)
    add(core, "b", [1, 2], 4, ignore_eos=True)
    assert core.stats.oldest_waiting_seconds > 0
    results = run(core)
    first, second = ({item.scheduled_at for item in results[r]} for r in "ab")
    assert len(first) == len(second) == 1
    assert before < first.pop() < second.pop() < time.monotonic()
    assert core.stats.oldest_waiting_seconds == 0


# -- the server's socket ----------------------------------------------------------------------------------------------


class Wire:
    """An EngineServer on a simulated device, and a worker's end of its socket."""

    def __init__(self, folder, core: EngineCore) -> None:
        self.context: zmq.Context = zmq.Context()
        engine_end = self.context.socket(zmq.ROUTER)
        engine_end.set_hwm(0)
        engine_end.bind(f"ipc://{folder}/s")
        self.server = EngineServer(core, engine_end, epoch=3, heartbeat_interval=0.01)
        self.engine_end, self.core = engine_end, core
        self.worker = self.context.socket(zmq.DEALER)
        self.worker.set_hwm(0)
        self.worker.connect(f"ipc://{folder}/s")
        self.items: dict[str, list[OutputItem]] = defaultdict(list)
        self.num_messages = 0
        self.told: list[object] = []

    def send(self, *messages: object) -> None:
        for message in messages:
            frames = message if isinstance(message, list) else [message]
            self.worker.send_multipart([f if isinstance(f, bytes) else encoder.encode(f) for f in frames])

    def pass_until(self, condition, max_passes: int = 100_000) -> None:
        for _ in range(max_passes):
            if condition():
                return
            self.server.run_once()
            self.read()
        raise AssertionError("it did not come to that")

    def read(self) -> None:
        while self.worker.poll(0):
            message = to_worker_decoder.decode(self.worker.recv())
            self.told.append(message)
            if isinstance(message, StepOutput):
                self.num_messages += 1
                for item in message.items:
                    self.items[item.request_id].append(item)

    def ended(self, *request_ids: str) -> bool:
        return all(self.items[r] and self.items[r][-1].finish_reason for r in request_ids)

    def close(self) -> None:
        self.worker.close(0)
        self.engine_end.close(0)
        self.context.term()


@pytest.fixture
def wire(tmp_path):
    wires = []

    def make(**settings) -> Wire:
        wires.append(Wire(tmp_path, make_core(**settings)))
        wires[-1].send(Hello(os.getpid()))
        wires[-1].pass_until(lambda: any(isinstance(m, Ready) for m in wires[-1].told))
        return wires[-1]

    yield make
    for wire in wires:
        wire.close()


def request(request_id: str, prompt: list[int], max_tokens: int = 8, **fields) -> Add:
    return Add(request_id, pack_tokens(prompt), SamplingParams(max_tokens=max_tokens, seed=0), **fields)


def test_nonsense_is_dropped_or_answered_and_disturbs_nobody(wire):
    wire = wire()
    good = request("good", [2, 3], 20)
    wire.send(
        good,
        b"",
        b"\xff" * 100,
        b"\x80",
        encoder.encode(good)[:-3],
        [b"two", b"frames"],
        [b"", b""],
        encoder.encode(["add", "no-sampling", b""]),
        encoder.encode(["add", "bad-sampling", b"\0\0\0\0", {"temperature": -1.0}]),
        encoder.encode(["hello", -1]),
        encoder.encode(["hello", 2**40]),
        encoder.encode(["abort", "not a list"]),
        encoder.encode({"hello": 1}),
        Abort(["unknown", "unknown", ""]),
        Add("half-a-token", b"12345", SamplingParams(seed=0)),
        Add("empty", b"", SamplingParams(seed=0)),
        request("outside", [10**6]),
        Add("two", pack_tokens([1]), SamplingParams(n=2, seed=0)),
        request("late", [1], deadline=float("nan")),
        request("unknown-task", [1], task="paint"),
        request("last", [4, 5], 20),
    )
    refused = ["half-a-token", "empty", "outside", "two", "late", "unknown-task"]
    wire.pass_until(lambda: wire.ended("good", "last", *refused))
    for request_id, prompt in (("good", [2, 3]), ("last", [4, 5])):
        assert tokens_of(wire.items[request_id]) == expected_tokens(prompt, SamplingParams(max_tokens=20, seed=0))
    assert all(wire.items[r][-1].error_code == "invalid_request" for r in refused)
    wire.pass_until(lambda: not wire.core.has_work)
    assert wire.core.block_manager.num_used_blocks == 0


def test_each_frame_of_a_message_is_acted_on_alone(wire):
    wire = wire()
    long = [request(str(i), [2 + i], 100) for i in range(3)]
    wire.send([long[0], long[1], b"\xff", Abort(["1"]), b"", long[2]])
    wire.pass_until(lambda: wire.ended("0", "2"))
    assert not any(item.finish_reason for item in wire.items["1"])


def test_a_request_that_brings_out_a_fault_of_ours_fails_alone(wire, monkeypatch):
    wire = wire()
    resolve = wire.core._resolve

    def faulty(message, token_ids):
        if message.request_id == "poison":
            raise ZeroDivisionError
        return resolve(message, token_ids)

    monkeypatch.setattr(wire.core, "_resolve", faulty)
    wire.send(request("poison", [1]), request("good", [2]))
    wire.pass_until(lambda: wire.ended("poison", "good"))
    assert wire.items["poison"][-1].error_code == "engine_fault" and wire.items["good"][-1].error is None


def test_a_flood_of_requests_does_not_stop_those_that_run(wire):
    wire = wire(num_blocks=400)
    wire.send(request("running", [2, 3], 60))
    wire.pass_until(lambda: bool(wire.items["running"]))
    flood = [request(f"flood-{i}", [4] * 150, 1) for i in range(4000)]
    wire.send(*flood)
    steps = wire.core.scheduler.step
    wire.pass_until(lambda: wire.core.scheduler.num_waiting > 0)
    while wire.core.scheduler.num_arrivals < 4001:
        before = wire.core.scheduler.num_arrivals
        wire.server.run_once()
        assert wire.core.scheduler.num_arrivals - before < 2000, "one pass took in too much"
    assert wire.core.scheduler.step > steps + 2, "steps went on while it came in"
    wire.send(Abort([message.request_id for message in flood]))
    wire.pass_until(lambda: not wire.core.has_work)
    assert wire.ended("running") and wire.core.block_manager.num_used_blocks == 0


def test_a_step_is_one_message_to_each_worker(wire):
    wire = wire()
    wire.send(*(request(str(i), [2 + i], 5) for i in range(6)))
    wire.pass_until(lambda: wire.ended(*map(str, range(6))))
    assert wire.num_messages <= wire.core.scheduler.step


def test_draining_finishes_what_runs_and_leaves_what_comes_to_the_next_engine(wire):
    wire = wire()
    wire.send(request("running", [2, 3], 40))
    wire.pass_until(lambda: bool(wire.items["running"]))
    wire.server.drain(1000.0)
    wire.send(request("new", [5]))
    wire.server.run()
    while not wire.ended("running"):
        assert wire.worker.poll(10_000), "what was sent last has not come"
        wire.read()
    assert wire.items["running"][-1].error is None
    assert not wire.items["new"]


def test_graphs_are_captured_before_the_first_request_and_once_nothing_has_run_for_a_while(wire, monkeypatch):
    monkeypatch.setattr(worker, "_IDLE_SECONDS", 0.05)
    wire = wire()
    server, core, runner = wire.server, wire.core, wire.core.runner
    steps: list[float] = []
    captured: list[float] = []
    step, capture = core.step, runner.capture_ahead
    monkeypatch.setattr(core, "step", lambda: steps.append(time.monotonic()) or step())
    monkeypatch.setattr(runner, "capture_ahead", lambda: captured.append(time.monotonic()) or capture())
    monkeypatch.setattr(runner, "num_to_capture", 10**6)
    core.may_capture = True
    for _ in range(3):
        server.run_once()
    assert len(captured) == 3
    for name in ("a", "b"):  # the second comes while there is still something to capture
        wire.send(request(name, [2, 3], 30))
        wire.pass_until(lambda: core.has_work)
        num_captured = len(captured)
        wire.pass_until(lambda: not core.has_work)
        assert len(captured) == num_captured, "not while anything runs"
        wire.pass_until(lambda count=num_captured: len(captured) > count + 2)
        assert captured[num_captured] >= steps[-1] + 0.05, "not at once"
        assert wire.ended(name)
    monkeypatch.setattr(runner, "num_to_capture", 2)
    num_captured = len(captured)
    wire.pass_until(lambda: not core.may_capture)
    assert len(captured) == num_captured + 2
    server.connections.heartbeat_interval = 1.0
    server.run_once()
    began = time.monotonic()
    server.run_once()
    assert time.monotonic() - began > 0.5, "it waits for messages again"


def test_what_cannot_be_captured_ahead_costs_no_request(wire, monkeypatch, caplog):
    monkeypatch.setattr(worker, "_IDLE_SECONDS", 0.0)
    wire = wire()

    def broken() -> bool:
        raise RuntimeError("this kernel does not run here")

    monkeypatch.setattr(wire.core.runner, "capture_ahead", broken)
    wire.core.may_capture = True
    wire.pass_until(lambda: not wire.core.may_capture)
    assert "this kernel does not run here" in caplog.text
    wire.send(request("a", [2, 3], 5))
    wire.pass_until(lambda: wire.ended("a"))
    assert wire.items["a"][-1].error is None


def test_draining_ends_at_its_bound(wire):
    wire = wire()
    wire.send(request("running", [2, 3], 190))
    wire.pass_until(lambda: wire.core.scheduler.num_running == 1)
    wire.server.drain(0.0)
    wire.server.run()
    assert wire.core.has_work and not wire.ended("running")


def test_heartbeats_carry_the_stats(wire):
    wire = wire()
    wire.send(request("a", [2, 3], 5, task="generate"))
    wire.pass_until(lambda: wire.ended("a"))
    num_told = len(wire.told)
    wire.pass_until(lambda: any(isinstance(m, Heartbeat) for m in wire.told[num_told:]))
    assert next(m for m in wire.told[num_told:] if isinstance(m, Heartbeat)).stats == wire.core.stats
