"""What a caller of ``LLM`` sees when a step fails, a rank is lost, or Ctrl-C comes: an error, and never a call that
does not return."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm_bento.errors import EngineDeadError, RankError
from nanovllm_bento.llm import LLM
from nanovllm_bento.sampling_params import SamplingParams
from tests.e2e.tiny import make_served_tiny

PROMPTS = [[5, 6, 7], [5, 6, 7, 8] * 10, [9] * 33]
LONG = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_served_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def no_call_hangs() -> Iterator[None]:
    """Two minutes are far more than any of these tests takes."""

    def stop(*_: Any) -> None:
        raise AssertionError("the call does not return")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; in a shell's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["generate", "score"])
def call(request: pytest.FixtureRequest) -> Callable[[LLM], object]:
    """A call that takes many steps."""
    if request.param == "generate":
        return lambda llm: llm.generate(PROMPTS, LONG, use_tqdm=False)
    return lambda llm: llm.score([[7] * 3000] * 40, [[8] * 500] * 40, use_tqdm=False)


def make(model: str, size: int = 1) -> LLM:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 1024}
    settings |= {"enable_prefix_caching": False, "max_num_batched_tokens": 512, "max_num_seqs": 64}
    return LLM(model, tensor_parallel_size=size, tensor_parallel_timeout=2.0, **settings)


def few_tokens(llm: LLM) -> list[list[int]]:
    some = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, some, use_tqdm=False)]


def after_steps(llm: LLM, count: int, act: Callable[[], object]) -> None:
    """Have ``act`` called where step ``count`` from now is launched."""
    launch = llm.core.runner.launch
    left = [count]

    def launch_and_act(batch: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return launch(batch)

    llm.core.runner.launch = launch_and_act  # type: ignore[method-assign]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_step_that_fails_is_raised_and_the_engine_says_so_afterwards(
    model: str, call: Callable[[LLM], object]
) -> None:
    llm = make(model)

    def fail() -> None:
        raise ZeroDivisionError("as a driver might")

    after_steps(llm, 5, fail)
    with pytest.raises(ZeroDivisionError):
        call(llm)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: as a driver might"):
        few_tokens(llm)


@pytest.mark.parametrize("size", [1, 2])
def test_ctrl_c_ends_the_call_and_leaves_the_engine_as_it_was(
    model: str, call: Callable[[LLM], object], size: int
) -> None:
    llm = make(model, size)
    try:
        before = few_tokens(llm)
        for count in (1, 2, 7):
            after_steps(llm, count, interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(llm)
            assert llm.core.block_manager.num_used_blocks == 0 and not llm.core.has_work
            assert few_tokens(llm) == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        llm.close()


def test_a_second_ctrl_c_does_not_wait_for_the_step(model: str) -> None:
    llm = make(model)

    def hang() -> None:
        interrupt()
        interrupt()
        time.sleep(600)

    after_steps(llm, 3, hang)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, LONG, use_tqdm=False)
    with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
        few_tokens(llm)


def test_in_another_thread_signals_are_left_alone(model: str) -> None:
    llm, found = make(model), []
    thread = threading.Thread(target=lambda: found.append(few_tokens(llm)))
    thread.start()
    thread.join()
    assert found == [few_tokens(llm)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_is_named(model: str, call: Callable[[LLM], object], how: signal.Signals) -> None:
    llm = make(model, 2)
    try:
        assert llm.core.ranks is not None
        (pid,) = llm.core.ranks.pids
        after_steps(llm, 5, lambda: os.kill(pid, how))
        with pytest.raises(RankError, match="rank 1"):
            call(llm)
        with pytest.raises(EngineDeadError):
            few_tokens(llm)
    finally:
        llm.close()
    assert not Path(f"/proc/{pid}").exists()
