"""The engine on a real device that answers later: the same tokens as on the CPU, in float32 without TF32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from tests.engine.fake_runner import add, tokens_of
from tests.engine.tiny_models import make_tiny

FAMILIES = ["qwen3", "qwen2", "llama3", "mistral"]


def engine(folder, device: str, **overrides: object) -> EngineCore:
    keywords = {"num_gpu_blocks_override": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, **overrides}
    return EngineCore.from_model(
        EngineConfig.create(env={}, model=str(folder), device=device, dtype="float32", **keywords)
    )


def run(core: EngineCore) -> dict[str, list[int]]:
    items: dict[str, list] = {}
    while core.has_work:
        for _, item in core.step():
            items.setdefault(item.request_id, []).append(item)
        core.check()
    return {request_id: tokens_of(found) for request_id, found in items.items()}


@pytest.fixture(scope="module", autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_cpu(family, tmp_path):
    folder = make_tiny(family, tmp_path)
    prompts = [[5, 6, 7], [9] * 40, list(range(20, 100))]
    results = []
    for device in ("cpu", "cuda"):
        core = engine(folder, device)
        for i, prompt in enumerate(prompts):
            add(core, str(i), prompt, 64, ignore_eos=True, temperature=0.0)
        results.append(run(core))
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cores(tiny):
    """A cache with room for all, and engines that must preempt, chunk and share."""
    roomy = engine(tiny, "cuda", enable_prefix_caching=False, num_gpu_blocks_override=256)
    tight = [
        engine(tiny, "cuda", num_gpu_blocks_override=10, max_num_batched_tokens=24, schedule_mode=mode)
        for mode in ("two_phase", "mixed")
    ]
    return roomy, tight


@settings(max_examples=25)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(3, 6), min_size=1, max_size=60), st.integers(1, 40)), min_size=1, max_size=6
    )
)
def test_tokens_depend_on_the_request_alone(cores, requests):
    roomy, tight = cores
    expected = {}
    for i, (prompt, max_tokens) in enumerate(requests):
        add(roomy, str(i), prompt, max_tokens, temperature=0.0)
        expected |= run(roomy)
    for core in tight:
        for i, (prompt, max_tokens) in enumerate(requests):
            add(core, str(i), prompt, max_tokens, temperature=0.0)
        assert run(core) == expected
        assert core.block_manager.num_used_blocks == 0


def test_a_seeded_sample_equals_the_cpu(tiny):
    results = []
    for device in ("cpu", "cuda"):
        core = engine(tiny, device)
        add(core, "a", [4, 5, 6], 30, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=40, seed=123)
        results.append(run(core))
    assert results[0] == results[1]
