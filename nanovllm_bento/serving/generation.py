"""From prompt token ids to text, one sequence or many side by side. Knows no HTTP and no protocol's objects.

Stop strings are found here: the text ends before the string, the engine's request is aborted at once, and counts go
to the token that completed the match.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from nanovllm_bento.engine.client import EVERY_STEP, EngineClient, Pace
from nanovllm_bento.engine.messages import EngineInfo, OutputItem
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import EngineError
from nanovllm_bento.sampling_params import MAX_SEED, SamplingParams
from nanovllm_bento.serving.metrics import RequestMetrics
from nanovllm_bento.text.detokenizer import IncrementalDetokenizer
from nanovllm_bento.text.tokenizer import Tokenizer

WHOLE_ANSWER = Pace(64)
"""Where nobody reads along: fewer, larger detokenizer calls, none of them long."""


@dataclass(slots=True)
class Job:
    """One sequence to generate; ``sampling`` is resolved and has n=1.

    deadline: time.time() by which it must have finished. metrics: what is told of its tokens and its end.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    deadline: float | None = None
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class Delta:
    """What a sequence gained. Counts are tokens; ``num_tokens`` is the total output so far.

    finish_reason: None while it runs, "stop" or "length" in the last one. stop_reason: the stop string or stop token
    id that ended it.
    """

    text: str
    token_ids: list[int]
    num_tokens: int
    num_cached_tokens: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Completion:
    """A finished sequence. Counts are tokens."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Join a delta to what is there."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.num_cached_tokens = delta.num_cached_tokens
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


def plan_jobs(
    request_id: str,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    info: EngineInfo,
    *,
    param: str = "prompt",
    cache_salt: str = "",
    priority: int = 0,
    deadline: float | None = None,
) -> list[Job]:
    """One job for each prompt and choice, in the order prompt * n + choice; choice i is sampled with seed + i.

    All are checked before any is returned. Raises what ``resolve_request`` raises.
    """
    jobs: list[Job] = []
    num_choices = sampling.n
    if num_choices > 1 or sampling.top_k > info.vocab_size:
        # top_k above the vocabulary keeps every token, and must fit the wire's 64 bits.
        sampling = sampling.with_changes(n=1, top_k=min(sampling.top_k, info.vocab_size))
    for prompt in prompts:
        resolved = resolve_request(prompt, sampling, info, param=param)
        assert resolved.seed is not None
        for i in range(num_choices):
            choice = resolved if i == 0 else resolved.with_changes(seed=(resolved.seed + i) & MAX_SEED)
            jobs.append(Job(f"{request_id}-{len(jobs)}", prompt, choice, cache_salt, priority, deadline))
    return jobs


async def generate_text(
    engine: EngineClient, tokenizer: Tokenizer, job: Job, *, pace: Pace = EVERY_STEP
) -> AsyncGenerator[Delta, None]:
    """Yield the text of one job as it grows; the last delta has a finish_reason.

    Tokens are joined in a delta as ``pace`` says, but the first and the last are never held back. Closing the
    generator aborts the job. Raises EngineNotReadyError, or EngineError when the engine could not finish it.
    """
    sampling = job.sampling
    detokenizer = IncrementalDetokenizer(
        tokenizer,
        job.prompt_token_ids,
        skip_special_tokens=sampling.skip_special_tokens,
        stop=sampling.stop_strings,
        min_tokens=sampling.min_tokens,
    )
    must_look = bool(sampling.stop_strings)  # at every step, or a stop string would be found late
    metrics, outcome = job.metrics, "abort"
    text = ""  # since the last delta
    token_ids: list[int] = []  # since the last delta
    unread: list[int] = []  # not yet detokenized
    num_tokens = num_deltas = 0
    sent_at = 0.0
    stream = engine.generate(
        job.request_id,
        job.prompt_token_ids,
        sampling,
        cache_salt=job.cache_salt,
        priority=job.priority,
        deadline=job.deadline,
        pace=EVERY_STEP if must_look else pace,
    )
    try:
        async with aclosing(cast(AsyncGenerator[OutputItem, None], stream)) as items:
            async for item in items:
                new, reason = item.new_token_ids, item.finish_reason
                if reason is not None and reason not in ("stop", "length"):
                    raise EngineError(item.error or f"The engine ended the request: {reason}.")
                if metrics is not None and new:
                    if num_tokens:
                        metrics.tokens(time.monotonic(), len(new))
                    else:
                        metrics.first(time.monotonic(), item.scheduled_at, len(new), item.num_cached_tokens)
                num_tokens += len(new)
                token_ids += new
                # The token that ended a sequence (end of sequence, stop token) counts but is no text.
                unread += new[:-1] if reason == "stop" else new
                due = reason is not None or not num_deltas or len(token_ids) >= pace.tokens
                if must_look and due and reason is None and num_deltas:
                    due = pace.is_due(len(token_ids), sent_at)  # else the client has seen to that
                if due or must_look:
                    text += detokenizer.push(unread)
                    unread = []
                    if detokenizer.stop_reason is not None:
                        break
                if reason is not None:
                    text += detokenizer.finish()
                    if detokenizer.stop_reason is not None:
                        break
                    outcome = reason
                    yield Delta(text, token_ids, num_tokens, item.num_cached_tokens, reason, item.stop_reason)
                    return
                if due:
                    num_deltas, sent_at = num_deltas + 1, time.monotonic()
                    yield Delta(text, token_ids, num_tokens, item.num_cached_tokens)
                    text, token_ids = "", []
            else:
                raise EngineError("The engine ended the request without a reason.")
        outcome = "stop"
        surplus = num_tokens - detokenizer.num_tokens_used
        token_ids = token_ids[: len(token_ids) - surplus]
        yield Delta(text, token_ids, num_tokens - surplus, item.num_cached_tokens, "stop", detokenizer.stop_reason)
    except Exception:
        outcome = "error"
        raise
    finally:
        if metrics is not None:
            metrics.finish(time.monotonic(), outcome)


async def follow(
    streams: Sequence[AsyncGenerator[Delta, None]], handle: Callable[[int, Delta], Awaitable[None]]
) -> None:
    """Run streams at once; calls ``handle(index of the stream, delta)`` as they come. A failure of one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                await handle(0, delta)
        return
    async with aclosing(_side_by_side(streams)) as deltas:
        async for index, delta in deltas:
            await handle(index, delta)


async def _side_by_side(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index of the stream, delta) of several streams as they come."""
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except Exception as exc:
            queue.put_nowait((index, exc))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, event = await queue.get()
            if isinstance(event, Delta):
                yield index, event
            elif event is not None:
                raise event
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def complete(engine: EngineClient, tokenizer: Tokenizer, jobs: Sequence[Job]) -> list[Completion]:
    """Run jobs side by side to their end; completions in the order of the jobs. A failure of one ends all."""
    completions = [Completion() for _ in jobs]

    async def add(index: int, delta: Delta) -> None:
        completions[index].add(delta)

    await follow([generate_text(engine, tokenizer, job, pace=WHOLE_ANSWER) for job in jobs], add)
    return completions
