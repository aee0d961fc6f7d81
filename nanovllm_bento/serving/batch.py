"""What BentoML's adaptive batching runs: ``generate_batch`` and ``score``, many items in one call.

BentoML's dispatcher has one batch of each in flight and answers when its slowest item is done, so everything is bounded
here: an item in tokens, a batch in time, the calls that wait in number (BatchGate).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.engine.client import generate
from nanovllm_bento.engine.messages import OutputItem
from nanovllm_bento.engine.request import check_score
from nanovllm_bento.errors import DeadlineExceededError, EngineError, InvalidRequestError, PromptTooLongError
from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.auth import Caller, current_caller
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.errors import ClientDisconnectedError, OverloadedError, error_object, error_response
from nanovllm_bento.serving.errors import invalid_body as invalid_fields
from nanovllm_bento.serving.exchange import BATCHED_PATHS, Exchange, current_exchange
from nanovllm_bento.serving.generation import complete, plan_jobs
from nanovllm_bento.serving.logs import random_hex
from nanovllm_bento.serving.metrics import RequestMetrics
from nanovllm_bento.serving.openai.protocol import ErrorObject, SamplingFields, Usage
from nanovllm_bento.text.pairs import continuation_ids, move_spaces

SHARE = 4
"""A caller may have open SHARE times what is still free, as in admission.py: one alone cannot take all."""


@dataclass(slots=True)
class _Call:
    """One HTTP call of a batched method, whose items may be in several batches, and those hold other calls' items.

    tasks: what runs for it. exchange: None where nobody asked for one.
    """

    exchange: Exchange | None = field(default_factory=current_exchange.get)
    has_left: bool = False
    tasks: "set[asyncio.Task[Any]]" = field(default_factory=set)

    def leave(self) -> None:
        """Its client has left: nothing of it needs to run any more."""
        self.has_left = True
        for task in self.tasks:
            task.cancel()

    def began(self, sequence: RequestMetrics) -> None:
        """Have its exchange tell of a sequence."""
        if self.exchange is not None:
            self.exchange.sequences.append(sequence)

    def add_prompt(self, prompt: object) -> None:
        """Have its exchange tell of an item's prompt."""
        if self.exchange is not None:
            self.exchange.prompt = [*cast(list[object], self.exchange.prompt or []), prompt]


_current_call: ContextVar[_Call | None] = ContextVar("_current_call", default=None)


class BatchSampling(SamplingFields):
    """The fields of ``BatchItem.sampling``; n must be 1."""

    max_tokens: int | None = 16


class _Item(BaseModel):
    """Remembers whose it is when it is made, which is in that caller's own request: a batch mixes callers and calls."""

    model_config = ConfigDict(extra="forbid")

    cache_salt: str | None = Field(None, description="Cached prefixes are shared only within one salt.")
    _caller: Caller = PrivateAttr(default_factory=lambda: current_caller.get())
    _call: _Call = PrivateAttr(default_factory=lambda: _current_call.get() or _Call())

    @property
    def caller(self) -> Caller:
        return self._caller

    @property
    def call(self) -> _Call:
        return self._call

    def prompt_for_logs(self) -> object:
        """What log_prompts writes."""
        raise NotImplementedError


class BatchItem(_Item):
    """One prompt, as text or as token ids, and how to sample its completion."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="temperature, top_p, top_k, min_p, seed, max_tokens (16 if absent), min_tokens, stop, "
        "stop_token_ids, ignore_eos, skip_special_tokens; as in /v1/completions.",
    )

    def prompt_for_logs(self) -> object:
        return self.prompt_token_ids if self.prompt is None else self.prompt


class ScoreItem(_Item):
    """A context and a continuation, each as text or as token ids.

    Two texts are tokenized together, as lm-evaluation-harness does it. The context has at least one token.
    """

    context: str | None = None
    context_token_ids: list[int] | None = None
    continuation: str | None = None
    continuation_token_ids: list[int] | None = None

    def prompt_for_logs(self) -> object:
        given = self.context_token_ids if self.context is None else self.context
        return [given, self.continuation_token_ids if self.continuation is None else self.continuation]


class _Result(BaseModel):
    """``error`` is null where all went well."""

    usage: Usage | None = None
    error: ErrorObject | None = None

    @classmethod
    def failed(cls, exc: Exception) -> Self:
        return cls(error=error_object(exc)[1]["error"])


class BatchResult(_Result):
    """The completion of one item, or the error that is its own."""

    text: str = ""
    token_ids: list[int] = Field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ScoreResult(_Result):
    """How likely a continuation is, token by token, or the error that is the item's own.

    token_ids: of the continuation. logprobs: natural logarithms of their probabilities; sum_logprob: of the whole.
    is_greedy: whether each was the most likely token (if all were, greedy decoding gives this continuation).
    """

    logprobs: list[float] = Field(default_factory=list)
    sum_logprob: float | None = None
    is_greedy: list[bool] = Field(default_factory=list)
    token_ids: list[int] = Field(default_factory=list)


_I = TypeVar("_I", bound=_Item)
_R = TypeVar("_R", bound=_Result)


async def run_batch(context: ServingContext, items: Sequence[BatchItem]) -> list[BatchResult]:
    """Complete all items side by side; results in their order. An item that fails says so in its ``error``."""
    return await _side_by_side(context, items, _complete_item, BatchResult.failed)


async def run_scores(context: ServingContext, items: Sequence[ScoreItem]) -> list[ScoreResult]:
    """Score all items side by side; results in their order. An item that fails says so in its ``error``."""
    return await _side_by_side(context, items, _score_item, ScoreResult.failed)


def max_latency_ms(config: ServiceConfig, configured: int | None) -> int:
    """max_latency_ms for BentoML's dispatcher: ``configured``, or so much that it never sheds what BatchGate lets in.

    It sheds where (time waited + a * waiting calls + b) is above that, with a line a, b that it fits to the batches it
    saw. Neither a nor b can be far above the longest batch, but after single calls that took long it expects as much
    of each of a hundred short ones, which one batch would have served.
    """
    return configured or int(2000 * config.batch_max_seconds * config.batch_max_calls)


async def _side_by_side(
    context: ServingContext,
    items: Sequence[_I],
    run: Callable[[ServingContext, _I], Awaitable[_R]],
    failed: Callable[[Exception], _R],
) -> list[_R]:
    seconds = context.config.batch_max_seconds

    async def run_item(item: _I) -> _R:
        call, task = item.call, asyncio.current_task()
        assert task is not None
        if context.logs_prompts:
            call.add_prompt(item.prompt_for_logs())
        call.tasks.add(task)
        try:
            if call.has_left:
                raise ClientDisconnectedError
            async with asyncio.timeout(seconds):
                await context.follow()
                return await run(context, item)
        except asyncio.CancelledError:
            if not call.has_left or task.uncancel():
                raise
            return failed(ClientDisconnectedError())
        except TimeoutError:
            return failed(
                DeadlineExceededError(f"The batch may take {seconds:g} s, and this item was not done by then.")
            )
        except Exception as exc:
            return failed(exc)
        finally:
            call.tasks.discard(task)

    return await asyncio.gather(*map(run_item, items))


async def _complete_item(context: ServingContext, item: BatchItem) -> BatchResult:
    text, info, caller, limit = context.text, context.engine.info, item.caller, context.config.generate_batch_max_tokens
    try:
        fields = BatchSampling.model_validate(item.sampling)
    except ValidationError as exc:
        raise invalid_fields(exc) from None
    if fields.max_tokens is not None and fields.max_tokens > limit:
        raise InvalidRequestError(
            f"max_tokens={fields.max_tokens} is more than one item of a batch may have: {limit}, as the whole batch "
            "waits for it. Ask for it at /v1/completions, or raise generate_batch_max_tokens.",
            param="max_tokens",
        )
    sampling = fields.sampling(text.sampling_defaults, limit if fields.max_tokens is None else fields.max_tokens)
    if sampling.n != 1:
        raise InvalidRequestError("n must be 1 here: send the item several times.", param="n")
    ids = await _token_ids(context, "prompt", item.prompt, item.prompt_token_ids)
    (job,) = jobs = plan_jobs(
        f"batch-{random_hex(12)}",
        [ids],
        sampling,
        info,
        cache_salt=caller.salt(item.cache_salt),
        priority=caller.effective_priority(None, info.scheduling_policy),
    )
    arrived = time.monotonic()
    with context.admit(1, caller, len(ids)) as ticket:
        await ticket.turn()
        job.metrics = context.metrics.request(len(ids), arrived, max_tokens=job.sampling.max_tokens)
        item.call.began(job.metrics)
        (done,) = await complete(context.engine, text.tokenizer, jobs)
        ticket.charge(len(done.token_ids))
    return BatchResult(
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        stop_reason=done.stop_reason,
        usage=Usage.of(len(ids), len(done.token_ids), done.num_cached_tokens),
    )


async def _score_item(context: ServingContext, item: ScoreItem) -> ScoreResult:
    info, caller, limit = context.engine.info, item.caller, context.config.score_max_tokens
    given, wanted = await _token_pair(context, item)
    check_score(given + wanted, len(wanted), info, param="context")
    if len(given) + len(wanted) > limit:
        raise PromptTooLongError(
            f"Context and continuation have {len(given) + len(wanted)} tokens; one item of a batch may have {limit}. "
            "Shorten the context or raise score_max_tokens.",
            param="context",
        )
    arrived, num_tokens = time.monotonic(), len(given) + len(wanted)
    with context.admit(1, caller, num_tokens) as ticket:
        priority = caller.effective_priority(None, info.scheduling_policy)
        await ticket.turn()
        metrics, outcome = context.metrics.request(num_tokens, arrived), "abort"
        item.call.began(metrics)
        stream = generate(
            context.engine,
            f"score-{random_hex(12)}",
            given + wanted,
            _NO_SAMPLING,
            cache_salt=caller.salt(item.cache_salt),
            priority=priority,
            num_scored=len(wanted),
        )
        try:
            async with aclosing(cast(Any, stream)) as outputs:
                scored: OutputItem = await anext(outputs)
            metrics.first(time.monotonic(), scored.scheduled_at, 0, scored.num_cached_tokens)
            outcome = "stop"
        except Exception:
            outcome = "error"
            raise
        finally:
            metrics.finish(time.monotonic(), outcome)
    if scored.logprobs is None or scored.is_greedy is None:
        raise EngineError("The engine gave no scores.")
    return ScoreResult(
        logprobs=scored.logprobs,
        sum_logprob=sum(scored.logprobs),
        is_greedy=scored.is_greedy,
        token_ids=wanted,
        usage=Usage.of(num_tokens, 0, scored.num_cached_tokens),
    )


_NO_SAMPLING = SamplingParams(max_tokens=1, seed=0)


async def _token_pair(context: ServingContext, item: ScoreItem) -> tuple[list[int], list[int]]:
    """Token ids of an item's context and of its continuation."""
    if item.context is not None and item.continuation is not None:
        _one_of("context", item.context, item.context_token_ids)
        _one_of("continuation", item.continuation, item.continuation_token_ids)
        before, after = move_spaces(item.context, item.continuation)
        given = await context.encode(before, add_special_tokens=True, param="context")
        whole = await context.encode(before + after, add_special_tokens=True, param="context")
        wanted = continuation_ids(whole, given)
        return given, wanted or await context.encode(after, add_special_tokens=False, param="continuation")
    given = await _token_ids(context, "context", item.context, item.context_token_ids)
    return given, await _token_ids(
        context, "continuation", item.continuation, item.continuation_token_ids, add_special_tokens=False
    )


async def _token_ids(
    context: ServingContext, name: str, text: str | None, ids: list[int] | None, *, add_special_tokens: bool = True
) -> list[int]:
    _one_of(name, text, ids)
    if ids is not None:
        return ids
    return await context.encode(text or "", add_special_tokens=add_special_tokens, param=name)


def _one_of(name: str, text: str | None, ids: list[int] | None) -> None:
    if (text is None) == (ids is None):
        raise InvalidRequestError(f"Give either {name} or {name}_token_ids.", param=name)


class BatchGate:
    """ASGI middleware that answers 429 to calls of the batched methods beyond ``max_calls`` open ones of each, and ends
    what runs for a call whose client has left: BentoML's dispatcher queues without bound, and looks for nobody.

    What it lets in is not refused later.
    """

    def __init__(self, app: ASGIApp, *, max_calls: int) -> None:
        self.app, self.max_calls = app, max_calls
        self.open: dict[str, Counter[str]] = {path: Counter() for path in BATCHED_PATHS}  # path → caller → calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        by_caller = self.open.get(scope["path"]) if scope["type"] == "http" else None
        if by_caller is None:
            await self.app(scope, receive, send)
            return
        caller = current_caller.get().name
        free, own = self.max_calls - by_caller.total(), by_caller[caller]
        if free < 1 or (caller and own >= SHARE * free):
            why = f"{self.max_calls - free} calls of {scope['path']} are open here. Try again later."
            await error_response(OverloadedError(why))(scope, receive, send)
            return
        by_caller[caller] += 1
        try:
            await _until_left(self.app, scope, receive, send)
        finally:
            by_caller[caller] -= 1
            if not by_caller[caller]:
                del by_caller[caller]


async def _until_left(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app`` with a _Call of its own, which is told when the client leaves.

    The server tells of that where the next message of the request is asked for, so once the body has come that is done
    here, for ``app`` too.
    """
    call = _Call()
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.leave()

    async def watched_receive() -> Message:
        nonlocal watcher
        if watcher is not None:
            await asyncio.shield(watcher)
            return {"type": "http.disconnect"}
        message = await receive()
        if message["type"] == "http.disconnect":
            call.leave()
        elif not message.get("more_body", False):
            watcher = asyncio.create_task(watch())
        return message

    token = _current_call.set(call)
    try:
        await app(scope, watched_receive, send)
    finally:
        _current_call.reset(token)
        if watcher is not None:
            watcher.cancel()
