"""A client's side of streams: what came of each, whole or not."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """One streamed completion as its client sees it.

    broken: the connection ended before the answer did. headers: the answer's; request_headers: more of the request's.
    """

    body: dict[str, Any]
    status: int | None = None
    text: str = ""
    num_events: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    broken: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    request_headers: dict[str, str] = field(default_factory=dict)
    grew: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, url: str, path: str = "/v1/completions") -> "Stream":
        """Read it to its end on a connection of its own; never raises for what the server does."""
        try:
            async with (
                httpx.AsyncClient(base_url=url, timeout=120, headers=self.request_headers) as client,
                client.stream("POST", path, json={**self.body, "stream": True}) as answer,
            ):
                self.status, self.headers = answer.status_code, dict(answer.headers)
                if self.status != 200:
                    self.error = json.loads(await answer.aread())["error"]
                    return self
                async for line in answer.aiter_lines():
                    self._take(line)
        except httpx.TransportError:
            self.broken = True
        finally:
            self._wake()
        return self

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.done = True
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = event["error"]
            return
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.num_events += 1
        self._wake()

    def _wake(self) -> None:
        self.grew.set()
        self.grew = asyncio.Event()

    async def until_events(self, count: int) -> None:
        """Return once it has so many events."""
        async with asyncio.timeout(60):
            while self.num_events < count:
                assert self.error is None and not self.broken, self
                await self.grew.wait()


async def until(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> None:
    """Return once ``condition()`` holds; it is called off the event loop, so it may ask the server."""
    try:
        async with asyncio.timeout(timeout):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout} s: {what}") from None
