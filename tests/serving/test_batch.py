"""generate_batch: every item has its own sampling and its own fate."""

from nanovllm_bento.serving.batch import BatchItem, run_batch
from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import FakeEngine


async def test_items_run_side_by_side_and_keep_their_order(context: ServingContext, engine: FakeEngine) -> None:
    items = [
        BatchItem(prompt="a", sampling={"max_tokens": 2}),
        BatchItem(prompt_token_ids=[5, 6], sampling={"stop": ","}),
        BatchItem(prompt="b"),
    ]
    first, second, third = await run_batch(context, items)
    assert (first.text, first.finish_reason, first.token_ids) == ("He", "length", list(b"He"))
    assert (second.text, second.stop_reason) == ("Hello", ",")
    assert second.usage is not None and (second.usage.prompt_tokens, second.usage.completion_tokens) == (2, 6)
    assert third.text == "Hello, world!"
    assert engine.most_open == 3 and context.num_open == 0


async def test_a_bad_item_fails_alone(context: ServingContext) -> None:
    bad = [
        (BatchItem(), "prompt"),
        (BatchItem(prompt="a", prompt_token_ids=[1]), "prompt"),
        (BatchItem(prompt=""), "prompt"),
        (BatchItem(prompt="x" * 600), "prompt"),
        (BatchItem(prompt_token_ids=[999]), "prompt"),
        (BatchItem(prompt="a", sampling={"temperature": -1}), "temperature"),
        (BatchItem(prompt="a", sampling={"temperature": "hot"}), "temperature"),
        (BatchItem(prompt="a", sampling={"mood": 1}), "mood"),
        (BatchItem(prompt="a", sampling={"n": 2}), "n"),
        (BatchItem(prompt="a", sampling={"logit_bias": {"1": 1}}), "logit_bias"),
    ]
    results = await run_batch(context, [item for item, _ in bad] + [BatchItem(prompt="a")])
    assert [result.error and result.error.param for result in results] == [param for _, param in bad] + [None]
    assert results[-1].text == "Hello, world!"


async def test_a_dead_engine_is_told_for_each_item(context: ServingContext, engine: FakeEngine) -> None:
    engine.dies_after = 2
    good, dead = await run_batch(context, [BatchItem(prompt="a", sampling={"max_tokens": 1}), BatchItem(prompt="b")])
    assert good.error is None and dead.error is not None and dead.error.code == "engine_dead"
