"""What is remembered of FlashAttention's trials: what will be the same next time, and nothing else."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm_bento.kernels.attention import flash_probe

CASE: tuple[Any, ...] = ("json", 16, 8, 128, torch.bfloat16, 16)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Answers for the trials to come; each trial takes the first."""
    answers: list[Any] = []

    def run(*arguments: object, **options: object) -> SimpleNamespace:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        code, stdout, stderr = answer
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return answers


@pytest.mark.parametrize(
    "answer, words",
    [
        ((0, "noise\nnull\n", ""), None),
        ((0, json.dumps("computes a trial wrongly"), ""), "computes a trial wrongly"),
        ((1, "", "CUDA error (launch.h:180): invalid argument\n"), "ended its process .*invalid argument"),
        ((-6, "", ""), "exit status -6"),
    ],
)
def test_an_answer_that_lasts_is_asked_for_once(trials: list[Any], answer: Any, words: str | None) -> None:
    trials.append(answer)
    for _ in range(3):
        reason = flash_probe.probe(*CASE)
        assert reason is None if words is None else re.search(words, str(reason))
    trials.append((0, "null", ""))
    assert flash_probe.probe(*CASE[:3], 64, *CASE[4:]) is None, "another case is tried anew"


@pytest.mark.parametrize(
    "answer",
    [
        subprocess.TimeoutExpired("python", 120),
        (1, "", "torch.OutOfMemoryError: CUDA out of memory\n"),
        (0, json.dumps("FlashAttention-3 fails on a trial: CUDA-capable device(s) is/are busy or unavailable"), ""),
    ],
)
def test_what_may_pass_is_asked_again(trials: list[Any], answer: Any) -> None:
    trials += [answer, (0, "null", "")]
    assert flash_probe.probe(*CASE) is not None
    assert flash_probe.probe(*CASE) is None


def test_a_broken_cache_or_a_missing_package_is_no_error(trials: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "flash_attn.json").write_text("[1]")
    trials.append((0, "null", ""))
    assert flash_probe.probe("no_such_package.module", *CASE[1:]) is None
