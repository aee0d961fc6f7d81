"""The demo model (real weights) against transformers: same text, same perplexity; and LLM as its users call it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm_bento import LLM, SamplingParams
from nanovllm_bento.errors import (
    ConfigError,
    EmptyPromptError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptExceedsCacheError,
    PromptTooLongError,
    SamplingParamsError,
    TokenOutOfVocabularyError,
)
from nanovllm_bento.kernels.attention.base import AttentionMetadata

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@pytest.fixture(scope="module")
def llm(demo_model) -> LLM:
    return LLM("demo", dtype="float32", device="cpu", max_model_len=2048)


@pytest.fixture(scope="module")
def reference(demo_model) -> Any:
    """transformers' own reading of the same file."""
    from transformers import AutoModelForCausalLM

    path = demo_model.path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # to compare what comes after an end of sequence too
    return model


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(llm, reference):
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"]
    outputs = llm.generate(prompts, GREEDY.with_changes(ignore_eos=True), use_tqdm=False)
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        with torch.inference_mode():
            whole = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert output.outputs[0].token_ids == whole[0, ids.shape[1] :].tolist()
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


@pytest.mark.slow
def test_perplexity_over_real_text_equals_transformers(llm, reference):
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:6000]
    ids = llm.tokenizer.encode(text)
    assert len(ids) > 1000
    with torch.inference_mode():
        wanted = reference(torch.tensor([ids])).logits[0]
    found = _logits(llm, ids)
    targets = torch.tensor(ids[1:])
    perplexity = [torch.nn.functional.cross_entropy(x[:-1], targets).exp().item() for x in (found, wanted)]
    assert 1.0 < perplexity[1] < 100
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-3)


def _logits(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Logits of every position, prefilled in chunks of 200 tokens through blocks in reverse order."""
    runner = llm.core.runner
    size = runner.block_size
    table = torch.arange(-(-len(ids) // size)).flip(0).int()[None]
    logits = []
    for start in range(0, len(ids), 200):
        positions = torch.arange(start, min(start + 200, len(ids)))
        end = start + len(positions)
        meta = AttentionMetadata(
            query_start_loc=torch.tensor([0, len(positions)], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_table=table,
            slot_mapping=table[0, positions // size].long() * size + positions % size,
            max_query_len=len(positions),
            max_seq_len=end,
            num_decode_rows=0,
        )
        with torch.inference_mode():
            runner.backend.prepare(meta)
            hidden = runner.model(torch.tensor(ids[start:end]), positions, runner.kv_caches, meta)
            logits.append(runner.model.compute_logits(hidden))
    return torch.cat(logits)


def test_chat_answers_sensibly(llm):
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY, use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason is None
    assert output.finished and output.metrics.finished_time >= output.metrics.first_token_time


def test_every_kind_of_prompt_gives_the_same_result(llm):
    text = "The capital of France is"
    ids = llm.tokenizer.encode(text)
    params = GREEDY.with_changes(max_tokens=4)
    forms = [text, [text], ids, [ids], {"prompt": text}, [{"prompt_token_ids": ids}]]
    results = [llm.generate(form, params, use_tqdm=False) for form in forms]
    assert {(len(r), r[0].outputs[0].text) for r in results} == {(1, results[0][0].outputs[0].text)}
    assert results[0][0].prompt == text and results[2][0].prompt is None
    assert results[0][0].prompt_token_ids == ids


def test_results_come_in_the_order_asked_with_each_its_parameters(llm, capsys):
    params = [GREEDY.with_changes(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["One", "Two", "Three"], params, use_tqdm=True)
    assert [o.prompt for o in outputs] == ["One", "Two", "Three"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 5]
    assert all(o.outputs[0].finish_reason == "length" for o in outputs)
    shown = capsys.readouterr().err
    assert "prefill" in shown and "decode" in shown and "tok/s" in shown and "3/3" in shown


def test_the_likelier_continuation_scores_higher(llm):
    context = "The capital of France is"
    paris, london, bread = llm.score(context, [" Paris", " London", " bread"], use_tqdm=False)
    assert paris.sum_logprob > london.sum_logprob > bread.sum_logprob
    assert paris.is_greedy == [True] and bread.is_greedy == [False]
    ids = llm.tokenizer.encode(context)
    forms = llm.score([context, ids, context + " "], [" Paris", paris.continuation_token_ids, "Paris"], use_tqdm=False)
    assert all((f.context_token_ids, f.continuation_token_ids) == (ids, paris.continuation_token_ids) for f in forms)
    for form in forms:
        assert form.sum_logprob == pytest.approx(paris.sum_logprob, abs=0.05)
    with pytest.raises(InvalidRequestError, match="2 contexts but 3"):
        llm.score([context] * 2, ["a"] * 3, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="context is empty"):
        llm.score("", "a", use_tqdm=False)
    assert llm.core.block_manager.num_used_blocks == 0 and not llm.core.has_work


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(llm):
    prompt = "Count: one, two, three,"
    params = GREEDY.with_changes(max_tokens=30)
    (whole,) = llm.generate(prompt, params, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[7:11]  # spans tokens
    (output,) = llm.generate(prompt, params.with_changes(stop=[stop]), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert stop in llm.tokenizer.decode(completion.token_ids), "tokens count up to the one that completes the match"
    assert llm.core.block_manager.num_used_blocks == 0


def test_sampling_with_a_seed_repeats_and_without_one_varies(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=42, ignore_eos=True)
    same = llm.generate(["Once upon a time"] * 2, params, use_tqdm=False)
    assert same[0].outputs[0].token_ids == same[1].outputs[0].token_ids
    free = llm.generate(["Once upon a time"] * 4, params.with_changes(seed=None), use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in free}) > 1


def test_n_completions_of_one_prompt_differ_and_share_its_cache(llm):
    (output,) = llm.generate(
        "My favourite colours of all are", SamplingParams(n=3, max_tokens=8, seed=5, ignore_eos=True), use_tqdm=False
    )
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_min_tokens_holds_back_the_end(llm):
    message = [{"role": "user", "content": "Say hi."}]
    (short,) = llm.chat(message, GREEDY, use_tqdm=False)
    (long,) = llm.chat(message, GREEDY.with_changes(min_tokens=50), use_tqdm=False)
    assert len(short.outputs[0].token_ids) < 50 <= len(long.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ("", EmptyPromptError, "empty"),
        ([[]], EmptyPromptError, "empty"),
        ([[1] * 2048], PromptTooLongError, "2048"),
        ([[1, 49152]], TokenOutOfVocabularyError, "49152"),
        ([[-1]], TokenOutOfVocabularyError, "-1"),
        ({"text": "x"}, InvalidRequestError, "prompt_token_ids"),
        ([3.5], InvalidRequestError, "float"),
        (7, InvalidRequestError, "int"),
    ],
)
def test_a_bad_prompt_is_a_named_error_and_loses_nothing(llm, prompts, error, words):
    with pytest.raises(error, match=words):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    if isinstance(prompts, list):
        with pytest.raises(error):
            llm.generate(["fine", *prompts], GREEDY, use_tqdm=False)
    assert not llm.core.has_work and llm.core.block_manager.num_used_blocks == 0
    assert llm.generate("The capital of France is", GREEDY.with_changes(max_tokens=1), use_tqdm=False)[0].finished


def test_a_request_beyond_the_whole_cache_is_refused_with_both_numbers(demo_model):
    small = LLM("demo", num_gpu_blocks_override=4, dtype="float32", device="cpu")
    assert small.core.info.num_cache_tokens == small.core.info.max_model_len == 64
    with pytest.raises(PromptTooLongError, match=r"70.*64"):
        small.generate([[5] * 70], GREEDY, use_tqdm=False)
    with pytest.raises(ConfigError, match=r"128.*64"):
        LLM("demo", num_gpu_blocks_override=4, max_model_len=128, dtype="float32", device="cpu")
    assert issubclass(PromptExceedsCacheError, InvalidRequestError)


def test_unknown_arguments_and_models_are_named_errors():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM("demo", max_num_seq=4)
    with pytest.raises(TypeError):
        SamplingParams(temprature=0.5)
    with pytest.raises(SamplingParamsError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ModelNotFoundError, match="no-such-folder"):
        LLM("./no-such-folder")


def test_mismatched_parameter_lists_are_refused(llm):
    with pytest.raises(InvalidRequestError, match="2 prompts but 3"):
        llm.generate(["a", "b"], [GREEDY] * 3, use_tqdm=False)
