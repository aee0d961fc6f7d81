"""One HTTP request in numbers, from the sequences that ran for it: what the access log and the traces say of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm_bento.serving.metrics import RequestMetrics


@dataclass(slots=True)
class RequestSummary:
    """Times in seconds, None where it did not come so far; of several sequences the first token's is the earliest,
    the others are the longest. Prompt tokens count once a prompt, whatever the number of its choices.
    """

    num_sequences: int
    n: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    finish_reasons: list[str]
    time_to_first_token: float | None
    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    inference_seconds: float | None


def summarize(sequences: Sequence[RequestMetrics]) -> RequestSummary:
    """``sequences``: all that were begun for the request; none if it was refused."""
    begun = [s for s in sequences if s.first_at]
    prompts = [s for s in sequences if s.n]
    return RequestSummary(
        num_sequences=len(sequences),
        n=max((s.n for s in sequences), default=0),
        num_prompt_tokens=sum(s.num_prompt_tokens for s in prompts),
        num_cached_tokens=sum(s.num_cached_tokens for s in prompts),
        num_generation_tokens=sum(s.num_tokens for s in sequences),
        finish_reasons=[s.finish_reason or "abort" for s in sequences],
        time_to_first_token=min((s.first_at - s.arrived for s in begun), default=None),
        queue_seconds=max((s.queue_seconds for s in begun), default=None),
        prefill_seconds=max((s.prefill_seconds for s in begun), default=None),
        decode_seconds=max((s.decode_seconds for s in begun), default=None),
        inference_seconds=max((s.last_at - s.scheduled_at for s in begun), default=None),
    )
