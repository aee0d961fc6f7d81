"""What stands before every route, BentoML's own included: pure ASGI middlewares, none of which looks into a body.

``middlewares(config)`` says which ones the settings ask for, outermost first. RequestGuard is always there; it costs a
few microseconds. Refusals have OpenAI's shape.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import InvalidRequestError
from nanovllm_bento.serving.auth import SCOPE_KEY, KeyStore, current_caller
from nanovllm_bento.serving.errors import error_response
from nanovllm_bento.serving.logs import request_id_of

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
MAX_URL_BYTES = 16 * 1024

_WATCHED = frozenset(
    (
        *(b"content-length", b"transfer-encoding", b"content-type", b"content-encoding"),
        *(b"origin", b"host", b"sec-fetch-site"),
    )
)
_ONCE = frozenset((b"content-length", b"content-type", b"origin", b"host"))
_WITH_BODY = frozenset(("POST", "PUT", "PATCH", "DELETE"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class BodyTooLargeError(InvalidRequestError):
    """The body is longer than ServiceConfig.max_body_bytes."""

    status_code = 413
    code = "request_too_large"


class _RefusedError(InvalidRequestError):
    """A request that is refused by its first lines alone."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message, code=code)
        self.status_code = status


class RequestGuard:
    """Refuses requests that no handler should see: too long a body, URL or header list, no JSON, another site's page.

    A body whose Content-Length is within the limit is left alone, for the server reads no more than that; one that
    comes in chunks is counted as it comes.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, allow_origins: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.allow_origins = frozenset(origin.encode("latin-1") for origin in allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            try:
                is_chunked = self._check(scope)
            except InvalidRequestError as exc:
                await _refuse(exc, scope, receive, send)
                return
            if is_chunked:
                await self._counted(scope, receive, send)
                return
        elif kind == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> bool:
        """Whether the body must be counted. Raises what the request is refused with."""
        headers = scope["headers"]
        path = scope["path"]
        if len(scope.get("raw_path") or path) + len(scope["query_string"]) > MAX_URL_BYTES:
            raise _RefusedError(414, f"The URL is longer than {MAX_URL_BYTES} bytes.", "url_too_long")
        if _CONTROL.search(path):
            raise _RefusedError(400, "The path holds control characters.", "invalid_url")
        watched: dict[bytes, bytes] = {}
        size = 0
        for name, value in headers:
            size += len(name) + len(value)
            if name in _WATCHED:
                if name in _ONCE and name in watched:
                    raise _RefusedError(400, f"The header {name.decode()} is given twice.", "invalid_header")
                watched[name] = value
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            limits = f"{MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes"
            raise _RefusedError(431, f"There are more than {limits} of them.", "headers_too_large")
        if b"origin" in watched:
            self._check_origin(watched)
        if scope["method"] in _WITH_BODY:
            _check_body_type(watched)
        is_chunked = b"transfer-encoding" in watched
        length = watched.get(b"content-length")
        if length is not None:
            if is_chunked or not length.isdigit():
                raise _RefusedError(400, "The body's length is not clear from its headers.", "invalid_header")
            if len(length) > 18 or int(length) > self.max_body_bytes:
                raise self._too_large()
        return is_chunked

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site may make a browser send requests, to localhost too; it is not to be served by that.

        Browsers say in Sec-Fetch-Site whether the page is this service's own, older ones only where it comes from.
        """
        origin = headers[b"origin"]
        if origin in self.allow_origins or b"*" in self.allow_origins:
            return
        site = headers.get(b"sec-fetch-site")
        is_own = site in (b"same-origin", b"none")
        if site is None:
            is_own = origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
        if not is_own:
            raise _RefusedError(
                403, "Pages of this origin may not call this service (cors_allow_origins).", "origin_not_allowed"
            )

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body is longer than {self.max_body_bytes} bytes (max_body_bytes).")

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the body counted; at the limit the answer is 413 whatever the application makes of it."""
        size = 0
        started = refused = False

        async def counting_receive() -> Message:
            nonlocal size, refused
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.max_body_bytes:
                    refused = True
                    raise self._too_large()
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if refused and not started:
                return  # the application's own words for it
            started = True
            await send(message)

        try:
            await self.app(scope, counting_receive, guarded_send)
        except Exception:
            if not refused or started:
                raise
        if refused and not started:
            await _refuse(self._too_large(), scope, receive, send)


def _check_body_type(headers: dict[bytes, bytes]) -> None:
    """JSON only: BentoML's routes would also take forms and pickles by their Content-Type."""
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        raise _RefusedError(415, "Compressed bodies are not taken.", "unsupported_content_encoding")
    kind = headers.get(b"content-type", b"")
    if kind == b"application/json" or not kind:
        return
    media_type = kind.partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise _RefusedError(415, "Content-Type must be application/json.", "unsupported_media_type")


class Authentication:
    """Lets a request pass with one of the configured keys, and tells who it is of in the scope (auth.caller_of)."""

    def __init__(self, app: ASGIApp, keys: KeyStore, open_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        caller = self.keys.find(key.strip()) if scheme.lower() == b"bearer" else None
        if caller is None:
            await _unauthorized(bool(sent), scope, receive, send)
            return
        scope[SCOPE_KEY] = caller
        token = current_caller.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            current_caller.reset(token)


async def _unauthorized(sent: bool, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    message = "Incorrect API key provided." if sent else "You didn't provide an API key."
    exc = _RefusedError(401, f"{message} Send it as Authorization: Bearer KEY.", "invalid_api_key")
    challenge = 'Bearer realm="nanovllm", error="invalid_token"' if sent else 'Bearer realm="nanovllm"'
    await _refuse(exc, scope, receive, send, {"WWW-Authenticate": challenge})


async def _refuse(
    exc: InvalidRequestError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    response = error_response(exc)
    response.headers["X-Request-ID"] = request_id_of(scope["headers"])
    if headers:
        response.headers.update(headers)
    else:
        response.headers["Connection"] = "close"  # a body that nobody reads is not to be sent to its end
    await response(scope, receive, send)


Middleware = tuple[Callable[..., Callable[[Scope, Receive, Send], Awaitable[None]]], MutableMapping[str, Any]]


def middlewares(config: ServiceConfig) -> list[Middleware]:
    """Classes and their options, outermost first, as BentoML's ``add_asgi_middleware`` takes them.

    Raises ConfigError for keys that cannot be read.
    """
    origins = frozenset(names(config.cors_allow_origins))
    found: list[Middleware] = []
    if origins:
        options = {"allow_origins": sorted(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        found.append((CORSMiddleware, {**options, "expose_headers": ["X-Request-ID", "Retry-After"]}))
    found.append((RequestGuard, {"max_body_bytes": config.max_body_bytes, "allow_origins": origins}))
    keys = KeyStore.of(config)
    if keys is not None:
        found.append((Authentication, {"keys": keys, "open_paths": frozenset(names(config.api_key_open_paths))}))
    return found


def protect(app: ASGIApp, config: ServiceConfig) -> ASGIApp:
    """``app`` behind all of them, where no BentoML adds them."""
    for middleware, options in reversed(middlewares(config)):
        app = middleware(app, **options)
    return app


def names(text: str) -> list[str]:
    """What a setting lists, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
