"""What BentoML costs without us: a mounted FastAPI application with fixed answers, everything optional off.

Measured beside the real service by benchmarks/http_cost.py: ``bentoml serve benchmarks.plain_service:Plain``.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator

import bentoml
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

WHOLE = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "The quick brown fox" * 5}}]})
EVENT = (
    b'data: {"id":"chatcmpl-0123456789","object":"chat.completion.chunk","choices":[{"delta":{"content":" fox"}}]}\n\n'
)
RATE = float(os.environ.get("NANOVLLM_FAKE_TOKENS_PER_SECOND") or 0)

app = FastAPI()


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    """A whole answer, or as many events as max_tokens says."""
    body = json.loads(await request.body())
    if not body["stream"]:
        return Response(WHOLE, media_type="application/json")

    async def events() -> AsyncIterator[bytes]:
        for _ in range(body["max_tokens"] if RATE else 1):
            await asyncio.sleep(1 / RATE if RATE else 0)
            yield EVENT
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@bentoml.service(
    traffic={"timeout": 1800},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(app, path="/")
class Plain:
    """Nothing but the mounted application."""
