"""One HTTP request from its arrival to its end, as the metrics, the access log and the traces tell of it.

What tells of it is ServingContext.ended. The OpenAI routes make theirs themselves (openai/endpoints.py), all others
have it from front.py, and what is refused before any route from middleware.py.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import Scope

from nanovllm_bento.sampling_params import SamplingParams
from nanovllm_bento.serving.auth import Caller, caller_of
from nanovllm_bento.serving.logs import request_id_of
from nanovllm_bento.serving.metrics import RequestMetrics

BATCHED_PATHS = ("/generate_batch", "/score")
TRACED_PATHS = frozenset(("/v1/chat/completions", "/v1/completions", *BATCHED_PATHS))
UNTOLD_PATHS = frozenset(("/health", "/healthz", "/livez", "/readyz", "/metrics"))
"""Asked for every few seconds by what watches the service: what they answer is neither counted nor logged."""
REFUSED = "nanovllm.refused"
"""In an ASGI scope: a middleware refuses the request and tells of that itself, whatever the route makes of it."""


@dataclass(slots=True)
class Exchange:
    """One HTTP request and what became of it.

    request_id: of HTTP, for logs. arrived: time.monotonic(). status: errors.CLIENT_LEFT if the client left before the
    answer began. error: the error's code, also of one in mid-stream. sequences: what ran for it. sampling: their
    parameters. prompt: texts or messages, only where log_prompts is set.
    """

    scope: Scope
    request_id: str
    caller: Caller
    arrived: float = field(default_factory=time.monotonic)
    status: int = 200
    error: str | None = None
    sequences: list[RequestMetrics] = field(default_factory=list)
    sampling: SamplingParams | None = None
    prompt: object = None

    @classmethod
    def of(cls, scope: Scope) -> "Exchange":
        """That of an HTTP request which has just come."""
        return cls(scope, request_id_of(scope["headers"]), caller_of(scope))


current_exchange: ContextVar[Exchange | None] = ContextVar("current_exchange", default=None)
"""Of the request that this task serves; the OpenAI routes hand theirs on by themselves."""
