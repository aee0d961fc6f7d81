"""How a failure is told to an HTTP client: OpenAI's error object, with status and headers.

Not responsible for deciding what is wrong: that is where the named errors of ``nanovllm_bento.errors`` are raised.
"""

import logging
import math
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanovllm_bento.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineNotReadyError,
    InvalidRequestError,
    NanoVLLMError,
    ShuttingDownError,
)

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
CLIENT_LEFT = 499
"""The status in logs of a request whose client left before its answer began."""


class OverloadedError(NanoVLLMError):
    """More is open, or was asked for lately, than the limits allow (HTTP 429). retry_after: seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(NanoVLLMError):
    """The service is shutting down and takes no new requests (HTTP 503)."""


class ClientDisconnectedError(NanoVLLMError):
    """The client left before its answer was ready."""

    def __init__(self) -> None:
        super().__init__("The client left before its answer was ready.")


def error_object(exc: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """The HTTP status, the body ``{"error": {message, type, param, code}}`` and extra headers for an error."""
    status, message, kind, param, code, headers = 500, str(exc), "server_error", None, None, {}
    match exc:
        case InvalidRequestError():
            status, message, kind, param, code = exc.status_code, exc.message, INVALID_REQUEST, exc.param, exc.code
        case OverloadedError():
            seconds = max(1, math.ceil(exc.retry_after))
            status, kind, code, headers = 429, "rate_limit_error", "rate_limit_exceeded", {"Retry-After": str(seconds)}
        case DrainingError() | ShuttingDownError():
            status, kind, code, headers = 503, "service_unavailable", "shutting_down", {"Retry-After": "5"}
        case EngineNotReadyError():
            status, kind, code, headers = 503, "service_unavailable", "engine_not_ready", {"Retry-After": "1"}
        case HTTPException():
            status, message, headers = exc.status_code, exc.detail, dict(exc.headers or {})
            kind = INVALID_REQUEST if status < 500 else "server_error"
            code = {404: "not_found", 405: "method_not_allowed"}.get(status)
        case DeadlineExceededError():
            status, kind, code = 504, "timeout_error", "deadline_exceeded"
        case ClientDisconnectedError():
            status, kind, code = CLIENT_LEFT, "client_error", "client_left"
        case EngineDeadError():
            code = "engine_dead"
        case NanoVLLMError():
            code = "engine_error"
        case _:
            logger.error("a request failed for an unforeseen reason", exc_info=exc)
            message, code = "Internal error; the server's log says more.", "internal_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def error_response(exc: Exception) -> Response:
    """The whole HTTP answer for an error."""
    status, body, headers = error_object(exc)
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


def error_event(exc: Exception) -> bytes:
    """The server-sent event that says a running stream failed."""
    return b"data: " + msgspec.json.encode(error_object(exc)[1]) + b"\n\n"


def invalid_body(exc: ValidationError) -> InvalidRequestError:
    """The first fault that pydantic found in a body, as an error that names the field."""
    first = exc.errors(include_url=False, include_context=True)[0]
    param = _path(first["loc"]) or None
    what, message = first["type"], first["msg"]
    if what == "json_invalid":
        reason = message.removeprefix("Invalid JSON: ")
        return InvalidRequestError(f"The body is not valid JSON: {reason}.", code="invalid_json")
    if what == "extra_forbidden":
        return InvalidRequestError(f"Unknown field {param!r}.", param=param, code="unknown_parameter")
    if what == "missing":
        return InvalidRequestError(f"Missing required field {param!r}.", param=param, code="missing_required_parameter")
    if what == "unsupported_parameter":
        return InvalidRequestError(f"{param}: {message}", param=param, code="unsupported_parameter")
    where = f"{param}: " if param else "The body must be a JSON object: "
    return InvalidRequestError(f"{where}{message}.", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") as "messages[0].content"."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
