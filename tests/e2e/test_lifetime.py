"""What happens to all processes when the service ends, and when it cannot start. Faults are in test_faults.py."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from nanovllm_bento.hub import ModelFiles
from tests.e2e.server import end, serve, wait_ended

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_sigterm_ends_every_process(demo_model: ModelFiles) -> None:
    with serve() as server:
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        processes = server.processes()
        assert len(processes) >= 3  # bentoml serve, its worker, the engine
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        assert wait_ended(processes) == []


def test_a_model_that_does_not_exist_is_told_and_never_ready() -> None:
    with serve("./no/such/model", wait=False) as server:
        server.wait_for_failure()
        assert httpx.get(server.url + "/readyz").status_code == 503
        error = httpx.post(server.url + "/v1/completions", json={"prompt": "a"}).json()["error"]
        assert error["code"] == "engine_not_ready" and "./no/such/model" in error["message"]
        assert "./no/such/model" in server.log
        end(server)
        assert not Path(server.ipc_dir).exists(), "also where no engine is left to remove it"
