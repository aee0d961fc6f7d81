"""What a request meets first: the guards of middleware.py, then OpenAI's two hot routes, then everything else.

BentoML puts a task, a timer that lives for the whole of ``traffic.timeout``, a context and two more layers around every
request, FastAPI as many again: more than a short answer costs by itself. ``Front`` is added to the service as an
ordinary ASGI middleware. When the server starts, BentoML's application is told to it by ASGI's lifespan scope, and it
moves itself before that application's other layers; all but the hot routes goes through them as ever. If it cannot, or
if BentoML's instruments are asked for (ServiceConfig.bentoml_instruments), it stays where BentoML has put it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm_bento import log_format
from nanovllm_bento.serving.errors import CLIENT_LEFT
from nanovllm_bento.serving.exchange import UNTOLD_PATHS, Exchange, current_exchange
from nanovllm_bento.serving.middleware import Middleware
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints

logger = logging.getLogger(__name__)

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class HotRoutes:
    """Answers the two hot routes itself. Every other answer gets an X-Request-ID here, and is told of at its end.

    metrics: more text for the application's own answer at /metrics; None leaves it alone.
    """

    def __init__(self, app: ASGIApp, endpoints: OpenAIEndpoints, metrics: Callable[[], bytes] | None = None) -> None:
        self.app = app
        self.context = endpoints.context
        self.metrics = metrics
        self.routes: dict[str, Handler] = {
            "/v1/chat/completions": endpoints.chat,
            "/v1/completions": endpoints.completions,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        handler = self.routes.get(scope["path"])
        if handler is not None and scope["method"] == "POST":
            await handler(scope, receive, send)
            return
        if self.metrics is not None and scope["path"] == "/metrics" and scope["method"] == "GET":
            send = _with_more(send, self.metrics())
        exchange, started = Exchange.of(scope), False
        header = (b"x-request-id", exchange.request_id.encode())

        async def observed_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, exchange.status = True, message["status"]
                headers = list(message.get("headers", ()))
                if all(name.lower() != header[0] for name, _ in headers):
                    message = {**message, "headers": [*headers, header]}
            await send(message)

        log_format.request_id.set(exchange.request_id)
        token = current_exchange.set(exchange)
        try:
            await self.app(scope, receive, observed_send)
        except BaseException as exc:
            if not started:  # the server makes a 500 of it
                exchange.status = CLIENT_LEFT if isinstance(exc, asyncio.CancelledError) else 500
            raise
        finally:
            current_exchange.reset(token)
            if scope["path"] not in UNTOLD_PATHS:
                self.context.ended(exchange)


def _with_more(send: Send, more: bytes) -> Send:
    """Appends ``more`` to the body of an answer."""

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(n, v) for n, v in message["headers"] if n.lower() != b"content-length"]
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + more}
        await send(message)

    return send_more


class Front:
    """The middleware of the BentoML service. in_front: move before BentoML's own layers. guards: outermost first."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: OpenAIEndpoints,
        guards: Sequence[Middleware] = (),
        in_front: bool = True,
        metrics: Callable[[], bytes] | None = None,
    ) -> None:
        self.endpoints, self.guards, self.in_front, self.metrics = endpoints, guards, in_front, metrics
        self.inner = app
        self.app = self._before(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and self.in_front:
            self._move(scope.get("app"))
        await self.app(scope, receive, send)

    def _before(self, app: ASGIApp) -> ASGIApp:
        app = HotRoutes(app, self.endpoints, self.metrics)
        for guard, options in reversed(self.guards):
            app = guard(app, **options)
        return app

    def _move(self, outer: object) -> None:
        if not isinstance(outer, Starlette) or outer.middleware_stack is None:
            logger.warning("BentoML's application is not what it was: requests go through all of its layers")
            return
        outer.middleware_stack = self._before(outer.middleware_stack)
        self.app = self.inner
