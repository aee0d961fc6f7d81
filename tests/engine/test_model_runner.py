"""What the model runner decides without a GPU: which steps a CUDA graph may run, and how much KV cache there is."""

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine import kv_cache
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.cuda_graphs import PromptGraphs, PromptShape, graph_buckets, token_bucket
from nanovllm_bento.engine.model_runner import RankExecutor
from nanovllm_bento.engine.prompt_buffers import PromptBuffers
from nanovllm_bento.engine.scheduler import Batch, PrefillChunk
from nanovllm_bento.engine.sequence import Sequence
from nanovllm_bento.engine.step_inputs import CaptureStep, StepBuilder, decoder, encoder
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.sampling_params import SamplingParams
from tests.engine.fake_runner import add
from tests.engine.tiny_engines import make_engine, run_all
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


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("later_turns", [False, True])
@pytest.mark.parametrize(
    "max_tokens, max_seqs, max_len", [(8192, 256, 4096), (2048, 256, 40960), (100, 3, 70), (16, 1, 9)]
)
def test_graphs_made_ahead_are_those_that_steps_ask_for(max_tokens, max_seqs, max_len, whole, later_turns):
    graphs = PromptGraphs(None, max_tokens, max_seqs, max_len, 16, None)
    likely = graphs.likely(whole=whole, later_turns=later_turns)
    assert len(set(likely)) == len(likely) <= 144
    assert likely[0].num_tokens == max(shape.num_tokens for shape in likely) == max_tokens
    first = [shape.num_rows for shape in likely[1:] if shape.whole == whole]
    assert first == sorted(first), "single prompts are the ones that wait for nothing else"
    for prompt_len in (16, 17, 64, 100, 512, 1000):
        if prompt_len > max_len:
            continue
        for num_rows in (1, 2, 5, 16, 17, 40, 64):
            if num_rows * prompt_len <= max_tokens and num_rows <= max_seqs:
                assert graphs.shape(num_rows * prompt_len, num_rows, prompt_len, whole) in likely
        for start in (400, 1000):
            if later_turns and start + prompt_len <= max_len and prompt_len <= max_tokens:
                assert graphs.shape(prompt_len, 1, start + prompt_len) in likely


class Replayed:
    """Stands for a CUDA graph where there is no GPU: what it recorded runs again, into the same output."""

    def __init__(self, run) -> None:
        self.run, self.out, self.num_replays = run, run(), 0

    def replay(self) -> None:
        self.num_replays += 1
        self.out.copy_(self.run())


class RecordingPool:
    def __init__(self) -> None:
        self.recorded: list[Replayed] = []

    def record(self, run):
        self.recorded.append(Replayed(run))
        return self.recorded[-1], self.recorded[-1].out


def give_prompt_graphs(core: EngineCore, monkeypatch) -> RecordingPool:
    """The way of a GPU's prompts, from static buffers, for an engine on a CPU."""
    runner, pool, config = core.runner, RecordingPool(), core.config
    runner.prompt_graphs = graphs = PromptGraphs(
        pool, config.max_num_batched_tokens, config.max_num_seqs, runner.max_model_len, 16, runner._prompt_logits
    )
    max_blocks = runner.builder.block_tables.shape[1]
    runner.prompts = PromptBuffers(config.max_num_batched_tokens, graphs.max_num_rows, max_blocks, torch.device("cpu"))
    runner.logits = torch.empty(config.max_num_seqs, runner.vocab_size)
    runner.to_capture.extend(graphs.likely(whole=False, later_turns=True))
    own_logits = runner.model.own_logits
    monkeypatch.setattr(runner.model, "own_logits", lambda hidden, out=None: own_logits(hidden))
    return pool


def test_prompts_by_graphs_made_ahead_give_the_tokens_of_eager_steps(tmp_path, monkeypatch):
    folder = make_tiny("qwen3", tmp_path)
    prompts = [list(range(i, i + length)) for i, length in enumerate((1, 16, 33, 60, 7, 64))]
    results = []
    for ahead in (False, True):
        core = make_engine(folder, "cpu", max_num_batched_tokens=48, num_gpu_blocks_override=40)
        if ahead:
            pool = give_prompt_graphs(core, monkeypatch)
            published: list[bytes] = []
            core.runner.publish = published.append
            wanted = list(core.runner.to_capture)
            before = [cache.clone() for layer in core.runner.kv_caches for cache in layer]
            while core.may_capture:
                core.capture_ahead()
            assert [decoder.decode(message) for message in published] == [CaptureStep(shape) for shape in wanted]
            assert len(pool.recorded) == len(wanted)
            after = [cache for layer in core.runner.kv_caches for cache in layer]
            assert all(map(torch.equal, before, after)), "nothing is stored"
            monkeypatch.setattr(core.runner, "_hidden", lambda *args: pytest.fail("ran eagerly"))
        for turn in range(2):  # the second finds its start in the prefix cache
            for i, prompt in enumerate(prompts):
                add(core, f"{turn}.{i}", [*prompt, *range(3 * turn)], 1, ignore_eos=True, temperature=0.7, seed=i)
        results.append(run_all(core))
    assert results[0] == results[1]
    assert len(pool.recorded) == len(wanted) and sum(graph.num_replays for graph in pool.recorded) > 4


def test_a_rank_captures_what_rank_0_captures():
    captured: list[PromptShape] = []
    runner, shape = SimpleNamespace(startup_seconds={}, capture=captured.append), PromptShape(64, 16, 8, True)
    RankExecutor(runner).execute(memoryview(encoder.encode(CaptureStep(shape))))
    assert captured == [shape]


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
