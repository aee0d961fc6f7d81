"""The BentoML service: ``bentoml serve service:NanoVLLM``. Settings come from NANOVLLM_* (nanovllm_bento/config.py).

The OpenAI API is a mounted FastAPI application, because each of its requests is a stream of its own in the engine.
BentoML's adaptive batching serves ``generate_batch``, where one answer for the whole batch is what the caller wants.
"""

import os

import bentoml

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.engine.process_client import ProcessEngineClient, prestart_engine
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.batch import BatchItem, BatchResult, run_batch
from nanovllm_bento.serving.context import ServingContext
from nanovllm_bento.serving.lifetime import end_with

engine_config = EngineConfig.create()
config = ServiceConfig.create()
# Workers are children of the `bentoml serve` process; they and the engine live as long as that.
owner_pid = os.getppid()
engine = ProcessEngineClient(engine_config, config, owner_pid=owner_pid)
context = ServingContext(engine, engine_config, config)
app = create_app(context)


@bentoml.service(
    name="nanovllm",
    workers=config.workers,
    # Bounds the time to the start of an answer, without stream to its end. BentoML keeps a timer for as long after each
    # request, so it is not for ever.
    traffic={"timeout": 1800},
    # Together they cost 0.5 ms a request and 25 µs an event.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(app, path="/")
class NanoVLLM:
    """A language model behind OpenAI's API (/v1, see /docs) and a batched endpoint."""

    @bentoml.on_deployment
    @staticmethod
    def prestart() -> None:
        """In the main process, before there are workers: the engine loads while they start."""
        prestart_engine(engine_config, config, os.getpid())

    @bentoml.on_startup
    async def start(self) -> None:
        end_with(owner_pid)
        await context.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await context.close()

    async def __is_ready__(self) -> bool:
        return context.is_ready

    async def __is_alive__(self) -> bool:
        return context.failure is None

    @bentoml.api(
        batchable=True,
        batch_dim=0,
        max_batch_size=config.generate_batch_max_size,
        max_latency_ms=config.generate_batch_max_latency_ms,
    )
    async def generate_batch(self, requests: list[BatchItem]) -> list[BatchResult]:
        """Complete several prompts in one call; an item that fails has an ``error`` and the others their text."""
        return await run_batch(context, requests)
