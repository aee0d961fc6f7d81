"""Two GPUs compute what one does: tokens in float32, logits within bfloat16's rounding; a lost rank is named."""

import psutil
import pytest
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.errors import RankError
from tests.engine.fake_runner import add, add_score, run
from tests.engine.tiny_engines import run_all
from tests.engine.tiny_models import make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

PROMPTS = [[5, 6, 7], [9] * 40, list(range(20, 100)), [3], list(range(200, 217))]


def engine(folder, dtype: str, ranks: int, **overrides) -> EngineCore:
    keywords = {"num_gpu_blocks_override": 256, "max_num_seqs": 40, "max_num_batched_tokens": 256, **overrides}
    return EngineCore.from_model(
        EngineConfig.create(
            env={}, model=str(folder), device="cuda", dtype=dtype, tensor_parallel_size=ranks, **keywords
        )
    )


@pytest.mark.parametrize("family, overrides", [
    ("qwen3", {}),
    ("qwen3", {"enforce_eager": True}),
    ("qwen3", {"num_gpu_blocks_override": 24, "schedule_mode": "mixed"}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"enable_expert_parallel": True}),
])  # fmt: skip
def test_two_gpus_give_the_tokens_of_one_in_float32(tmp_path, family, overrides) -> None:
    folder = make_tiny(family, tmp_path, head_dim=64, max_position_embeddings=512)
    results = []
    for ranks in (1, 2):
        core = engine(folder, "float32", ranks, **overrides)
        while ranks == 2 and family == "qwen3_moe" and core.may_capture:
            core.capture_ahead()
        rounds = []
        for salt in "ab":  # prompts run eagerly once, then as graphs, if these are not captured ahead
            for i in range(20):
                sampling = {"temperature": 0.9, "top_p": 0.9} if i % 3 == 0 else {"temperature": 0.0}
                add(core, str(i), PROMPTS[i % 5], 40, ignore_eos=True, seed=i, salt=f"{salt}{i % 2}", **sampling)
            rounds.append(run_all(core))
        results.append(rounds)
        core.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_two_gpus_agree_with_one_within_bfloat16(tmp_path, family) -> None:
    folder = make_tiny(family, tmp_path, head_dim=64, max_position_embeddings=512)
    found = []
    for ranks in (1, 2):
        core = engine(folder, "bfloat16", ranks)
        add_score(core, "score", PROMPTS[2], 60)
        found.append(torch.tensor(run(core)["score"][0].logprobs))
        core.close()
    difference = (found[0] - found[1]).abs()
    far = (difference >= 0.2).float().mean()
    assert difference.mean() < 0.03
    assert far <= (0.05 if family == "qwen3_moe" else 0.0)  # a tipped choice of a router moves its token further


def test_a_killed_rank_is_named_at_once_and_the_gpu_does_not_wait_for_it(tmp_path) -> None:
    core = engine(make_tiny("qwen3", tmp_path, head_dim=64, max_position_embeddings=512), "bfloat16", 2)
    (pid,) = core.ranks.pids
    add(core, "a", PROMPTS[0], 400, ignore_eos=True)
    for _ in range(20):
        core.step()
    psutil.Process(pid).kill()
    with pytest.raises(RankError, match=rf"rank 1 \(pid {pid}, GPU 1\) died of signal 9"):
        for _ in range(500):
            core.step()
    core.close()
