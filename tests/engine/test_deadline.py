"""A deadline also holds while the engine that should see to it hangs, or is being started again."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from nanovllm_bento.errors import DeadlineExceededError
from tests.engine.test_fake_engine import collect, connected, tiny
from tests.engine.test_process import wait_for

__all__ = ["tiny"]


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_an_engine_that_is_not_there_does_not_hold_a_request_beyond_its_deadline(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    monkeypatch.setenv("NANOVLLM_FAKE_TOKENS_PER_SECOND", "100")
    monkeypatch.setenv("NANOVLLM_FAKE_START_SECONDS", "3")
    async with connected(tiny, tmp_path / "ipc") as client:
        late = asyncio.create_task(collect(client, "late", 90_000, deadline=time.time() + 1))
        patient = asyncio.create_task(collect(client, "patient", 200, deadline=time.time() + 60))
        await wait_for(lambda: client.stats.num_requests_running == 2, "both run")
        pid = client._engine_pid
        os.kill(pid, how)
        try:
            with pytest.raises(DeadlineExceededError):
                await asyncio.wait_for(late, 2.5)
        finally:
            if how == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        assert set(client._requests) == {"patient"}
        assert len(await asyncio.wait_for(patient, 30)) == 200
        await wait_for(lambda: client.stats.num_requests_running == client.stats.num_blocks_used == 0, "none is left")


async def test_no_timer_is_left_of_a_request_that_ends_in_time(tiny: Path, tmp_path: Path) -> None:
    async with connected(tiny, tmp_path / "ipc") as client:
        loop, timers = asyncio.get_running_loop(), []
        call_later = loop.call_later
        loop.call_later = lambda *args: timers.append(call_later(*args)) or timers[-1]  # type: ignore
        try:
            assert len(await collect(client, "a", 20, deadline=time.time() + 3600)) == 20
        finally:
            loop.call_later = call_later  # type: ignore[method-assign]
        long = [timer for timer in timers if timer.when() > loop.time() + 1000]
        assert len(long) == 1 and long[0].cancelled()
