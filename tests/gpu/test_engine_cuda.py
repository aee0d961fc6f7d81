"""The engine on a real device that answers later: the same tokens as on the CPU, in float32 without TF32."""

import pytest
import torch
from hypothesis import given, settings

from tests.engine.fake_runner import add
from tests.engine.test_engine_tokens import requests
from tests.engine.test_model_parity import write_gguf
from tests.engine.tiny_engines import assert_tokens_depend_on_the_request_alone, make_engine, roomy_and_tight, run_all
from tests.engine.tiny_models import load_reference, make_tiny

FAMILIES = ["qwen3", "qwen2", "llama3", "mistral"]


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
        core = make_engine(folder, device)
        for i, prompt in enumerate(prompts):
            add(core, str(i), prompt, 64, ignore_eos=True, temperature=0.0)
        results.append(run_all(core))
    assert results[0] == results[1]


def test_a_quantised_gguf_file_gives_the_cpus_tokens(tmp_path):
    pytest.importorskip("gguf")
    reference = load_reference(make_tiny("llama", tmp_path))
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, "llama", quantize=True)
    results = []
    for device in ("cpu", "cuda"):
        core = make_engine(path, device)
        add(core, "a", list(range(5, 40)), 64, ignore_eos=True, temperature=0.0)
        results.append(run_all(core))
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engines(tiny):
    return roomy_and_tight(tiny, "cuda")


@settings(max_examples=15)
@given(requests=requests)
def test_tokens_depend_on_the_request_alone(engines, requests):
    assert_tokens_depend_on_the_request_alone(*engines, requests)


def test_a_seeded_sample_equals_the_cpu(tiny):
    results = []
    for device in ("cpu", "cuda"):
        core = make_engine(tiny, device)
        add(core, "a", [4, 5, 6], 30, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=40, seed=123)
        results.append(run_all(core))
    assert results[0] == results[1]
