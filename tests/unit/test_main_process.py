"""When the main process gives up, and when it leaves things alone."""

import os
import signal
from pathlib import Path

import pytest

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.serving import main_process
from nanovllm_bento.serving.main_process import Watch


class Workers(Watch):
    """A watch over workers that are only numbers. ``wake``: where signals are written to."""

    def __init__(self, limit: int, failure: Path | None = None) -> None:
        told, self.wake = os.pipe()
        super().__init__(told, ServiceConfig.create(env={}, worker_max_restarts=limit), failure)
        self.living: dict[int, int | None] = {}

    def _find_workers(self) -> dict[int, int | None]:  # type: ignore[override]
        return dict(self.living)


def test_as_many_workers_are_replaced_as_the_setting_says() -> None:
    watch = Workers(limit=2)
    for pid in range(3):
        watch.living = {pid: 1}
        assert watch.look() is None
    watch.living = {2: 99}  # the number again, of another process
    assert watch.look() == "3 workers have ended in ten minutes, worker_max_restarts=2."


def test_ends_of_more_than_ten_minutes_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = Workers(limit=1), 0.0
    monkeypatch.setattr(main_process.time, "monotonic", lambda: now)
    for pid in range(5):
        watch.living, now = {pid: 1}, now + main_process.WINDOW + 1
        assert watch.look() is None


def test_workers_that_were_told_to_end_are_no_fault() -> None:
    watch = Workers(limit=0)
    watch.living = {1: 1, 2: 1}
    assert watch.look() is None
    os.write(watch.wake, bytes([signal.SIGCHLD, signal.SIGTERM]))
    watch.living = {}
    assert watch.look() is None and watch.is_stopping


def test_a_failure_that_is_written_down_ends_the_service(tmp_path: Path) -> None:
    failure = tmp_path / "failure"
    watch = Workers(limit=3, failure=failure)
    assert watch.look() is None
    failure.write_text("no such model")
    assert watch.look() == "no such model"


@pytest.mark.parametrize(
    ("argv", "is_ours"),
    [
        (["/app/.venv/bin/bentoml", "serve", "/home/bentoml/bento"], True),
        (["/site-packages/bentoml/__main__.py", "serve", "service:NanoVLLM", "--port", "3000"], True),
        (["/app/.venv/bin/bentoml", "serve", ".", "--reload"], False),
        (["/app/.venv/bin/bentoml", "build"], False),
        (["/usr/bin/pytest", "serve"], False),
    ],
)
def test_only_bentoml_serve_is_watched(argv: list[str], is_ours: bool) -> None:
    assert main_process._is_bentoml_serve(argv) is is_ours
