"""What stands before every route: sizes, types, origins; and BentoML's own routes stand behind it as well."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import bentoml
import httpx
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.serving import middleware
from nanovllm_bento.serving.auth import Caller, current_caller
from nanovllm_bento.serving.middleware import MAX_HEADERS, MAX_URL_BYTES, RequestGuard, middlewares, protect
from nanovllm_bento.serving.private_logs import keep_bodies_out_of_logs

JSON = {"Content-Type": "application/json"}


class Echo:
    """An application that reads the whole body and answers with its length."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        length, more = 0, True
        while more:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(length).encode()})


class Swallowing(Echo):
    """One that makes a 500 of whatever goes wrong, as BentoML's routes do."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except Exception:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"oops"})


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def http(echo: Echo) -> AsyncIterator[httpx.AsyncClient]:
    async with client(RequestGuard(echo, max_body_bytes=100)) as http:
        yield http


async def chunks(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


async def refused(http: httpx.AsyncClient, status: int, code: str, method: str = "POST", **options: Any) -> None:
    answer = await http.request(method, options.pop("url", "/"), **options)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and error["type"] == "invalid_request_error" and error["message"]
    assert answer.headers["x-request-id"]


async def test_bodies_are_bounded_by_what_they_say_and_by_what_comes(http: httpx.AsyncClient, echo: Echo) -> None:
    assert (await http.post("/", content=b"x" * 100)).text == "100"
    assert (await http.post("/", content=chunks(50, 50))).text == "100"
    assert echo.calls == 2
    await refused(http, 413, "request_too_large", content=b"x" * 101)
    assert echo.calls == 2, "by its Content-Length alone"
    await refused(http, 413, "request_too_large", content=chunks(50, 50, 1))
    await refused(http, 413, "request_too_large", content=chunks(10**6))


async def test_a_body_that_grows_too_long_is_413_whatever_the_application_makes_of_it() -> None:
    async with client(RequestGuard(Swallowing(), max_body_bytes=100)) as http:
        await refused(http, 413, "request_too_large", content=chunks(99, 99))


async def test_an_endless_body_is_not_read_to_its_end(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LINGER_BYTES", 600)
    sent: list[Any] = []
    num_read = 0

    async def receive() -> Any:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"")],
    }
    await RequestGuard(echo, max_body_bytes=100)(scope, receive, send)
    assert num_read == 2 + 10 and sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert len(sent[1]["body"]) == int(dict(sent[0]["headers"])[b"content-length"]) and sent[1]["more_body"]
    assert sent[2] == {"type": "http.response.body", "body": b"", "more_body": False}


class Sender:
    """A client at the raw ASGI border whose large body comes as the test says."""

    def __init__(self, app: Any, length: int = 10**6) -> None:
        self.status: int | None = None
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        headers = [(b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)

    async def come(self, size: int, *, more: bool = True) -> None:
        """So many bytes arrive, and are taken."""
        self._inbox.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})
        await self.task


async def test_large_bodies_that_are_still_coming_share_a_bound() -> None:
    guard = RequestGuard(Swallowing(), max_body_bytes=10**6)
    senders = [Sender(guard) for _ in range(middleware.NUM_LARGE_BODIES + 1)]
    for sender in senders[:-1]:
        await sender.come(10**6 - 1)
    assert guard.num_held == middleware.NUM_LARGE_BODIES * (10**6 - 1)
    late = senders.pop()
    await late.come(10**4)
    assert late.status == 429, "whatever the application makes of it"
    await late.leave()
    await senders[0].come(1, more=False)
    await senders[0].task
    await senders[1].leave()
    assert guard.num_held == (middleware.NUM_LARGE_BODIES - 2) * (10**6 - 1), "one was read, one is gone"
    after = Sender(guard)
    await after.come(10**6 - 1)
    await after.come(1, more=False)
    await after.task
    assert (senders[0].status, after.status) == (200, 200)
    for sender in senders[2:]:
        await sender.leave()
    assert guard.num_held == 0


async def test_a_large_body_that_does_not_come_any_further_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "STALL_SECONDS", 0.05)
    guard = RequestGuard(Swallowing(), max_body_bytes=10**6)
    sender = Sender(guard)
    await sender.come(10**5)
    async with asyncio.timeout(5):
        while sender.status is None:
            await asyncio.sleep(0.01)
    assert sender.status == 408 and guard.num_held == 0
    await sender.leave()


async def test_refusals_are_told_of_once(echo: Echo) -> None:
    config = ServiceConfig.create(env={}, max_body_bytes=100, api_keys="alice:alice-key-1234567")
    told: list[tuple[str, int, str | None]] = []
    app = protect(echo, config, lambda e: told.append((e.request_id, e.status, e.error)))
    key = {"Authorization": "Bearer alice-key-1234567"}
    async with client(app) as http:
        await http.get("/", headers={"X-Request-ID": "a"})
        await http.post("/", content=b"x" * 101, headers={"X-Request-ID": "b"} | key)
        await http.post("/", content=chunks(60, 60), headers={"X-Request-ID": "c"} | key)
        await http.get("/", headers={"X-Request-ID": "d", "Origin": "https://evil.example"} | key)
        assert (await http.post("/", content=b"{}", headers=key)).status_code == 200
    assert told == [
        ("a", 401, "invalid_api_key"),
        ("b", 413, "request_too_large"),
        ("c", 413, "request_too_large"),
        ("d", 403, "origin_not_allowed"),
    ]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Length": "-1"}, 400, "invalid_header"),
        ({"Content-Length": "1e3"}, 400, "invalid_header"),
        ({"Content-Length": "9" * 5000}, 413, "request_too_large"),
        ({"Content-Length": "5", "Transfer-Encoding": "chunked"}, 400, "invalid_header"),
        ({"Content-Encoding": "gzip"}, 415, "unsupported_content_encoding"),
        ({"Content-Type": "application/vnd.bentoml+pickle"}, 415, "unsupported_media_type"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"X-Long": "x" * 70_000}, 431, "headers_too_large"),
        ({f"X-{i}": "x" for i in range(MAX_HEADERS)}, 431, "headers_too_large"),
    ],
)
async def test_headers_that_mean_harm(
    http: httpx.AsyncClient, echo: Echo, headers: dict[str, str], status: int, code: str
) -> None:
    await refused(http, status, code, content=b"{}", headers=headers)
    assert not echo.calls


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", None])
async def test_json_passes(http: httpx.AsyncClient, kind: str | None) -> None:
    assert (await http.post("/", content=b"{}", headers={"Content-Type": kind} if kind else {})).text == "2"


async def test_headers_that_say_where_a_body_ends_come_once(http: httpx.AsyncClient) -> None:
    twice = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
    await refused(http, 400, "invalid_header", content=b"{}", headers=twice)


async def test_urls_are_bounded_and_plain(http: httpx.AsyncClient) -> None:
    await refused(http, 414, "url_too_long", "GET", url="/" + "x" * MAX_URL_BYTES)
    await refused(http, 400, "invalid_url", "GET", url="/v1/models/%00")
    await refused(http, 400, "invalid_url", "GET", url="/a%0d%0ab")


async def test_a_refusal_repeats_the_requests_id_but_no_forged_one(http: httpx.AsyncClient) -> None:
    for sent, repeated in (("trace-1", True), ("x" * 5000, False), ('a" b', False)):
        answer = await http.post("/", content=b"x" * 101, headers={"X-Request-ID": sent})
        assert (answer.headers["x-request-id"] == sent) is repeated


async def test_websockets_are_refused(echo: Echo) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await RequestGuard(echo, 100)({"type": "websocket", "headers": []}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}] and not echo.calls


# -- other sites' pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "http://test"}, True),
        ({"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "http://test:8080", "Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "http://test", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
    ],
)
async def test_pages_of_other_sites_may_not_call(
    http: httpx.AsyncClient, headers: dict[str, str], allowed: bool
) -> None:
    answer = await http.post("/", content=b"{}", headers=headers)
    assert answer.status_code == (200 if allowed else 403)
    assert not any(name.startswith("access-control-") for name in answer.headers)
    preflight = await http.options("/", headers={**headers, "Access-Control-Request-Method": "POST"})
    assert not any(name.startswith("access-control-") for name in preflight.headers)


async def test_configured_origins_may_call_and_see_refusals(echo: Echo) -> None:
    config = ServiceConfig.create(
        env={}, cors_allow_origins="https://app.example, https://b.example", api_keys="alice:alice-key-1234567"
    )
    app = {"Origin": "https://app.example"}
    async with client(protect(echo, config)) as http:
        asks = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        preflight = await http.options("/v1/chat/completions", headers={**app, **asks})
        assert preflight.status_code == 200, "which carries no key"
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight.headers
        answer = await http.post("/", content=b"{}", headers=app)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        key = {"Authorization": "Bearer alice-key-1234567"}
        assert (await http.post("/", content=b"{}", headers={**app, **key})).status_code == 200
        evil = await http.post("/", content=b"{}", headers={"Origin": "https://evil.example", **key})
        assert evil.status_code == 403 and "access-control-allow-origin" not in evil.headers


def test_by_default_there_is_the_guard_alone() -> None:
    assert [kind for kind, _ in middlewares(ServiceConfig.create(env={}))] == [RequestGuard]


# -- BentoML's own routes ---------------------------------------------------------------------------------------------


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str
    _caller: Caller = PrivateAttr(default_factory=current_caller.get)


def bento_app() -> Any:
    """BentoML's application around a batched method that says whose each item is."""

    @bentoml.service(
        name="guarded",
        metrics={"enabled": False},
        logging={"access": {"enabled": False}},
        tracing={"excluded_urls": ".*"},
    )
    class Guarded:
        @bentoml.api(batchable=True, batch_dim=0, max_batch_size=8, max_latency_ms=60_000)
        async def batched(self, requests: list[Item]) -> list[str]:
            await asyncio.sleep(0.01)
            return [f"{item._caller.name} of {len(requests)}" for item in requests]

    settings = ServiceConfig.create(
        env={}, api_keys="alice:alice-key-1234567,bob:bob-key-1234567", max_body_bytes=10**6
    )
    for kind, options in middlewares(settings):
        Guarded.add_asgi_middleware(kind, **options)
    return Guarded.to_asgi(is_main=True)


async def test_bentomls_own_routes_are_behind_it_too(caplog: pytest.LogCaptureFixture) -> None:
    keep_bodies_out_of_logs()
    app = bento_app()
    key = {"Authorization": "Bearer alice-key-1234567"}
    async with app.router.lifespan_context(app), client(app) as http:
        for path in ("/livez", "/readyz", "/healthz"):
            assert (await http.get(path)).status_code == 200
        for method, path in [("POST", "/batched"), ("GET", "/"), ("GET", "/docs.json"), ("GET", "/schema.json")]:
            answer = await http.request(method, path, json={"requests": [{"prompt": "a"}]})
            assert answer.status_code == 401, path

        async def ask(name: str) -> str:
            headers = {"Authorization": f"Bearer {name}-key-1234567"}
            answer = await http.post("/batched", json={"requests": [{"prompt": "a"}]}, headers=headers)
            return answer.json()[0]

        names = ["alice", "bob"] * 8
        answers = await asyncio.gather(*map(ask, names))
        assert [answer.partition(" ")[0] for answer in answers] == names, (
            "also where a batch holds several callers' items"
        )
        assert any(answer.endswith("of 8") or not answer.endswith("of 1") for answer in answers)

        pickled = b"cos\nsystem\n(S'false'\ntR."
        for kind in ("application/vnd.bentoml+pickle", "multipart/form-data; boundary=x"):
            answer = await http.post("/batched", content=pickled, headers={**key, "Content-Type": kind})
            assert answer.status_code == 415
        too_long = await http.post("/batched", content=chunks(600_000, 600_000), headers={**key, **JSON})
        assert too_long.status_code == 413
        with caplog.at_level(logging.DEBUG):
            for body in (
                b'{"requests": [{"prompt": "my secret", "x": 1}]}',
                b'{"requests": ' + b"[" * 100_000,
                b'{"requests": [{"prompt": "my secret \xff"}]}',
                b'{"requests": [{"prompt": "my secret',
                json.dumps({"requests": [{"prompt": ["my secret"]}], "more": "my secret"}).encode(),
            ):
                answer = await http.post("/batched", content=body, headers={**key, **JSON})
                assert answer.status_code == 400, body[:40]
        assert "refused (ValidationError)" in caplog.text
        assert "my secret" not in caplog.text and "Traceback" not in caplog.text
