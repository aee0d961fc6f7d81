"""How callers reach an engine from asyncio: the EngineClient protocol. serving depends on this alone."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from nanovllm_bento.engine.messages import EngineInfo, EngineStats, OutputItem
from nanovllm_bento.sampling_params import SamplingParams


class EngineClient(Protocol):
    """One caller's view of an engine that may start late, die and be restarted."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""

    @property
    def failure(self) -> str | None:
        """Why no engine will come, once that is certain."""

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

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> AsyncIterator[OutputItem]:
        """Run one request; ``sampling`` is resolved (engine.request.resolve_request).

        Yields an item per step with new tokens; the last one has a finish_reason. Closing the iterator or cancelling
        its task aborts the request in the engine, also before the first token. Raises EngineNotReadyError when the
        engine is not ready, EngineDeadError when it ended and the request could not be resumed.
        """
