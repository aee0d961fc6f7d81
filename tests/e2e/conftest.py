from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from nanovllm_bento.hub import ModelFiles
from tests.e2e.server import Server, serve
from tests.e2e.tiny import make_served_tiny


@pytest.fixture(scope="session")
def server(demo_model: ModelFiles) -> Iterator[Server]:
    """One server of the demo for all tests that do not end it."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that is served within seconds (tests/e2e/tiny.py)."""
    return str(make_served_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
