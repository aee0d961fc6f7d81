"""What stands before every route, BentoML's own included: pure ASGI middlewares, none of which looks into a body.

``middlewares(config)`` says which ones the settings ask for, outermost first. RequestGuard is always there; it costs a
few microseconds. Refusals have OpenAI's shape.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import InvalidRequestError, NanoVLLMError
from nanovllm_bento.serving.auth import SCOPE_KEY, KeyStore, current_caller
from nanovllm_bento.serving.errors import OverloadedError, error_object
from nanovllm_bento.serving.exchange import REFUSED, Exchange

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
MAX_URL_BYTES = 16 * 1024
LARGE_BODY = 64 * 1024
"""Bytes. A body that is announced as larger, or comes in chunks, is watched as it comes; the server reads about as many
ahead of any request anyway."""
NUM_LARGE_BODIES = 8
"""Bodies that are still coming may have sent so many times max_body_bytes, all together in a worker."""
STALL_SECONDS = 30.0
"""A large body of which nothing comes for so long is given up."""
LINGER_SECONDS = 5.0
LINGER_BYTES = 64 * 2**20
"""What is still read of a refused request's body, for most clients send it whole before they look for an answer: a
connection that is closed with unread bytes in it is reset, and the answer lost."""

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


OnRefusal = Callable[[Exchange], None]


def _tell_nobody(exchange: Exchange) -> None:
    pass


class RequestGuard:
    """Refuses requests that no handler should see: too long a body, URL or header list, no JSON, another site's page.

    A small body of known length is left alone, for the server reads no more than that; others are watched as they come.
    on_refusal: is told of what was refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        allow_origins: frozenset[str] = frozenset(),
        on_refusal: OnRefusal = _tell_nobody,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.allow_origins = frozenset(origin.encode("latin-1") for origin in allow_origins)
        self.on_refusal = on_refusal
        self.num_held = 0
        """Bytes that large bodies which are still coming hold."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            try:
                is_large = self._check(scope)
            except InvalidRequestError as exc:
                await _refuse(exc, scope, receive, send, self.on_refusal)
                return
            if is_large:
                await self._watched(scope, receive, send)
                return
        elif kind == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> bool:
        """Whether the body must be watched as it comes. Raises what the request is refused with."""
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
        return is_chunked or (length is not None and int(length) > LARGE_BODY)

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

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with an eye on the body; what it is refused with is the answer, whatever the application makes of it.

        It may be too long, come while too much of others is still coming (429), or not come any further (408).
        """
        size, is_coming, started = 0, True, False
        refusal: NanoVLLMError | None = None

        async def watched_receive() -> Message:
            nonlocal size, is_coming, refusal
            if refusal is not None:
                raise refusal
            if not is_coming:
                return await receive()
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    message = await receive()
                body = message.get("body", b"")
                is_coming = message.get("more_body", False)
                size += len(body)
                self.num_held += len(body)
                self._check_size(size)
            except TimeoutError:
                refusal = _RefusedError(408, f"Nothing of the body came for {STALL_SECONDS:g} s.", "body_timeout")
            except (BodyTooLargeError, OverloadedError) as exc:
                refusal = exc
            if not is_coming or refusal is not None:
                let_go()
            if refusal is not None:
                scope[REFUSED] = True
                raise refusal
            return message

        def let_go() -> None:
            nonlocal size
            self.num_held -= size
            size = 0

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if refusal is not None and not started:
                return  # the application's own words for it
            started = True
            await send(message)

        try:
            await self.app(scope, watched_receive, guarded_send)
        except Exception:
            if refusal is None or started:
                raise
        finally:
            let_go()
        if refusal is not None and not started:
            refusal.__traceback__ = None  # its frames hold what has come of the body
            await _refuse(refusal, scope, receive, send, self.on_refusal)

    def _check_size(self, size: int) -> None:
        """Raises what a body is refused with of which so many bytes have come."""
        if size > self.max_body_bytes:
            raise self._too_large()
        if self.num_held > NUM_LARGE_BODIES * self.max_body_bytes:
            raise OverloadedError("Too many large bodies are being sent here. Try again later.")


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

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyStore,
        open_paths: frozenset[str] = frozenset(),
        on_refusal: OnRefusal = _tell_nobody,
    ) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = open_paths
        self.on_refusal = on_refusal

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
            await self._unauthorized(bool(sent), scope, receive, send)
            return
        scope[SCOPE_KEY] = caller
        token = current_caller.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            current_caller.reset(token)

    async def _unauthorized(self, sent: bool, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        message = "Incorrect API key provided." if sent else "You didn't provide an API key."
        exc = _RefusedError(401, f"{message} Send it as Authorization: Bearer KEY.", "invalid_api_key")
        challenge = b'Bearer realm="nanovllm", error="invalid_token"' if sent else b'Bearer realm="nanovllm"'
        await _refuse(exc, scope, receive, send, self.on_refusal, (b"www-authenticate", challenge))


async def _refuse(
    exc: NanoVLLMError,
    scope: Scope,
    receive: Receive,
    send: Send,
    on_refusal: OnRefusal,
    header: tuple[bytes, bytes] | None = None,
) -> None:
    """Answer; and close the connection, unless there is another header, so that no body has to come to its end."""
    exchange = Exchange.of(scope)
    exchange.status, answer, more = error_object(exc)
    exchange.error = answer["error"]["code"]
    body = msgspec.json.encode(answer)
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in more.items()]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", exchange.request_id.encode()),
        header or (b"connection", b"close"),
    ]
    try:
        await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": header is None})
        if header is None:
            await _linger(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        on_refusal(exchange)


async def _linger(receive: Receive) -> None:
    """Read on for a while, and forget it: see LINGER_SECONDS."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while num_bytes < LINGER_BYTES:
                message = await receive()
                if not message.get("more_body", False):  # neither has a disconnect
                    return
                num_bytes += len(message.get("body", b""))


Middleware = tuple[Callable[..., Callable[[Scope, Receive, Send], Awaitable[None]]], MutableMapping[str, Any]]


def middlewares(config: ServiceConfig, on_refusal: OnRefusal = _tell_nobody) -> list[Middleware]:
    """Classes and their options, outermost first, as BentoML's ``add_asgi_middleware`` takes them.

    on_refusal: is told of each request that they refuse. Raises ConfigError for keys that cannot be read.
    """
    origins = frozenset(names(config.cors_allow_origins))
    found: list[Middleware] = []
    if origins:
        options = {"allow_origins": sorted(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        found.append((CORSMiddleware, {**options, "expose_headers": ["X-Request-ID", "Retry-After"]}))
    told = {"on_refusal": on_refusal}
    found.append((RequestGuard, {"max_body_bytes": config.max_body_bytes, "allow_origins": origins, **told}))
    keys = KeyStore.of(config)
    if keys is not None:
        open_paths = frozenset(names(config.api_key_open_paths))
        found.append((Authentication, {"keys": keys, "open_paths": open_paths, **told}))
    return found


def protect(app: ASGIApp, config: ServiceConfig, on_refusal: OnRefusal = _tell_nobody) -> ASGIApp:
    """``app`` behind all of them, where no BentoML adds them."""
    for middleware, options in reversed(middlewares(config, on_refusal)):
        app = middleware(app, **options)
    return app


def names(text: str) -> list[str]:
    """What a setting lists, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
