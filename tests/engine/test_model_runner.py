"""What the model runner decides without a GPU: which steps a CUDA graph may run, and how much KV cache there is."""

from array import array

import numpy as np
import pytest
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine import kv_cache
from nanovllm_bento.engine.cuda_graphs import PromptGraphs, graph_buckets, token_bucket
from nanovllm_bento.engine.scheduler import Batch, PrefillChunk
from nanovllm_bento.engine.sequence import Sequence
from nanovllm_bento.engine.step_inputs import StepBuilder, decoder, encoder
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.tiny_engines import make_engine
from tests.engine.tiny_models import make_tiny, read_config

GIB = 2**30
CUDA = torch.device("cuda")


def runs_in_a_graph(*chunks: tuple[int, int, int], fuses_decode: bool = True, samples: bool = True) -> bool:
    """chunks: (start, end, store_from) of prompts in one step, with blocks of 16."""
    prefill = [PrefillChunk(None, *chunk, samples) for chunk in chunks]
    builder = StepBuilder(block_size=16, max_num_seqs=8, max_blocks=4, vocab_size=50)
    return builder.fits_decode(Batch(1, prefill=prefill, sampled=[None] * len(prefill)), fuses_decode)


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


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100, 512, 513, 5000, 8191, 8192])
def test_a_step_of_prompts_is_padded_by_a_quarter_at_most(num_tokens):
    assert num_tokens <= token_bucket(num_tokens) <= max(16, 1.25 * num_tokens + 16)
    assert token_bucket(token_bucket(num_tokens)) == token_bucket(num_tokens)


@pytest.mark.parametrize("max_tokens, max_seqs, max_len", [(8192, 256, 40960), (100, 3, 70), (16, 1, 1000)])
def test_a_prompt_graph_holds_every_step_that_it_is_found_for(max_tokens, max_seqs, max_len):
    graphs = PromptGraphs(None, max_tokens, max_seqs, max_len, 16, None)
    for num_tokens in range(1, max_tokens + 1, 7):
        for num_rows in range(1, min(max_seqs, num_tokens) + 1, 5):
            for context in {1, num_tokens, max_len}:
                if context > max_len:
                    continue
                shape = graphs.shape(num_tokens, num_rows, context)
                if num_rows > 64:
                    assert shape is None
                    continue
                tokens, rows, blocks, _ = shape
                if context <= num_tokens:
                    whole = graphs.shape(num_tokens, num_rows, context, whole=True)
                    assert whole[:2] == shape[:2] and context <= whole.num_blocks * 16 and whole != shape
                assert num_tokens <= tokens <= max_tokens and num_rows <= rows <= max_seqs
                assert context <= blocks * 16 < max_len + 16


def test_step_inputs_arrive_as_they_were_sent():
    seqs = [
        Sequence(f"{i}", array("i", range(3, 40 + i)), 37, SamplingParams(max_tokens=9, min_tokens=4, seed=i), slot=i)
        for i in range(3)
    ]
    for seq in seqs:
        seq.block_table = [7 * seq.slot + k for k in range(3)]
    seqs[1].stop_token_ids = frozenset({2, 40})
    chunks = [PrefillChunk(seqs[1], 16, 38, 16, True), PrefillChunk(seqs[2], 0, 7, 0, False)]
    mixed = Batch(1, [seqs[0]], [36], chunks, sampled=seqs[:2], admitted=seqs)
    decode = Batch(2, seqs[:2], [36, 37], sampled=seqs[:2])
    builder = StepBuilder(block_size=16, max_num_seqs=4, max_blocks=4, vocab_size=50)
    builder.update_tables(mixed)
    new_slots = np.arange(16, dtype=np.int32).reshape(2, 8)
    slots = np.array([0, 1], np.int32)
    steps = [builder.token_step(mixed, slots, new_slots, True)]
    steps.append(builder.decode_step(decode, slots, 4, new_slots[:0], False))
    assert steps[0].banned.tolist() == [50 + token for token in seqs[1].stop_token_ids]
    assert not steps[0].whole_prompts
    assert steps[0].sampled.tolist() == [0, 22] and steps[0].query_start_loc.tolist() == [0, 1, 23, 30]
    assert steps[1].rows.tolist() == [[0, 36, 2], [1, 37, 9]]
    for sent in steps:
        received = decoder.decode(encoder.encode(sent))
        assert type(received) is type(sent)
        for name in sent.__struct_fields__:
            ours, theirs = getattr(sent, name), getattr(received, name)
            if isinstance(ours, np.ndarray):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and (ours == theirs).all(), name
            else:
                assert ours == theirs, name


@pytest.fixture(scope="module")
def model_config(tmp_path_factory):
    return read_config(make_tiny("qwen3", tmp_path_factory.mktemp("tiny")))


def layout(model_config) -> kv_cache.Layout:
    mc = model_config
    return kv_cache.Layout(mc.num_hidden_layers, 16, mc.num_key_value_heads, mc.head_dim, torch.bfloat16)


def blocks(model_config, *, free: int = 40 * GIB, **settings) -> int:
    config = EngineConfig.create(env={}, max_num_batched_tokens=64, **{"max_num_seqs": 8, **settings})
    use = kv_cache.MemoryUse(total=80 * GIB, free=free, weights=GIB, activations=2 * GIB, graphs=GIB)
    return kv_cache.num_blocks_that_fit(config, layout(model_config), 256, CUDA, lambda: use)


def test_the_cache_takes_what_utilization_leaves_beside_activations_and_graphs(model_config):
    per_block = layout(model_config).block_bytes
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
