"""More clients than fit, clients that leave in masses, clients that do not read, and a service that ends under load."""

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest

from nanovllm_bento.bench.fake_engine import TEXT
from tests.e2e.observer import Observer
from tests.e2e.server import Server, serve, wait_ended
from tests.e2e.streams import Stream, until
from tests.e2e.test_faults import FAKE
from tests.e2e.tiny import SETTINGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MAX_OPEN = 48
MAX_NUM_SEQS = 8
LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[Server]:
    """A service with little room, so that some requests run, some wait and the rest is refused."""
    settings = SETTINGS | {"max_waiting_requests": MAX_OPEN, "max_num_seqs": MAX_NUM_SEQS}
    with serve(tiny_model, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def observer(server: Server) -> Iterator[Observer]:
    with Observer(server) as observer:
        yield observer


GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server, observer: Observer) -> Iterator[None]:
    """After each test nothing runs or waits and no block is in use, as the engine says and as /metrics says."""
    yield
    observer.until_idle()
    asyncio.run(until(lambda: gauges(server) == dict.fromkeys(GAUGES, 0.0), "the gauges are zero"))


def gauges(server: Server) -> dict[str, float]:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    names = {name: f"nanovllm:{name}" for name in GAUGES}
    return {
        name: sum(float(value) for sample, _, value in samples if sample.partition("{")[0] == full)
        for name, full in names.items()
        if any(sample.partition("{")[0] == full for sample, _, _ in samples)
    }


async def test_a_flood_is_served_or_refused(server: Server, observer: Observer) -> None:
    before = await asyncio.to_thread(observer.until_idle)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def ask(i: int) -> httpx.Response:
            body = {"prompt": f"Request {i}", "max_tokens": 20, "ignore_eos": True, "stream": i % 2 == 0}
            return await client.post("/v1/completions", json=body)

        answers = await asyncio.gather(*(ask(i) for i in range(6 * MAX_OPEN)))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429} and counts[200] >= MAX_OPEN, counts
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        elif answer.headers["content-type"].startswith("text/event-stream"):
            *chunks, end = answer.text.strip().split("\n\n")
            assert end == "data: [DONE]"
            assert json.loads(chunks[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 20
    after = await asyncio.to_thread(observer.until_idle)
    assert after.generation_tokens - before.generation_tokens == 20 * counts[200], "nothing refused was worked on"
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:  # and then there is room again
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("num_clients", "n"), [(32, 1), (10, 4)])
async def test_leaving_clients_free_what_they_held(
    server: Server, observer: Observer, stream: bool, num_clients: int, n: int
) -> None:
    """Some run and some have not had their first token: max_num_seqs is far below the number of requests."""
    before = await asyncio.to_thread(observer.until_idle)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        requests = [asyncio.create_task(_read(client, {**LONG, "n": n, "stream": stream})) for _ in range(num_clients)]
        await asyncio.to_thread(
            observer.until,
            lambda s: (
                (s.num_requests_running, s.num_requests_waiting) == (MAX_NUM_SEQS, num_clients * n - MAX_NUM_SEQS)
            ),
            "some run, the others wait",
        )
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    after = await asyncio.to_thread(observer.until_idle)
    assert after.generation_tokens - before.generation_tokens < LONG["max_tokens"] * num_clients * n / 4
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:  # nothing is counted as open any more
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}) for _ in range(MAX_OPEN))
        )
    assert {answer.status_code for answer in answers} == {200}


async def _read(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            pass


@pytest.mark.parametrize("path", ["/generate_batch", "/score"])
async def test_leaving_callers_of_batches_free_what_they_held(server: Server, observer: Observer, path: str) -> None:
    """Also those whose items wait for the batch before theirs: these never reach the engine."""
    before = await asyncio.to_thread(observer.until_idle)
    items = {
        "/generate_batch": [{"prompt": "Once upon a time", "sampling": {"max_tokens": 1000, "ignore_eos": True}}],
        "/score": [{"context": "Once upon a time " * 200, "continuation": "there was" * 50}],
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        body = {"requests": items[path] * 16}
        calls = [asyncio.create_task(client.post(path, json=body)) for _ in range(6)]
        await asyncio.to_thread(observer.until, lambda s: s.num_requests_running > 0, "a batch runs")
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        began = time.monotonic()
        after = await asyncio.to_thread(observer.until_idle)
        assert time.monotonic() - began < 5
        assert after.generation_tokens - before.generation_tokens < 6 * 16 * 1000 / 4
        assert after.prompt_tokens - before.prompt_tokens < 6 * 16 * 2000
        answer = await client.post(path, json={"requests": items[path]})
        assert answer.status_code == 200 and answer.json()[0]["error"] is None


async def test_a_body_that_is_too_large_is_413_to_clients_that_send_it_whole_before_they_read(server: Server) -> None:
    """httpx and the like: a connection that is closed while they send is an error to them, and the answer is lost."""
    body = b"x" * (17 * 2**20)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for content in (body, pieces()):
            answer = await client.post("/v1/completions", content=content)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


async def test_bodies_that_do_not_come_to_their_end_hold_little(tiny_model: str) -> None:
    """60 clients announce 2 MiB, send nearly that, and wait."""
    settings = FAKE | {"max_body_bytes": 2 * 2**20, "workers": 1}
    with serve(tiny_model, **settings) as server:
        (worker,) = server.worker_pids
        await asyncio.to_thread(httpx.post, server.url + "/v1/completions", content=b"x" * 10**6)
        before = psutil.Process(worker).memory_info().rss
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2097152\r\n\r\n"
        with contextlib.ExitStack() as open_until_the_end:
            connections = []
            for _ in range(60):
                connection = open_until_the_end.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                await asyncio.to_thread(connection.sendall, head + b"x" * 2_000_000)
                connections.append(connection)
            refused = 0
            for connection in connections:
                connection.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    refused += b" 429 " in await asyncio.to_thread(connection.recv, 4096)
            held = psutil.Process(worker).memory_info().rss - before
            assert 50 <= refused <= 52, "eight at most may be on their way"
            assert held < 60 * 2_000_000 / 2, held
            assert httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


SLOW_READERS = 16
SLOW_TOKENS = 100_000


async def test_slow_readers_cost_little_memory_and_nobody_elses_time(tiny_model: str) -> None:
    """What 16 clients do not read would be 300 MB as events; as token ids it is a few."""
    settings = FAKE | {"fake_tokens_per_step": 16, "fake_tokens_per_second": 40_000, "max_model_len": 2 * SLOW_TOKENS}
    settings |= {"num_gpu_blocks_override": 1 << 20, "workers": 1}
    with serve(tiny_model, **settings) as server, Observer(server) as observer, contextlib.ExitStack() as stack:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 100})).status_code == 200
            (worker,) = server.worker_pids
            before = psutil.Process(worker).memory_info().rss
            body = {"prompt": "a", "max_tokens": SLOW_TOKENS, "ignore_eos": True, "stream": True}
            slow = [stack.enter_context(_send_and_do_not_read(server, body)) for _ in range(SLOW_READERS)]
            other = Stream({"prompt": "b", "max_tokens": 1000, "ignore_eos": True})
            await other.run(server.url)
            assert other.done and len(other.text) == 1000
            all_made = SLOW_READERS * SLOW_TOKENS
            await asyncio.to_thread(observer.until, lambda s: s.generation_tokens >= all_made, "all is generated")
            grown = psutil.Process(worker).memory_info().rss - before
            assert grown < 100 * 2**20, f"{grown / 2**20:.0f} MiB for {SLOW_READERS} clients that do not read"
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
            assert answer.status_code == 200
            text = await asyncio.to_thread(_read_text, slow[0])
            assert len(text) == SLOW_TOKENS and text in TEXT * (SLOW_TOKENS // len(TEXT) + 2), "late, but whole"
        stack.close()  # the others leave
        await asyncio.to_thread(observer.until_idle)
        await until(lambda: len(psutil.Process(worker).net_connections("tcp")) <= 1, "their connections are closed")


@contextlib.contextmanager
def _send_and_do_not_read(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def _read_text(connection: socket.socket) -> str:
    """The whole text of a stream."""
    connection.settimeout(60)
    with connection.makefile("rb") as lines:
        events = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


async def test_one_keys_long_queue_does_not_hold_up_another_also_with_two_workers(tiny_model: str) -> None:
    """Each worker has a queue of its own, and hands the engine little more than that can run at once."""
    keys: dict[str, Any] = {
        "api_keys": "greedy:greedy-secret,small:small-secret",
        "api_key_open_paths": "/health,/readyz,/metrics",
    }
    keys |= {"workers": 2, "max_num_seqs": 4}
    body = {"prompt": "Hi", "max_tokens": 20, "ignore_eos": True}
    num_greedy, num_done, done_before = 120, 0, -1
    with serve(tiny_model, **(FAKE | keys), fake_tokens_per_second=50) as server, Observer(server) as observer:

        async def ask(name: str) -> None:
            nonlocal num_done, done_before
            headers = {"Authorization": f"Bearer {name}-secret"}
            async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=headers) as client:
                answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            if name == "greedy":
                num_done += 1
            else:
                done_before = num_done

        greedy = [asyncio.create_task(ask("greedy")) for _ in range(num_greedy)]
        await asyncio.to_thread(observer.until, lambda s: s.num_requests_waiting > 0, "more than can run")
        await until(lambda: gauges(server)["num_requests_waiting"] > num_greedy / 2, "most of them wait")
        began = num_done
        await ask("small")
        inside = 2 * (4 + 1)  # that two workers have handed to the engine before
        assert done_before - began <= 2 * inside, "and those that had their turn beside it"
        await asyncio.gather(*greedy)
        await asyncio.to_thread(observer.until_idle)


async def test_a_service_ends_under_load_without_a_broken_answer(tiny_model: str) -> None:
    """Whatever was let in is answered whole; whatever was not gets 503 or no connection. Nothing is left."""
    settings = FAKE | {"fake_tokens_per_second": 100, "shutdown_grace_seconds": 20, "workers": 2}
    with serve(tiny_model, **settings) as server:
        server.note_shared_memory()
        processes = server.processes()
        streams: list[Stream] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                streams.append(Stream({"prompt": "a", "max_tokens": 50, "ignore_eos": True}))
                await streams[-1].run(server.url)
                if streams[-1].broken and streams[-1].status is None:
                    return

        clients = asyncio.gather(*(client() for _ in range(16)))
        await until(lambda: sum(stream.done for stream in streams) >= 32, "the load is on")
        server.process.terminate()
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        stop.set()
        await asyncio.wait_for(clients, 60)
        for stream in streams:
            if stream.status == 200:
                assert stream.done and len(stream.text) == 50 and stream.error is None, stream
            else:
                assert stream.status in (503, None), stream
        assert await asyncio.to_thread(wait_ended, processes) == []
        assert server.leftovers() == []
