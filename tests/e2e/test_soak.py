"""Short forms of the two commands that measure the HTTP side over the fake engine: many streams, and CPU time.

They prove that what the commands count comes out whole, not how fast it is: on a busy machine of two cores only bounds
are told that a service which serves one stream after the other, or keeps what has ended, would miss by far.
"""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_STREAMS = 100
SOAK_SECONDS = 6.0
NUM_REQUESTS = 160
MAX_TOKENS = 8
CHUNK_RATE = 100
CHUNK_SECONDS = 2


def run(monkeypatch: pytest.MonkeyPatch, output: Path, model: str, module: str, *options: object) -> dict[str, Any]:
    """The JSON of a command that ends with exit code 0."""
    monkeypatch.setenv("NANOVLLM_MODEL", model)
    command = [sys.executable, "-m", module, *map(str, options), "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # so that it ends the server it has started
            process.communicate(timeout=60)
    assert output.exists(), said
    result: dict[str, Any] = json.loads(output.read_text())
    assert process.returncode == 0, said
    assert result["environment"]["packages"]["bentoml"]
    return result


def test_many_streams_come_whole_and_side_by_side_and_leave_nothing(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred streams at a time, two thousand in all. Of the tiny model a token is a character."""
    options: dict[str, Any] = {
        "model": tiny_model,
        "minutes": SOAK_SECONDS / 60,
        "concurrency": NUM_STREAMS,
        "ramp-seconds": 1,
        "clients": 1,
        "sample-seconds": 0.25,
        "max-gap": 20,  # a second
        "max-growth": 1.05,  # six of 120 MiB: 6 KiB for each stream that ends between the two quarters
    }
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    result = run(
        monkeypatch, tmp_path / "soak.json", tiny_model, "benchmarks.soak", *given, "--stream-seconds", 0.3, 0.6
    )
    assert result["passed"] and (result["failures"], result["num_errors"], result["errors"]) == ([], 0, [])
    begun, finished, still_open = (result[f"streams_{name}"] for name in ("begun", "finished", "open_at_end"))
    assert begun == finished + still_open, "none is lost"
    assert still_open <= NUM_STREAMS
    # Each lasts half a second at most. One after the other they would be 15, and 1 / 10 of the speed still is enough.
    assert finished >= NUM_STREAMS * SOAK_SECONDS / 0.6 / 10
    assert result["tokens_of_finished"] == result["characters_of_finished"] >= 6 * finished
    assert result["left"] == {"requests": 0, "blocks": 0, "connections": 0}

    gaps, first = result["gap_ms"], result["first_chunk_ms"]
    assert gaps["count"] > finished and first["count"] > NUM_STREAMS
    assert 0 < gaps["p50"] <= gaps["p99"] <= gaps["p999"] and gaps["max"] > 0
    assert result["p99_gap_in_token_intervals"] == pytest.approx(gaps["p99"] / result["token_interval_ms"], abs=1e-3)
    assert result["chunks"] >= gaps["count"]

    kinds = {"main", "workers", "engine"}
    memory = result["rss_mib"]
    assert set(result["growth"]) == kinds and set(memory) == kinds | {"seconds"}
    assert len(memory["seconds"]) >= 8
    for kind in kinds:
        assert len(memory[kind]) == len(memory["seconds"]) and min(memory[kind]) > 10
        assert result["cores"][kind] >= 0


def test_the_cost_of_a_request_and_of_a_chunk_is_measured(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workloads of the real service, few requests of each."""
    result = run(
        monkeypatch,
        tmp_path / "http_cost.json",
        tiny_model,
        "benchmarks.http_cost",
        *("--alone", "--clients", 1, "--concurrency", 8, "--requests", NUM_REQUESTS, "--max-tokens", MAX_TOKENS),
        *("--rate", CHUNK_RATE, "--seconds", CHUNK_SECONDS),
    )
    assert result["benchmark"] == "http_cost" and result["settings"]["requests"] == NUM_REQUESTS
    assert "bentoml" not in result

    work = result["workloads"]["ours"]
    assert set(work) == {"whole", "stream", "steps", "warm_up", "short_chunks", "long_chunks"}
    for name in ("whole", "stream", "steps"):
        assert work[name]["requests"] == NUM_REQUESTS
    assert work["whole"]["events"] == work["steps"]["events"] == 0
    assert work["stream"]["events"] >= NUM_REQUESTS
    for name, num_tokens in (("short_chunks", 8), ("long_chunks", 8 + CHUNK_SECONDS * CHUNK_RATE)):
        per_request = work[name]["events"] / work[name]["requests"]
        assert num_tokens / 2 < per_request <= num_tokens + 2, "a token is a chunk, but for those a slow reader joins"
    for load in work.values():
        assert load["worker_cpu_share"] > 0 and load["client_cpu_share"] > 0
        assert 0 < load["latency_ms"]["p50"] <= load["latency_ms"]["p99"]

    figures = result["ours"]
    assert set(figures) == {f"us_per_request_{name}" for name in ("whole", "stream", "steps")} | {"us_per_chunk"}
    for name, figure in figures.items():
        assert math.isfinite(figure) and 0 < figure < (300 if name == "us_per_chunk" else 7000), figures
