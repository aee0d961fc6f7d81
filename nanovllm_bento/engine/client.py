"""How callers reach an engine from asyncio: the EngineClient protocol. serving depends on this alone."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, cast

from nanovllm_bento.engine.messages import EngineInfo, EngineStats, OutputItem
from nanovllm_bento.sampling_params import SamplingParams


class Pace:
    """How many new tokens are joined before the reader of a request is woken; may change while requests run.

    At least ``tokens``, and all that come within ``seconds`` of the last time. Tokens that come while a reader is busy
    are joined anyway. The first and the last are never held back.
    """

    __slots__ = ("seconds", "tokens")

    def __init__(self, tokens: int = 1, seconds: float = 0.0) -> None:
        self.tokens = tokens
        self.seconds = seconds

    def is_due(self, num_tokens: int, last: float) -> bool:
        """Whether ``num_tokens`` are to be held back no longer; last: time.monotonic() of the last time."""
        return num_tokens >= self.tokens and (not self.seconds or time.monotonic() - last >= self.seconds)


EVERY_STEP = Pace(1)


class OutputBuffer:
    """What came of one request and its reader has not taken yet: one item, however many steps it is of.

    on_due: called where something comes that the reader is to take, or did not take before. It must not raise. close:
    ends the request, in the engine too if it has not finished; may be called more than once.
    """

    __slots__ = ("_newest_at", "_put_at", "_was_read", "close", "failure", "on_due", "pace", "unread")

    def __init__(self, pace: Pace, on_due: Callable[[], None], close: Callable[[], None]) -> None:
        self.pace, self.on_due, self.close = pace, on_due, close
        self.unread: OutputItem | None = None
        self.failure: Exception | None = None
        self._was_read = False
        self._put_at = 0.0  # time.monotonic() when the newest of what was taken last had come
        self._newest_at = 0.0

    @property
    def is_due(self) -> bool:
        """Whether the reader has something to take."""
        item = self.unread
        if item is None:
            return self.failure is not None
        return (
            not self._was_read
            or self.pace.is_due(len(item.new_token_ids), self._put_at)
            or item.finish_reason is not None
            or self.failure is not None
        )

    def take(self) -> OutputItem:
        """What has come since the last time; to be called if ``is_due``. Raises the failure once all else is taken."""
        item = self.unread
        if item is None:
            assert self.failure is not None
            raise self.failure
        self.unread = None
        self._was_read, self._put_at = True, self._newest_at
        return item

    def put(self, item: OutputItem) -> None:
        """More has come."""
        if self.pace.seconds:
            self._newest_at = time.monotonic()
        self.unread = item if self.unread is None else _joined(self.unread, item)
        if self.is_due:
            self.on_due()

    def fail(self, why: Exception) -> None:
        """The last that the reader gets, after what has come before it."""
        self.failure = why
        self.on_due()

    async def read(self) -> AsyncIterator[OutputItem]:
        """All that comes, to the end, for a reader that waits for it; afterwards the request is closed."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] | None = None

        def wake() -> None:
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

        self.on_due = wake
        try:
            while True:
                if not self.is_due:
                    waiter = loop.create_future()
                    await waiter
                item = self.take()
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self.close()


def _joined(first: OutputItem, second: OutputItem) -> OutputItem:
    """``second`` with what ``first`` has before it."""
    token_ids = first.new_token_ids
    token_ids += second.new_token_ids  # in place: a reader that waits for the end costs no copy a step
    second.new_token_ids = token_ids
    second.scheduled_at = first.scheduled_at or second.scheduled_at
    if first.logprobs is not None:
        second.logprobs = first.logprobs + (second.logprobs or [])
    if first.is_greedy is not None:
        second.is_greedy = first.is_greedy + (second.is_greedy or [])
    return second


class EngineClient(Protocol):
    """One caller's view of an engine that may start late, die and be restarted."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""

    @property
    def is_up(self) -> bool:
        """Whether the engine serves, also before this client has heard from it. Reads a file: not for hot paths."""

    @property
    def is_responsive(self) -> bool:
        """Whether it is ready and has been heard of lately. A silent engine may be in a long step, or hang."""

    @property
    def failure(self) -> str | None:
        """Why no engine will come, once that is certain."""

    @property
    def folder(self) -> Path | None:
        """Once started: where the workers of the service share files. None: there is no such place."""

    @property
    def info(self) -> EngineInfo:
        """Limits of the engine. Raises EngineNotReadyError before it was ready for the first time."""

    @property
    def stats(self) -> EngineStats:
        """The engine's last known state."""

    async def start(self) -> None:
        """Begin to connect (and, where this client owns it, to start the engine). Returns before it is ready."""

    async def close(self) -> None:
        """Abort what is open and let go of the engine."""

    def abort_all(self, why: str) -> None:
        """End every open request with ShuttingDownError(why), here and in the engine."""

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        on_due: Callable[[], None],
        *,
        cache_salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        pace: Pace = EVERY_STEP,
        num_scored: int = 0,
    ) -> OutputBuffer:
        """Begin one request, whose output comes to the buffer; ``sampling`` is resolved (request.resolve_request).

        deadline: time.time() by which it must have finished. The last item has the finish_reason "stop" or "length".
        What is not read yet is kept as token ids, at most max_tokens of them. Closing the buffer before the end aborts
        the request in the engine, also before the first token. Raises EngineNotReadyError when the engine is not ready.
        The buffer's failure is EngineDeadError when the engine ended and the request could not be resumed,
        DeadlineExceededError, or EngineError for what else the engine could not finish.

        num_scored: nothing is generated; the only item has the log-probabilities of so many of the last tokens
        (engine.request.check_score).
        """


async def generate(
    engine: EngineClient, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams, **options: Any
) -> AsyncIterator[OutputItem]:
    """``engine.submit``, with its options, for a reader that waits for each item; failures are raised.

    The request begins with the first item that is asked for. Closing the iterator or cancelling its task aborts it.
    """
    output = engine.submit(request_id, prompt_token_ids, sampling, _do_nothing, **options)
    async with aclosing(cast(AsyncGenerator[OutputItem, None], output.read())) as items:
        async for item in items:
            yield item


def _do_nothing() -> None:
    """Until the reader is there."""
