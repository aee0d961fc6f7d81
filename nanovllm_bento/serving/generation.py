"""From prompt token ids to text, one sequence or many side by side. Knows no HTTP and no protocol's objects.

Stop strings are found here: the text ends before the string, the engine's request is aborted at once, and counts go
to the token that completed the match.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from nanovllm_bento.engine.client import EVERY_STEP, EngineClient, OutputBuffer, Pace
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


Handler = Callable[[int, Delta], asyncio.Future[None] | None]
"""Takes a delta of the job with an index. Where it returns a future it is not called again before that is done."""


async def run_jobs(
    engine: EngineClient, tokenizer: Tokenizer, jobs: Sequence[Job], handle: Handler, *, pace: Pace = EVERY_STEP
) -> None:
    """Run jobs side by side to their end; ``handle`` is told of their texts as they grow.

    It is called right out of the engine's client, one call for all tokens that are due: no task is woken before the
    end. Tokens are joined in a delta as ``pace`` says, but a job's first and last are never held back; its last delta
    has a finish_reason. A failure of one job, of ``handle`` or of its future ends all and is raised. Cancelling aborts
    what still runs. Raises EngineNotReadyError, or EngineError when the engine could not finish a job.
    """
    group = _Group(handle, len(jobs))
    try:
        for index, job in enumerate(jobs):
            group.runs.append(_Run(group, index, tokenizer, job, pace))
        for run in group.runs:
            run.start(engine)
        await group.done
    finally:
        group.close()


class _Group:
    """The jobs of one request, which end together."""

    __slots__ = ("_busy", "_failure", "_handle", "_num_running", "done", "is_free", "runs")

    def __init__(self, handle: Handler, num_jobs: int) -> None:
        self._handle = handle
        self._num_running = num_jobs
        self._failure: Exception | None = None
        self._busy: asyncio.Future[None] | None = None
        self.is_free = True
        """Whether the handler may be called."""
        self.runs: list[_Run] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def hand_on(self, index: int, delta: Delta) -> None:
        """Call the handler; to be done if it ``is_free``."""
        try:
            busy = self._handle(index, delta)
        except Exception as exc:
            self.fail(exc)
            return
        if delta.finish_reason is not None:
            self._num_running -= 1
        if busy is not None:
            self._busy, self.is_free = busy, False
            busy.add_done_callback(self._go_on)
        elif not self._num_running:
            self._settle()

    def fail(self, why: Exception) -> None:
        """End all, once the handler is done with what it has."""
        self._failure = self._failure or why
        if self._busy is None:
            self._settle()

    def close(self) -> None:
        """Abort what still runs."""
        for run in self.runs:
            run.close()
        self.runs.clear()  # they know each other, and would wait for the garbage collector
        if self._busy is not None:
            self._busy.cancel()
        if self.done.done() and not self.done.cancelled():
            self.done.exception()  # or it would be logged as never seen, where the task was cancelled meanwhile

    def _go_on(self, busy: "asyncio.Future[None]") -> None:
        if busy.cancelled():
            self.done.cancel()
            return
        self._busy, self.is_free = None, True
        why = cast(Exception | None, busy.exception()) or self._failure
        if why is not None:
            self.fail(why)
        elif not self._num_running:
            self._settle()
        else:
            for run in self.runs:
                run.look()

    def _settle(self) -> None:
        self.is_free = False
        if self.done.done():
            return
        if self._failure is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self._failure)


class _Run:
    """One job: takes what the engine gives as soon as it is due, and makes text of it."""

    __slots__ = (
        "_detokenizer",
        "_group",
        "_index",
        "_job",
        "_must_look",
        "_num_deltas",
        "_num_tokens",
        "_outcome",
        "_output",
        "_pace",
        "_sent_at",
        "_text",
        "_token_ids",
    )

    def __init__(self, group: _Group, index: int, tokenizer: Tokenizer, job: Job, pace: Pace) -> None:
        self._group, self._index, self._job, self._pace = group, index, job, pace
        sampling = job.sampling
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            job.prompt_token_ids,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop_strings,
            min_tokens=sampling.min_tokens,
        )
        self._must_look = bool(sampling.stop_strings)  # at every step, or a stop string would be found late
        self._output: OutputBuffer | None = None
        self._outcome = "abort"
        self._text = ""  # since the last delta
        self._token_ids: list[int] = []  # since the last delta
        self._num_tokens = self._num_deltas = 0
        self._sent_at = 0.0

    def start(self, engine: EngineClient) -> None:
        """Hand the job to the engine. Raises EngineNotReadyError."""
        job = self._job
        try:
            self._output = engine.submit(
                job.request_id,
                job.prompt_token_ids,
                job.sampling,
                self.look,
                cache_salt=job.cache_salt,
                priority=job.priority,
                deadline=job.deadline,
                pace=EVERY_STEP if self._must_look else self._pace,
            )
        except Exception:
            self._outcome = "error"
            raise

    def look(self) -> None:
        """Hand on what is due, as long as the handler takes it."""
        group, output = self._group, self._output
        try:
            while group.is_free and output is not None and output.is_due:
                delta = self._delta(output, output.take())
                if delta is not None:
                    group.hand_on(self._index, delta)
        except Exception as exc:
            self._outcome = "error"
            group.fail(exc)

    def close(self) -> None:
        """Abort the job if it has not ended."""
        output, self._output = self._output, None
        if output is not None:
            output.close()
        self._finish(self._outcome)

    def _delta(self, output: OutputBuffer, item: OutputItem) -> Delta | None:
        """What the text gains by the tokens of ``item``, if it is time to tell."""
        new, reason, stop_reason = item.new_token_ids, item.finish_reason, None
        metrics = self._job.metrics
        if metrics is not None and new:
            if self._num_tokens:
                metrics.tokens(time.monotonic(), len(new))
            else:
                metrics.first(time.monotonic(), item.scheduled_at, len(new), item.num_cached_tokens)
        self._num_tokens += len(new)
        if reason is None:
            text = self._detokenizer.push(new)
        elif reason in ("stop", "length"):
            stop_reason = item.stop_reason
            # The token that ended a sequence (end of sequence, stop token) counts but is no text.
            text = self._detokenizer.push(new[:-1] if reason == "stop" else new) + self._detokenizer.finish()
        else:
            raise EngineError(item.error or f"The engine ended the request: {reason}.")
        if self._must_look:
            self._text = text = self._text + text
            self._token_ids = new = self._token_ids + new
            if self._detokenizer.stop_reason is not None:
                return self._stopped(output, item)
            if reason is None and self._num_deltas and not self._pace.is_due(len(new), self._sent_at):
                return None
            self._text, self._token_ids, self._sent_at = "", [], time.monotonic()
        self._num_deltas += 1
        if reason is not None:
            self._finish(reason)
        return Delta(text, new, self._num_tokens, item.num_cached_tokens, reason, stop_reason)

    def _stopped(self, output: OutputBuffer, item: OutputItem) -> Delta:
        """The last delta of a text that has ended before what the engine has made."""
        output.close()
        self._finish("stop")
        surplus = self._num_tokens - self._detokenizer.num_tokens_used
        token_ids = self._token_ids[: len(self._token_ids) - surplus]
        stop = self._detokenizer.stop_reason
        return Delta(self._text, token_ids, self._num_tokens - surplus, item.num_cached_tokens, "stop", stop)

    def _finish(self, outcome: str) -> None:
        self._outcome = outcome
        if self._job.metrics is not None:
            self._job.metrics.finish(time.monotonic(), outcome)


async def complete(engine: EngineClient, tokenizer: Tokenizer, jobs: Sequence[Job]) -> list[Completion]:
    """Run jobs side by side to their end; completions in the order of the jobs. A failure of one ends all."""
    completions = [Completion() for _ in jobs]
    await run_jobs(engine, tokenizer, jobs, lambda index, delta: completions[index].add(delta), pace=WHOLE_ANSWER)
    return completions
