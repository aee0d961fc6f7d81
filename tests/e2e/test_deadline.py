"""deadline_ms holds wherever a request is: before its turn, in the engine, and while there is no engine."""

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from tests.e2e.observer import Observer
from tests.e2e.server import serve
from tests.e2e.streams import Stream, until
from tests.e2e.test_faults import FAKE

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KEY = "alice-secret"
LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 3000, "ignore_eos": True}


async def test_a_deadline_holds_wherever_the_request_is(tiny_model: str) -> None:
    settings = FAKE | {"api_keys": f"alice:{KEY}", "max_num_seqs": 1, "fake_start_seconds": 6}
    with serve(tiny_model, **settings, fake_tokens_per_second=20) as server, Observer(server) as observer:

        def begin(**more: Any) -> tuple[Stream, "asyncio.Task[Stream]"]:
            stream = Stream(LONG | more, request_headers={"Authorization": f"Bearer {KEY}"})
            return stream, asyncio.create_task(stream.run(server.url))

        ahead = [begin()[1] for _ in range(2)]
        await asyncio.to_thread(observer.until, lambda s: s.num_requests_running == s.num_requests_waiting == 1, "full")
        began = time.monotonic()
        _, queued = begin(deadline_ms=500)
        ended = await asyncio.wait_for(queued, 5)
        assert (ended.status, ended.error and ended.error["code"]) == (504, "deadline_exceeded")
        assert 0.5 <= time.monotonic() - began < 3

        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        await asyncio.to_thread(observer.until_idle)

        began = time.monotonic()
        running, task = begin(deadline_ms=2000)
        await running.until_events(3)
        os.kill(server.engine_pid, signal.SIGKILL)
        await asyncio.wait_for(task, 5)
        assert time.monotonic() - began < 4 and not server.is_ready, "before there is another engine"
        assert running.status == 200 and not running.done
        assert running.error is not None and running.error["code"] == "deadline_exceeded"
        await until(lambda: server.is_ready, "another engine serves")
        await asyncio.to_thread(observer.until_idle)
