"""What a finished (or running) request returns: vLLM's RequestOutput and CompletionOutput."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    finish_reason: None while it runs; "stop" (end of sequence, stop token or stop string) or "length".
    stop_reason: the stop string or stop token id that ended it; None at a plain end of sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds of time.monotonic()."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The outputs of one request. ``num_cached_tokens`` prompt tokens came from the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class ScoreOutput:
    """How likely a continuation is after its context.

    logprobs: natural logarithm of each continuation token's probability. is_greedy: whether that token was the most
    likely one. ``num_cached_tokens`` context tokens came from the prefix cache.
    """

    context_token_ids: list[int]
    continuation_token_ids: list[int]
    logprobs: list[float]
    is_greedy: list[bool]
    num_cached_tokens: int = 0

    @property
    def sum_logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)
