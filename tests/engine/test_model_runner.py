"""What the model runner decides without a GPU: which steps a CUDA graph may run, and how much KV cache there is."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine import kv_cache
from nanovllm_bento.engine.cuda_graphs import graph_buckets
from nanovllm_bento.engine.model_runner import ModelRunner
from nanovllm_bento.engine.scheduler import Batch, PrefillChunk
from nanovllm_bento.errors import ConfigError
from tests.engine.tiny_engines import make_engine
from tests.engine.tiny_models import make_tiny, read_config

GIB = 2**30
CUDA = torch.device("cuda")


def runs_in_a_graph(*chunks: tuple[int, int, int], fuses_decode: bool = True, samples: bool = True) -> bool:
    """chunks: (start, end, store_from) of prompts in one step, with blocks of 16."""
    prefill = [PrefillChunk(None, *chunk, samples) for chunk in chunks]
    runner = SimpleNamespace(
        graphs=SimpleNamespace(find=lambda rows: f"graph of {rows}"),
        block_size=16,
        backend=SimpleNamespace(fuses_decode=fuses_decode),
    )
    found = ModelRunner._find_graph(runner, Batch(1, prefill=prefill, sampled=[None] * len(prefill)))
    assert found in (None, f"graph of {len(prefill)}")
    return found is not None


def test_a_prompt_that_is_cached_but_for_one_token_runs_in_a_graph():
    assert runs_in_a_graph((31, 32, 32))
    assert runs_in_a_graph((32, 33, 32))
    assert not runs_in_a_graph((31, 33, 16))
    assert not runs_in_a_graph((31, 32, 16), samples=False)


def test_no_graph_where_a_row_could_read_a_block_that_another_one_fills():
    fills, shares, apart = (31, 32, 16), (32, 33, 32), (40, 41, 32)
    assert runs_in_a_graph(fills)
    assert not runs_in_a_graph(fills, shares)
    assert runs_in_a_graph(fills, shares, fuses_decode=False)
    assert runs_in_a_graph(shares, apart)
    assert runs_in_a_graph((31, 32, 32), shares), "a token that is not stored fills nothing"


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 100, 256, 300, 1000])
def test_there_is_a_bucket_for_every_batch(most):
    buckets = graph_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most and buckets[0] == 1


@pytest.fixture(scope="module")
def model_config(tmp_path_factory):
    return read_config(make_tiny("qwen3", tmp_path_factory.mktemp("tiny")))


def blocks(model_config, *, free: int = 40 * GIB, **settings) -> int:
    config = EngineConfig.create(env={}, max_num_batched_tokens=64, **{"max_num_seqs": 8, **settings})
    use = kv_cache.MemoryUse(total=80 * GIB, free=free, weights=GIB, activations=2 * GIB, graphs=GIB)
    return kv_cache.num_blocks_that_fit(config, model_config, 256, torch.bfloat16, CUDA, lambda: use)


def test_the_cache_takes_what_utilization_leaves_beside_activations_and_graphs(model_config):
    per_block = kv_cache.block_bytes(model_config, 16, torch.bfloat16)
    assert per_block == 2 * 2 * 16 * 2 * 32 * 2
    budget = 40 * GIB - int(80 * GIB * 0.5) + 20 * 2**20
    assert blocks(model_config, free=40 * GIB + 3 * GIB + 20 * 2**20, gpu_memory_utilization=0.5) == budget // per_block


def test_a_prefix_cache_is_worth_more_than_the_running_sequences(model_config):
    assert blocks(model_config) == kv_cache.MAX_BLOCKS
    assert blocks(model_config, enable_prefix_caching=False) == 8 * 256 // 16
    assert blocks(model_config, kv_cache_memory_bytes=GIB) == GIB // (2 * 2 * 16 * 2 * 32 * 2)


def test_what_does_not_fit_is_refused_with_what_it_goes_to(model_config):
    with pytest.raises(ConfigError, match=r"2.00 GiB for a step of 64 tokens and 1.00 GiB for CUDA graphs, 0.00 GiB"):
        blocks(model_config, free=10 * GIB)
    with pytest.raises(ConfigError, match="max_model_len=256 does not fit, 112 would"):
        blocks(model_config, kv_cache_memory_bytes=60_000, max_model_len=256)


def test_batch_invariance_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_invariant=True needs a GPU"):
        make_engine(make_tiny("qwen3", tmp_path), "cpu", batch_invariant=True)
