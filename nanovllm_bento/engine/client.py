"""How callers reach an engine from asyncio: the EngineClient protocol. serving depends on this alone."""

import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

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


class EngineClient(Protocol):
    """One caller's view of an engine that may start late, die and be restarted."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""

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

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        pace: Pace = EVERY_STEP,
        num_scored: int = 0,
    ) -> AsyncIterator[OutputItem]:
        """Run one request; ``sampling`` is resolved (engine.request.resolve_request).

        deadline: time.time() by which it must have finished. Yields what came since the item before, joined; the last
        one has a finish_reason. What is not read yet is kept as token ids, at most max_tokens of them. Closing the
        iterator or cancelling its task aborts the request in the engine, also before the first token. Raises
        EngineNotReadyError when the engine is not ready, EngineDeadError when it ended and the request could not be
        resumed, DeadlineExceededError, or EngineError for what else the engine could not finish.

        num_scored: nothing is generated; the only item has the log-probabilities of so many of the last tokens
        (engine.request.check_score).
        """
