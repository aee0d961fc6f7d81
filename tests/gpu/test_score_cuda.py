"""Scores on a GPU: the same as on the CPU in float32, beside decode rows, and nothing waits for the device."""

import pytest
import torch

from tests.engine.fake_runner import add, add_score, run
from tests.engine.test_score import assert_scores_equal, scores_of
from tests.engine.tiny_engines import make_engine
from tests.engine.tiny_models import make_tiny

PROMPTS = [([5, 6], 1), (list(range(3, 63)), 59), (list(range(20, 65)), 4), ([7] * 40, 1)]


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


def all_scores(core):
    for i, (prompt, num_scored) in enumerate(PROMPTS):
        add_score(core, str(i), prompt, num_scored)
    results = run(core)
    return [scores_of(results[str(i)]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_scores_equal_the_cpus(tiny, mode):
    wanted = all_scores(make_engine(tiny, "cpu"))
    core = make_engine(tiny, "cuda", schedule_mode=mode, max_num_batched_tokens=24)
    core.runner.score_rows = 7
    for _ in range(2):  # with a cold and a warm prefix cache
        add(core, "beside", [9] * 30, 40, temperature=0.0, ignore_eos=True)
        for found, expected in zip(all_scores(core), wanted, strict=True):
            assert_scores_equal(found, expected)
    assert core.block_manager.num_used_blocks == 0


def test_no_step_waits_for_the_device_to_score(tiny):
    core = make_engine(tiny, "cuda", max_num_batched_tokens=24)
    all_scores(core)  # what is compiled or allocated at first use is there now
    for i, (prompt, num_scored) in enumerate(PROMPTS):
        add_score(core, str(i), prompt[::-1], num_scored)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(core)
    finally:
        torch.cuda.set_sync_debug_mode("default")
