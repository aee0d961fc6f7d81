from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.context import ServingContext
from tests.serving.fakes import FakeEngine, make_context


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def context(engine: FakeEngine) -> ServingContext:
    return make_context(engine)


@pytest.fixture
def app(context: ServingContext) -> FastAPI:
    return create_app(context)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
