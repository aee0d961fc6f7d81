"""What BentoML's adaptive batching runs: many prompts in one call, each item with its own sampling and its own fate."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanovllm_bento.errors import InvalidRequestError, NanoVLLMError
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.errors import error_object, invalid_body
from nanovllm_bento.serving.generation import complete, plan_jobs
from nanovllm_bento.serving.openai.protocol import ErrorObject, SamplingFields, Usage


class BatchSampling(SamplingFields):
    """The fields of ``BatchItem.sampling``; n must be 1."""

    max_tokens: int | None = 16


class BatchItem(BaseModel):
    """One prompt, as text or as token ids, and how to sample its completion."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="temperature, top_p, top_k, min_p, seed, max_tokens (16 if absent), min_tokens, stop, "
        "stop_token_ids, ignore_eos, skip_special_tokens; as in /v1/completions.",
    )


class BatchResult(BaseModel):
    """The completion of one item, or the error that is its own: ``error`` is null where all went well."""

    text: str = ""
    token_ids: list[int] = Field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    error: ErrorObject | None = None


async def run_batch(context: ServingContext, items: Sequence[BatchItem]) -> list[BatchResult]:
    """Complete all items side by side; results in their order. An item that fails says so in its ``error``."""
    return await asyncio.gather(*(_run_item(context, item) for item in items))


async def _run_item(context: ServingContext, item: BatchItem) -> BatchResult:
    try:
        text = context.text
        try:
            fields = BatchSampling.model_validate(item.sampling)
        except ValidationError as exc:
            raise invalid_body(exc) from None
        sampling = fields.sampling(text.sampling_defaults, fields.max_tokens)
        if sampling.n != 1:
            raise InvalidRequestError("n must be 1 here: send the item several times.", param="n")
        if (item.prompt is None) == (item.prompt_token_ids is None):
            raise InvalidRequestError("Give either prompt or prompt_token_ids.", param="prompt")
        ids = item.prompt_token_ids
        if ids is None:
            ids = await context.encode(item.prompt or "", add_special_tokens=True)
        jobs = plan_jobs(f"batch-{secrets.token_hex(12)}", [ids], sampling, context.engine.info)
        with context.admit(1):
            (done,) = await complete(context.engine, text.tokenizer, jobs)
    except NanoVLLMError as exc:
        return BatchResult(error=error_object(exc)[1]["error"])
    return BatchResult(
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        stop_reason=done.stop_reason,
        usage=Usage.of(len(ids), len(done.token_ids), done.num_cached_tokens),
    )
