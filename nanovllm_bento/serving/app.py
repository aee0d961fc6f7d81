"""The FastAPI application that service.py mounts: OpenAI's routes and /health. Its handlers are in openai/endpoints.py.

Bodies are read and checked by hand, so that every refusal has OpenAI's shape; the OpenAPI document is completed here.
"""

from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm_bento import __version__
from nanovllm_bento.errors import NanoVLLMError
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.errors import error_response
from nanovllm_bento.serving.metrics import CONTENT_TYPE
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints
from nanovllm_bento.serving.openai.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    CompletionRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    TextCompletion,
)

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is malformed, out of range or not supported."},
    401: {"model": ErrorAnswer, "description": "The API key is missing or not known."},
    403: {"model": ErrorAnswer, "description": "A web page of another origin asked."},
    404: {"model": ErrorAnswer, "description": "The model is not served here."},
    408: {"model": ErrorAnswer, "description": "Nothing more came of the body."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    415: {"model": ErrorAnswer, "description": "The body is not application/json."},
    429: {"model": ErrorAnswer, "description": "Too much is open or was asked for lately; see Retry-After."},
    500: {"model": ErrorAnswer, "description": "The engine failed."},
    503: {"model": ErrorAnswer, "description": "The engine is not ready, or the service is shutting down."},
    504: {"model": ErrorAnswer, "description": "The request's deadline has passed."},
}
_REF = "#/components/schemas/{model}"


class _Handled(Response):
    """Has a plain ASGI handler answer what FastAPI has routed; usually front.py takes the request before."""

    def __init__(self, handler: ASGIApp) -> None:
        super().__init__()
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(scope, receive, send)


def create_app(context: ServingContext, endpoints: OpenAIEndpoints | None = None) -> FastAPI:
    """The application over one worker's context, which may start later than the application."""
    app = FastAPI(title="nanovllm_bento", version=__version__, description="OpenAI's API for one language model.")
    endpoints = endpoints or OpenAIEndpoints(context)

    async def chat(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of events."""
        return _Handled(endpoints.chat)

    async def completions(request: Request) -> Response:
        """A continuation of each prompt, whole or as a stream of events."""
        return _Handled(endpoints.completions)

    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        summary="Answer a conversation",
        response_model=None,
        responses=_answers(ChatCompletion),
        openapi_extra=_takes(ChatCompletionRequest),
    )
    app.add_api_route(
        "/v1/completions",
        completions,
        methods=["POST"],
        summary="Continue one or several texts",
        response_model=None,
        responses=_answers(TextCompletion),
        openapi_extra=_takes(CompletionRequest),
    )

    @app.get("/v1/models", summary="The served model")
    async def models() -> ModelList:
        return ModelList(data=[endpoints.model_card()])

    @app.get("/v1/models/{name:path}", summary="One model by its name", responses={s: _ERRORS[s] for s in (400, 404)})
    async def model(name: str) -> ModelCard:
        return endpoints.model_card(name)

    @app.get("/health", summary="200 when requests are served", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        context.check_ready()
        return {"status": "ok"}

    @app.get("/metrics", summary="Metrics in Prometheus's text form", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(context.render_metrics(), media_type=CONTENT_TYPE)

    # BentoML serves the rest of the paths, so only /v1 has an answer of ours for what does not exist.
    @app.api_route("/v1/{path:path}", methods=_ALL_METHODS, include_in_schema=False)
    async def unknown(request: Request) -> Response:
        for route in app.routes:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                raise HTTPException(405, f"{request.method} is not allowed at {request.url.path}.")
        raise HTTPException(404, f"There is no {request.url.path} here.")

    async def on_error(request: Request, exc: Exception) -> Response:
        return error_response(exc)

    app.add_exception_handler(NanoVLLMError, on_error)
    app.add_exception_handler(HTTPException, on_error)
    _complete_openapi(app)
    return app


_ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    events = {"schema": {"type": "string", "description": "data: {chunk} events, then data: [DONE]"}}
    description = "The whole answer, or with stream=true server-sent events."
    return {200: {"model": model, "description": description, "content": {"text/event-stream": events}}, **_ERRORS}


def _complete_openapi(app: FastAPI) -> None:
    """Add the request bodies' schemas to the document that FastAPI makes of the routes."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            bodies: list[type[BaseModel]] = [ChatCompletionRequest, CompletionRequest]
            _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
            make().setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
