"""The GPU runner: graphs equal eager steps, no host sync in the step loop, faults stay with their request."""

import ctypes

import pytest
import torch
import triton

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine import kv_cache
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.kernels import shared_memory, split_k, split_k_triton
from tests.engine.fake_runner import add, run
from tests.engine.tiny_engines import run_all
from tests.engine.tiny_models import make_tiny

PROMPTS = [[5, 6, 7], [9] * 40, list(range(20, 100)), [3], list(range(200, 217))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"), head_dim=64, max_position_embeddings=512)


def engine(folder, dtype="bfloat16", **overrides) -> EngineCore:
    keywords = {"num_gpu_blocks_override": 256, "max_num_seqs": 40, "max_num_batched_tokens": 256, **overrides}
    return EngineCore.from_model(EngineConfig.create(env={}, model=str(folder), device="cuda", dtype=dtype, **keywords))


def start(core: EngineCore, count: int, **sampling) -> None:
    for i in range(count):
        add(core, str(i), PROMPTS[i % len(PROMPTS)], 40, ignore_eos=True, seed=i, **sampling)


@pytest.mark.parametrize("count", [1, 3, 17, 40])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_a_replayed_step_equals_the_eager_one_bit_for_bit(tiny, count, kv_cache_dtype):
    core = engine(tiny, kv_cache_dtype=kv_cache_dtype)
    runner = core.runner
    start(core, count, temperature=0.7)
    for _ in range(12):
        core.step()
    torch.cuda.synchronize()
    graph = runner.graphs[runner.graphs.find(count)]
    rows = runner.static_rows.clone()
    graph.forward.replay()  # one step more, on what the last one has left there
    replayed = graph.logits.clone()
    graph.logits.fill_(torch.nan)
    runner.static_rows.copy_(rows)
    with torch.inference_mode():
        eager = runner._decode_logits(graph.size)
    assert torch.isfinite(replayed[:count]).all()
    assert torch.equal(eager, replayed)
    for filtered in (False, True):
        sample, tokens = graph.sample[filtered]
        sample.replay()
        replayed_tokens = tokens.clone()
        tokens.fill_(-7)
        with torch.inference_mode():
            assert torch.equal(runner._decode_tokens(eager, filtered), replayed_tokens)


@pytest.fixture(scope="module")
def as_wide_as_0_6b(tmp_path_factory):
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    return make_tiny("qwen3", tmp_path_factory.mktemp("wide"), head_dim=128, initializer_range=0.02, **sizes)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 24, 40, 64, 128])
def test_kernels_that_overlap_compute_what_they_do_one_by_one(as_wide_as_0_6b, count):
    core = engine(as_wide_as_0_6b, max_num_seqs=128, max_num_batched_tokens=2048, num_gpu_blocks_override=2000)
    runner = core.runner
    start(core, count)
    for _ in range(12):
        core.step()
    torch.cuda.synchronize()
    graph, rows = runner.graphs[runner.graphs.find(count)], runner.static_rows.clone()
    with torch.inference_mode():
        eager = runner._decode_logits(graph.size).clone()  # the host launches too slowly for kernels to meet
    assert torch.isfinite(eager[:count]).all()
    for _ in range(50):
        runner.static_rows.copy_(rows)
        graph.logits.fill_(torch.nan)
        graph.forward.replay()
        assert torch.equal(eager, graph.logits)


def test_kernels_prefer_a_division_of_memory_within_a_capture_alone(as_wide_as_0_6b):
    runner = engine(as_wide_as_0_6b, max_num_seqs=4).runner
    assert runner.memory_shape in shared_memory.CHOSEN_WITH_ATTENTION
    kernels = shared_memory.watch()
    assert kernels is not None and kernels.handles and kernels.percent == shared_memory.DRIVERS_CHOICE
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def preferred() -> set[int]:
        found = set()
        for handle in kernels.handles:
            assert driver.cuFuncGetAttribute(ctypes.byref(value), 9, ctypes.c_void_p(handle)) == 0
            found.add(value.value)
        return found

    assert preferred() == {shared_memory.DRIVERS_CHOICE}
    with runner._divided_memory(2):
        wanted = shared_memory.choose_percent(2, runner.memory_shape)
        assert preferred() == {wanted} != {shared_memory.DRIVERS_CHOICE}
    assert preferred() == {shared_memory.DRIVERS_CHOICE}


@pytest.mark.parametrize("count", [20, 40, 64, 100, 230])
def test_products_in_parts_compute_the_model_of_whole_products(as_wide_as_0_6b, count, monkeypatch):
    limits = {"max_num_seqs": 240, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 2000}
    core = engine(as_wide_as_0_6b, **limits)
    runner = core.runner
    start(core, count)
    while len(core.step()) < count:  # until all decode
        pass
    torch.cuda.synchronize()
    size, rows = runner.graphs.find(count), runner.static_rows.clone()
    launched, launch = [], split_k_triton.launch
    monkeypatch.setattr(split_k_triton, "launch", lambda *args, **kwargs: launched.append(1) or launch(*args, **kwargs))
    logits, counts = [], []
    for _ in range(2):
        runner.static_rows.copy_(rows)
        with torch.inference_mode():
            logits.append(runner._decode_logits(size)[:count].double())
        monkeypatch.setattr(split_k, "supports", lambda *args: False)
        counts.append(len(launched))
    assert 0 < counts[0] == counts[1]  # all in the first
    parts, whole = logits
    assert 0 < (parts - whole).norm() < 3e-2 * whole.norm()  # bfloat16 rounds in other places


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}])
def test_graphs_and_eager_engines_give_the_same_tokens_in_float32(tiny, sampling):
    results = []
    for enforce_eager in (False, True):
        core = engine(tiny, "float32", enforce_eager=enforce_eager)
        assert (core.runner.graphs is None) == enforce_eager
        start(core, 7, **sampling)
        results.append(run_all(core))
    assert results[0] == results[1]


@pytest.mark.parametrize("attention", ["auto", "triton"])
def test_prompts_by_graph_give_the_eager_tokens_again_and_again(tiny, attention):
    results = []
    for enforce_eager in (False, True):
        core = engine(tiny, "float32", enforce_eager=enforce_eager, attention_backend=attention)
        rounds = []
        for _ in range(3):  # a shape's first step runs eagerly, what comes after is the graph's
            for i, prompt in enumerate(PROMPTS):
                add(core, f"{i}", prompt, 6, ignore_eos=True, temperature=0.8, seed=i, salt=str(len(rounds)))
                if i % 2:
                    rounds.append(run_all(core))
            rounds.append(run_all(core))
        results.append(rounds)
        if not enforce_eager:
            captured = core.runner.prompt_graphs._graphs
            assert captured and None not in captured.values()
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # without FlashAttention's whole prompts, and with
def test_prompts_find_their_graphs_captured_ahead(tiny, dtype):
    results = []
    for ahead in (True, False):
        core = engine(tiny, dtype, enforce_eager=not ahead)
        wanted = list(core.runner.to_capture)
        if ahead:
            core.capture_ahead()  # its memory is what all that follow take turns in
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved()
        while core.may_capture:
            core.capture_ahead()
        for i, prompt in enumerate(PROMPTS):
            add(core, f"first {i}", prompt, 6, ignore_eos=True, temperature=0.8, seed=i)
            if i % 2:
                results.append(run_all(core))
        for i, prompt in enumerate(PROMPTS):  # begins with what is in the prefix cache
            results.append(run_all(core))
            add(core, f"second {i}", prompt + [7] * 30, 6, ignore_eos=True, temperature=0.8, seed=i)
        results.append(run_all(core))
        if ahead:
            torch.cuda.synchronize()
            assert torch.cuda.memory_reserved() - before < 64 * 2**20
            captured = core.runner.prompt_graphs._graphs
            assert set(captured) == set(wanted) and len(wanted) > 20 and None not in captured.values()
    half = len(results) // 2
    if dtype == "float32":
        assert results[:half] == results[half:]
    assert all(len(tokens) == 6 for result in results for tokens in result.values())


def test_whole_prompts_give_the_tokens_of_prompts_in_chunks(tmp_path):
    """FlashAttention, where there is one, reads whole prompts' keys past the cache; chunks come from its pages."""
    folder = make_tiny("qwen3", tmp_path, head_dim=128, max_position_embeddings=512)
    texts = []
    for max_num_batched_tokens in (512, 80):
        core = engine(folder, enable_prefix_caching=False, max_num_batched_tokens=max_num_batched_tokens)
        for turn in range(2):  # eagerly, then by graph
            for i, length in enumerate((130, 17, 64, 200)):
                add(core, f"{i}", list(range(i, i + length)), 12, ignore_eos=True, temperature=0.0)
            tokens = run_all(core)
            assert not turn or tokens == texts[-1]
            texts.append(tokens)
        if max_num_batched_tokens == 512 and core.runner.backend.reads_whole_prompts:
            assert all(shape.whole for shape in core.runner.prompt_graphs._graphs)
    same = [a == b for name in texts[0] for a, b in zip(texts[0][name], texts[-1][name], strict=True)]
    assert sum(same) / len(same) > 0.7  # bfloat16: a near tie tips what follows


def test_what_lies_in_padding_tokens_reaches_no_other(tmp_path):
    """Rows of attention that belong to no prompt are never written: here they hold NaN."""
    core = engine(make_tiny("qwen3", tmp_path, head_dim=64, tie_word_embeddings=False))
    add(core, "warm", PROMPTS[2][:70], 3, ignore_eos=True, temperature=0.0)
    run(core)
    add(core, "a", PROMPTS[2][:66], 3, ignore_eos=True, temperature=0.0, salt="a")
    expected = run_all(core)["a"]
    runner = core.runner
    shape = runner.prompt_graphs.shape(66, 1, 66)
    assert shape[0] == 80 and shape in runner.prompt_graphs._graphs
    with torch.inference_mode():
        runner.model.embed.weight[0] = torch.nan  # padding tokens are id 0, which no prompt here holds
    add(core, "b", PROMPTS[2][:66], 3, ignore_eos=True, temperature=0.0, salt="b")
    assert run_all(core)["b"] == expected


@pytest.mark.parametrize("mode", ["two_phase", "mixed"])
def test_the_step_loop_never_waits_for_the_device(tiny, mode):
    core = engine(tiny, schedule_mode=mode)
    start(core, 3, temperature=0.5)
    run(core)  # whatever is set up on first use
    start(core, 12, temperature=0.8, top_p=0.9, min_tokens=5)
    for i in range(3):
        add(core, f"plain{i}", PROMPTS[i], 20, temperature=0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            if not core.has_work:
                break
            core.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not core.has_work


@pytest.mark.parametrize("eager", [False, True])
def test_traffic_finds_the_sampler_and_the_embedding_compiled(tmp_path, eager, monkeypatch):
    sizes = {"vocab_size": 1000 + 8 * eager, "hidden_size": 192 + 64 * eager}  # of which no other test has kernels
    core = engine(make_tiny("qwen3", tmp_path, head_dim=64, **sizes), enforce_eager=eager)
    asked_for = set()
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **found: asked_for.add(found["src"].name))
    start(core, 5, temperature=0.7)
    run(core)
    if not eager:
        start(core, 5, temperature=0.7, top_p=0.9)
        run(core)
    assert not asked_for & {"_scan", "_choose", "_embedding_kernel"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fully_cached_prompt_runs_in_the_decode_graph_with_the_same_tokens(tiny, dtype, monkeypatch):
    core = engine(tiny, dtype, batch_invariant=dtype == "bfloat16")
    prompts = {"whole blocks": list(range(3, 67)), "one more token": list(range(3, 68))}
    cold = {}
    for name, prompt in prompts.items():
        core.block_manager.enable_prefix_caching = False
        add(core, name, prompt, 20, ignore_eos=True, temperature=0.8, seed=4)
        cold |= run_all(core)
    core.block_manager.enable_prefix_caching = True
    add(core, "fill", [*prompts["one more token"], 9], 1, temperature=0.0)
    run(core)

    def refuse(inputs):
        raise AssertionError("ran eagerly")

    monkeypatch.setattr(core.runner, "_run_tokens", refuse)
    for name, prompt in prompts.items():
        add(core, name, prompt, 20, ignore_eos=True, temperature=0.8, seed=4)
    assert run_all(core) == cold
    assert core.stats.prefix_cache_hits >= 126


def test_min_tokens_bans_the_end_in_graphs_too(tiny):
    core = engine(tiny)
    for i in range(30):
        add(core, str(i), PROMPTS[i % 5], 60, temperature=3.0, seed=i, stop_token_ids=list(range(3, 500)), min_tokens=9)
    for items in run(core).values():
        tokens = [t for item in items for t in item.new_token_ids]
        assert len(tokens) >= 9


def test_nan_ends_that_request_alone_and_leaves_nothing_behind(tmp_path):
    core = engine(make_tiny("qwen3", tmp_path, head_dim=64, tie_word_embeddings=False))
    with torch.inference_mode():
        core.runner.model.embed.weight[77] = torch.nan
    bad = [*range(100, 140), 77, 5]
    add(core, "good", PROMPTS[1], 30, ignore_eos=True, temperature=0.0)
    expected = run_all(core)["good"]
    assert len(expected) == 30
    for _ in range(2):  # the second time nothing of the first must be found in the prefix cache
        add(core, "bad", bad, 30, ignore_eos=True, temperature=0.0)
        add(core, "good", PROMPTS[1], 30, ignore_eos=True, temperature=0.0)
        results = run(core)
        assert results["bad"][-1].finish_reason == "error" and "NaN" in results["bad"][-1].error
        assert [t for item in results["good"] for t in item.new_token_ids] == expected
    # prompts that now get the blocks the bad one wrote NaN into
    for i in range(60):
        add(core, str(i), [3 + i, *range(300, 330)], 20, ignore_eos=True, temperature=0.0)
    assert all(items[-1].finish_reason == "length" for items in run(core).values())
    core.check()


def test_no_memory_for_a_step_ends_its_requests_and_the_engine_goes_on(tiny, monkeypatch):
    core = engine(tiny)
    add(core, "first", PROMPTS[0], 200, ignore_eos=True, temperature=0.0)
    for _ in range(5):
        core.step()
    forward, failing = core.runner.model.forward, [True]

    def out_of_memory(*args, **options):
        if failing[0] and len(args[0]) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **options)

    monkeypatch.setattr(core.runner.model, "forward", out_of_memory)
    add(core, "large", PROMPTS[2], 5, ignore_eos=True)
    results = run(core)
    assert results["large"][-1].finish_reason == "error" and "memory" in results["large"][-1].error
    assert results["first"][-1].finish_reason == "length"
    failing[0] = False
    add(core, "large", PROMPTS[2], 5, ignore_eos=True)
    assert run(core)["large"][-1].finish_reason == "length"
    core.check()


def test_a_cache_that_does_not_fit_is_refused_with_what_would(tiny):
    with pytest.raises(ConfigError, match="of KV cache are left"):
        engine(tiny, num_gpu_blocks_override=None, gpu_memory_utilization=0.001)
    with pytest.raises(ConfigError, match=r"max_model_len=512 does not fit, \d+ would"):
        engine(tiny, num_gpu_blocks_override=None, kv_cache_memory_bytes=100_000, max_model_len=512)


def test_the_cache_is_sized_within_gpu_memory_utilization(tiny):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    mine = torch.cuda.memory_reserved()
    utilization = round((total - free) / total + 0.04, 3)  # 3 GB beyond what is in use
    core = engine(tiny, num_gpu_blocks_override=None, gpu_memory_utilization=utilization, max_num_seqs=256)
    assert 1000 < core.info.num_blocks < kv_cache.MAX_BLOCKS, "the budget is what limits it"
    start(core, 40, temperature=0.5)
    run(core)
    taken = torch.cuda.memory_reserved() - mine
    assert 0.01 * total < taken < 0.045 * total


def test_rows_that_share_a_block_filled_in_the_same_step_read_it(tiny):
    """Prompts that are cached but for one token, one of which fills a block that another one starts with."""
    prompt = list(range(3, 36))
    results = []
    for enforce_eager in (True, False):
        core = engine(tiny, "float32", enforce_eager=enforce_eager, max_num_batched_tokens=40)
        for _ in range(2):
            for name, length in (("a", 31), ("b", 32), ("c", 33), ("d", 33)):
                add(core, name, prompt[:length], 12, ignore_eos=True, temperature=0.0)
            results.append(run_all(core))
    assert all(result == results[0] for result in results)


INVARIANT = {"dtype": "bfloat16", "batch_invariant": True}


def test_batch_invariant_tokens_are_those_of_the_request_alone(tiny):
    """bf16, sampled: alone; beside others; in small chunks; preempted; found in the prefix cache; mixed steps."""
    roomy = engine(tiny, **INVARIANT, enable_prefix_caching=False)
    expected = {}
    for i in range(12):
        add(roomy, str(i), PROMPTS[i % 5], 60, ignore_eos=True, seed=i, temperature=0.9)
        expected |= run_all(roomy)
    for overrides in (
        {},
        {"max_num_batched_tokens": 48},
        {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 20, "schedule_mode": "mixed"},
        {"num_gpu_blocks_override": 20, "enforce_eager": True},
    ):
        core = engine(tiny, **INVARIANT, **overrides)
        for _ in range(2):
            for i in range(12):
                add(core, str(i), PROMPTS[i % 5], 60, ignore_eos=True, seed=i, temperature=0.9)
            assert run_all(core) == expected, overrides


def test_the_invariant_engine_computes_the_same_model(tiny):
    results = []
    for invariant in (False, True):
        core = engine(tiny, "float32", batch_invariant=invariant)
        start(core, 5, temperature=0.0)
        results.append(run_all(core))
    assert results[0] == results[1]
