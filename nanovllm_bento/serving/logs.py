"""Request ids that can be trusted in a log, and the line that says how a request went."""

import logging
import random
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.log_format import fields
from nanovllm_bento.serving.metrics import RequestMetrics
from nanovllm_bento.serving.summary import summarize

logger = logging.getLogger("nanovllm_bento.access")

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._:/@+=-]{1,128}")
"""No character that could end a line, a field or a header, and no more than a log wants to hold."""


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id of an HTTP request: its X-Request-ID if that is sane, else a new one. ``headers`` as in an ASGI scope.

    For logs, traces and the answer's header only: clients may repeat theirs, so the engine's ids must be our own.
    """
    for name, value in headers:
        if name == HEADER:
            return value.decode() if _SANE.fullmatch(value) else new_request_id()
    return new_request_id()


def new_request_id() -> str:
    """32 random hexadecimal digits."""
    return random_hex(16)


def random_hex(num_bytes: int) -> str:
    """For names that must differ but keep no secret: without a call of the system each time."""
    return f"{random.getrandbits(8 * num_bytes):0{2 * num_bytes}x}"


def skip_unwritten_lines() -> None:
    """Have uvicorn put no access line together for each request where no logger would write it. It does not look at
    the level itself, only whether there is a handler."""
    access = logging.getLogger("uvicorn.access")
    if not access.isEnabledFor(logging.INFO):
        access.handlers, access.propagate = [], False


class AccessLog:
    """One line for each request that ended, at level info, by logger ``nanovllm_bento.access``."""

    def __init__(self, *, prompts: bool = False) -> None:
        self.prompts = prompts

    @classmethod
    def create(cls, config: ServiceConfig) -> Self | None:
        """None where no access log is asked for."""
        return cls(prompts=config.log_prompts) if config.access_log else None

    def write(
        self,
        request_id: str,
        path: str,
        status: int,
        arrived: float,
        sequences: Sequence[RequestMetrics] = (),
        *,
        caller: str = "",
        error: str | None = None,
        prompt: object = None,
    ) -> None:
        """Log a request, once it has ended.

        status: the HTTP status; 499 if the client left before the answer began. arrived: time.monotonic() when it came.
        sequences: what ran for it. caller: name of its API key. error: the error's code, also of one in mid-stream.
        prompt: its text or messages, written only where log_prompts is set.
        """
        summary = summarize(sequences)
        line: dict[str, Any] = {"request_id": request_id, "path": path, "status": status}
        if caller:
            line["caller"] = caller
        if error is not None:
            line["error"] = error
        if sequences:
            line |= {
                "finish_reason": ",".join(summary.finish_reasons),
                "prompt_tokens": summary.num_prompt_tokens,
                "cached_tokens": summary.num_cached_tokens,
                "completion_tokens": summary.num_generation_tokens,
            }
        if summary.time_to_first_token is not None and summary.queue_seconds is not None:
            line["queue_seconds"] = round(summary.queue_seconds, 6)
            line["ttft_seconds"] = round(summary.time_to_first_token, 6)
        line["seconds"] = round(time.monotonic() - arrived, 6)
        if self.prompts and prompt is not None:
            line["prompt"] = prompt
        logger.info("request", extra=fields(**line))
