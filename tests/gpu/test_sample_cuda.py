"""Sampling by slots on the GPU, at a real vocabulary's size."""

from functools import partial

import numpy as np
import pytest
import torch
import triton

from nanovllm_bento.kernels import sample_triton
from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.sample import best_of_shard, sample_rows, slot_words
from nanovllm_bento.layers.sampler import Sampler
from nanovllm_bento.sampling_params import SamplingParams
from tests.kernels.sample_checks import (
    FILTERS,
    PLAIN,
    by_shards,
    check,
    check_invalid_rows,
    check_last_tokens,
    check_rows_without_filters_do_not_depend_on_the_variant,
    check_shards,
    p_value,
    shapes_of_logits,
    table_of,
)

CUDA = torch.device("cuda")
VOCAB = 151_936
MORE_FILTERS = [
    {"top_k": 500, "top_p": 0.9},
    {"top_k": 1000, "top_p": 0.7},
    {"top_k": 40_000, "top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.99, "min_p": 0.001},
    {"min_p": 1e-4, "temperature": 0.6},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["flat", "peaked", "banned", "ties", "constant", "large"])
def test_rows_of_every_kind_equal_the_reference(shape: str, dtype: torch.dtype) -> None:
    rows = PLAIN + FILTERS + MORE_FILTERS
    check(sample_rows, CUDA, shapes_of_logits(len(rows), VOCAB, 1)[shape].to(dtype), rows, filtered=True)


@pytest.mark.parametrize("vocab_size", [9, 4099, 128_256, 151_669])
def test_any_size_of_vocabulary(vocab_size: int) -> None:
    rows = PLAIN + FILTERS
    check(sample_rows, CUDA, shapes_of_logits(len(rows), vocab_size, 2)["flat"], rows, filtered=True)


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_filters_do_not_depend_on_the_variant(shape: str, dtype: torch.dtype) -> None:
    logits = shapes_of_logits(len(PLAIN), VOCAB, 3)[shape].to(dtype)
    check_rows_without_filters_do_not_depend_on_the_variant(sample_rows, CUDA, logits)


@pytest.mark.parametrize("shape", ["flat", "peaked"])
def test_candidates_and_rejection_give_the_same_tokens(shape: str) -> None:
    logits = shapes_of_logits(len(FILTERS), VOCAB, 4)[shape]
    for candidates in (1024, 2):  # 2: only tiny sets are decided by comparing candidates

        def launch(*args, filtered, out=None, candidates=candidates):
            out = torch.empty(len(args[0]), dtype=torch.int64, device=CUDA) if out is None else out
            return sample_triton.sample_rows(*args, out, filtered=filtered, pdl=False, candidates=candidates)

        check(launch, CUDA, logits, FILTERS, filtered=True)


def test_rows_that_are_not_numbers_give_no_token() -> None:
    for filtered in (False, True):
        check_invalid_rows(sample_rows, CUDA, VOCAB, filtered=filtered)


@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_are_also_left_with_their_slots(filtered: bool) -> None:
    check_last_tokens(sample_rows, CUDA, VOCAB, filtered=filtered)


def test_tokens_of_shards_are_also_left_with_their_slots() -> None:
    choose = partial(sample_triton.choose_among, pdl=use_pdl(CUDA))
    check_last_tokens(by_shards(best_of_shard, choose, 2), CUDA, VOCAB, filtered=False)


@pytest.mark.parametrize(
    "row", [{}, {"temperature": 0.5}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.7}]
)
def test_draws_follow_the_renormalised_softmax(row: dict) -> None:
    draws = 20_000
    logits = torch.randn(60, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = (logits.double() / row.get("temperature", 1.0)).softmax(0)
    order = probs.argsort(descending=True)
    kept = probs[order]
    kept[row.get("top_k", 60) :] = 0
    kept /= kept.sum()
    before = kept.cumsum(0) - kept
    kept[(before >= row.get("top_p", 2.0)) | (probs[order] < row.get("min_p", 0.0) * probs.max())] = 0
    expected = torch.zeros_like(probs).scatter_(0, order, kept / kept.sum())
    tokens = sample_rows(
        logits.to(CUDA).expand(draws, -1).contiguous(),
        slot_words(table_of([row])).to(CUDA),
        torch.zeros(draws, dtype=torch.int32, device=CUDA),
        torch.arange(draws, device=CUDA),
        filtered=True,
    )
    assert p_value(tokens.cpu(), expected) > 1e-4


@pytest.mark.parametrize("filtered", [False, True])
def test_a_graph_follows_its_buffers(filtered: bool) -> None:
    """Captured once; then other logits, other parameters of the slots, other slots and positions."""
    rows = FILTERS if filtered else (PLAIN * 3)[: len(FILTERS)]
    n = len(rows)
    logits = torch.zeros(n, VOCAB, dtype=torch.bfloat16, device=CUDA)
    words = torch.zeros(n, 8, dtype=torch.int32, device=CUDA)
    slots = torch.full((n,), -1, dtype=torch.int32, device=CUDA)
    positions = torch.zeros(n, dtype=torch.int64, device=CUDA)
    tokens = torch.empty(n, dtype=torch.int64, device=CUDA)
    last_tokens = torch.zeros(n, dtype=torch.int64, device=CUDA)
    run = partial(sample_rows, logits, words, slots, positions, filtered=filtered, out=tokens, last_tokens=last_tokens)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(new_logits, new_words, new_slots, new_positions, *, filtered, out):
        for buffer, values in (
            (logits, new_logits),
            (words, new_words),
            (slots, new_slots),
            (positions, new_positions),
        ):
            buffer.copy_(values)
        tokens.fill_(-77)
        last_tokens.fill_(-77)
        graph.replay()
        assert torch.equal(last_tokens[slots], tokens)
        return out.copy_(tokens)

    shapes = shapes_of_logits(n, VOCAB, 6)
    for shape in ("flat", "peaked", "flat"):
        check(replay, CUDA, shapes[shape].bfloat16(), rows, filtered=filtered, reordered=False)
        rows = rows[1:] + rows[:1]


def test_a_step_of_the_sampler_never_waits_for_the_device() -> None:
    sampler = Sampler(8, CUDA)
    on_host = Sampler(8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    slots = np.array([5, 1, 3], np.int64)
    params = [
        {"temperature": 0.0},
        {"temperature": 1.3, "seed": 2**64 - 1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    ]
    for step in range(6):
        logits = torch.randn(3, VOCAB, generator=generator)
        best = int(logits[0].argmax())
        banned = np.array([best, 7, 2 * VOCAB + 11] if step % 2 else [], np.int64)
        positions = np.array([step, step + 9, step + 100], np.int64)
        on_device = logits.to(CUDA)
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for slot, changes in zip(slots, params, strict=True):
                values = SamplingParams(**{"seed": 3 + step, **changes})
                sampler.set_slot(int(slot), values)
                on_host.set_slot(int(slot), values)
            tokens = sampler(on_device, slots, positions, banned)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert tokens.tolist() == on_host(logits, slots, positions, banned).tolist()
        assert not len(banned) or tokens[0].item() != best


def test_any_number_of_rows_runs_the_same_kernels(monkeypatch) -> None:
    sampler = Sampler(16, CUDA)
    last_tokens = torch.zeros(16, dtype=torch.int64, device=CUDA)

    def sample(rows: int) -> None:
        slots = np.arange(rows)
        for slot in slots:
            sampler.set_slot(int(slot), SamplingParams(temperature=0.7, top_k=20, top_p=0.95, seed=1))
        logits = torch.zeros(rows, VOCAB, dtype=torch.bfloat16, device=CUDA)
        sampler(logits, slots, slots, last_tokens=last_tokens)

    sample(4)
    asked_for = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **found: asked_for.append(found["src"].name))
    for rows in (1, 2, 3, 13, 16):
        sample(rows)
    assert not asked_for


@pytest.mark.parametrize(("ranks", "vocab_size"), [(2, VOCAB), (4, VOCAB), (2, 512)])  # 512: one part a shard
def test_shards_of_the_vocabulary_give_the_tokens_of_all_of_it(ranks: int, vocab_size: int) -> None:
    choose = partial(sample_triton.choose_among, pdl=use_pdl(CUDA))
    check_shards(by_shards(best_of_shard, choose, ranks), CUDA, vocab_size)
