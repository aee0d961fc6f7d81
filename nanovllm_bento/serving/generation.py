"""From prompt token ids to text, one sequence or many side by side. Knows no HTTP and no protocol's objects.

Stop strings are found here: the text ends before the string, the engine's request is aborted at once, and counts go
to the token that completed the match.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from nanovllm_bento.engine.client import EngineClient
from nanovllm_bento.engine.messages import EngineInfo, OutputItem
from nanovllm_bento.engine.request import resolve_request
from nanovllm_bento.errors import EngineError
from nanovllm_bento.sampling_params import MAX_SEED, SamplingParams
from nanovllm_bento.text.detokenizer import IncrementalDetokenizer
from nanovllm_bento.text.tokenizer import Tokenizer

WHOLE_ANSWER_INTERVAL = 16
"""Steps joined where nobody reads along: fewer, larger detokenizer calls, none of them long."""


@dataclass(slots=True)
class Job:
    """One sequence to generate; ``sampling`` is resolved and has n=1."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0


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
            jobs.append(Job(f"{request_id}-{len(jobs)}", prompt, choice, cache_salt, priority))
    return jobs


async def generate_text(
    engine: EngineClient, tokenizer: Tokenizer, job: Job, *, stream_interval: int = 1
) -> AsyncGenerator[Delta, None]:
    """Yield the text of one job as it grows; the last delta has a finish_reason.

    ``stream_interval`` steps are joined in a delta, but the first and the last are never held back. Closing the
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
    text = ""  # since the last delta
    token_ids: list[int] = []  # since the last delta
    unread: list[int] = []  # not yet detokenized
    num_tokens = step = 0
    stream = engine.generate(
        job.request_id, job.prompt_token_ids, sampling, cache_salt=job.cache_salt, priority=job.priority
    )
    async with aclosing(cast(AsyncGenerator[OutputItem, None], stream)) as items:
        async for item in items:
            finished = item.finish_reason is not None
            if finished and item.finish_reason not in ("stop", "length"):
                raise EngineError(item.error or f"The engine ended the request: {item.finish_reason}.")
            new = item.new_token_ids
            num_tokens += len(new)
            token_ids += new
            # The token that ended a sequence (end of sequence, stop token) counts but is no text.
            unread += new[:-1] if item.finish_reason == "stop" else new
            due = finished or step % stream_interval == 0
            step += 1
            if due or must_look:
                text += detokenizer.push(unread)
                unread = []
                if detokenizer.stop_reason is not None:
                    break
            if finished:
                text += detokenizer.finish()
                if detokenizer.stop_reason is not None:
                    break
                yield Delta(text, token_ids, num_tokens, item.num_cached_tokens, item.finish_reason, item.stop_reason)
                return
            if due:
                yield Delta(text, token_ids, num_tokens, item.num_cached_tokens)
                text, token_ids = "", []
        else:
            raise EngineError("The engine ended the request without a reason.")
    surplus = num_tokens - detokenizer.num_tokens_used
    token_ids = token_ids[: len(token_ids) - surplus]
    yield Delta(text, token_ids, num_tokens - surplus, item.num_cached_tokens, "stop", detokenizer.stop_reason)


async def side_by_side(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Run several streams at once; yields (index of the stream, delta) as they come. A failure of one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
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
    streams = [generate_text(engine, tokenizer, job, stream_interval=WHOLE_ANSWER_INTERVAL) for job in jobs]
    async with aclosing(side_by_side(streams)) as deltas:
        async for index, delta in deltas:
            completions[index].add(delta)
    return completions
