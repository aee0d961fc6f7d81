"""The BentoML service: ``bentoml serve service:NanoVLLM``. Settings come from NANOVLLM_* (nanovllm_bento/config.py).

The OpenAI API is a mounted FastAPI application, because each of its requests is a stream of its own in the engine.
BentoML's adaptive batching serves ``generate_batch`` and ``score``, where one answer for the whole batch is what the
caller wants.
"""

import os
from typing import Annotated, Any, cast

import bentoml
from pydantic import Field

from nanovllm_bento import log_format
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.process_client import ProcessEngineClient, prestart_engine
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.batch import (
    BatchGate,
    BatchItem,
    BatchResult,
    ScoreItem,
    ScoreResult,
    max_latency_ms,
    run_batch,
    run_scores,
)
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.front import Front
from nanovllm_bento.serving.lifetime import drain_on_sigterm, end_with, main_pid, name_main_process
from nanovllm_bento.serving.logs import skip_unwritten_lines
from nanovllm_bento.serving.main_process import guard
from nanovllm_bento.serving.middleware import middlewares
from nanovllm_bento.serving.openai.endpoints import OpenAIEndpoints
from nanovllm_bento.serving.private_logs import keep_bodies_out_of_logs
from nanovllm_bento.serving.resources import num_workers, service_resources

engine_config = EngineConfig.create()
config = ServiceConfig.create()
# Workers are children of the `bentoml serve` process; they and the engine live as long as that.
owner_pid = main_pid()
engine = ProcessEngineClient(engine_config, config, owner_pid=owner_pid)
context = ServingContext(engine, engine_config, config)
endpoints = OpenAIEndpoints(context)
app = create_app(context, endpoints)
guards = middlewares(config, context.refused)
# Together they cost 0.5 ms a request and 25 µs an event.
instruments = {
    "metrics": {"enabled": config.bentoml_instruments},
    "logging": {"access": {"enabled": config.bentoml_instruments}},
    "tracing": {} if config.bentoml_instruments else {"excluded_urls": ".*"},
}


@bentoml.service(
    name="nanovllm",
    workers=num_workers(config, engine_config),
    resources=service_resources(engine_config),
    # Bounds the time to the start of an answer, without stream to its end. BentoML keeps a timer for as long after each
    # request, so it is not for ever. The hot routes do not go through it (serving/front.py).
    traffic={"timeout": 1800},
    **instruments,
)
@bentoml.asgi_app(app, path="/")
class NanoVLLM:
    """A language model behind OpenAI's API (/v1, see /docs) and two batched endpoints."""

    @bentoml.on_deployment
    @staticmethod
    def prestart() -> None:
        """In the main process, before there are workers: the engine loads while they start."""
        log_format.set_up(config.log_format, "main", level=config.log_level)
        name_main_process()
        guard(config)
        prestart_engine(engine_config, config, os.getpid())

    @bentoml.on_startup
    async def start(self) -> None:
        log_format.set_up(config.log_format, "worker", level=config.log_level)
        keep_bodies_out_of_logs()
        skip_unwritten_lines()
        end_with(owner_pid)
        drain_on_sigterm(lambda: context.drain(config.shutdown_grace_seconds))
        await context.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await context.close()

    async def __is_ready__(self) -> bool:
        return context.is_healthy

    async def __is_alive__(self) -> bool:
        return context.failure is None

    @bentoml.api(
        batchable=True,
        batch_dim=0,
        max_batch_size=config.generate_batch_max_size,
        max_latency_ms=max_latency_ms(config, config.generate_batch_max_latency_ms),
    )
    async def generate_batch(
        self, requests: Annotated[list[BatchItem], Field(max_length=config.batch_max_items)]
    ) -> list[BatchResult]:
        """Complete several prompts in one call; an item that fails has an ``error`` and the others their text."""
        return await run_batch(context, requests)

    @bentoml.api(
        batchable=True,
        batch_dim=0,
        max_batch_size=config.score_max_size,
        max_latency_ms=max_latency_ms(config, config.score_max_latency_ms),
    )
    async def score(
        self, requests: Annotated[list[ScoreItem], Field(max_length=config.batch_max_items)]
    ) -> list[ScoreResult]:
        """Log-probabilities of given continuations, in one forward pass; an item that fails has an ``error``."""
        return await run_scores(context, requests)


_service = cast(Any, NanoVLLM)  # the decorator makes a bentoml.Service of the class
_service.add_asgi_middleware(
    Front,
    endpoints=endpoints,
    guards=guards,
    in_front=not config.bentoml_instruments,
    metrics=context.render_metrics if config.bentoml_instruments else None,
)
_service.add_asgi_middleware(BatchGate, max_calls=config.batch_max_calls)
