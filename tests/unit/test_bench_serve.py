"""bench serve against a small server of known behaviour: what fails is counted as what it is, nothing is lost."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanovllm_bento import cli
from nanovllm_bento.bench import serve
from nanovllm_bento.bench.serve_options import LoadOptions

runner = CliRunner()
MODEL = b'{"data": [{"id": "m"}]}'


def event(text: str | None, finish: str | None = None, *, chat: bool, **more: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, **({"delta": {"content": text}} if chat else {"text": text})}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


class Server:
    """An OpenAI-like server whose behaviour the prompt names. ``seen``: bodies; ``most_open``: at the same time."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[bytes] = []
        self.open = self.most_open = 0
        self.gate: Callable[[], bool] = lambda: True  # answers wait until it is true
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.started = threading.Event()
        self.port = 0
        self.starting = 0  # times that /health says 503

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)

        async def start() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self.started.set()

        self.loop.create_task(start())
        self.loop.run_forever()

    async def end(self) -> None:
        """Cut what is still connected."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /health "):
            self.starting -= 1
            status = b"503 Not yet" if self.starting >= 0 else b"404 No such path"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
            return True
        if head.startswith(b"GET /v1/models "):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(MODEL), MODEL))
            return True
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        body = json.loads(await reader.readexactly(length))
        self.seen.append(body)
        self.headers.append(head)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while not self.gate():
                await asyncio.sleep(0.001)
            return await self._answer(writer, body, chat=b"/chat/" in head)
        finally:
            self.open -= 1

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, chat: bool) -> bool:
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        kind = prompt if isinstance(prompt, str) else "ok"
        if kind.isdecimal():
            said = json.dumps({"error": {"message": f"no: {kind}"}}).encode()
            writer.write(b"HTTP/1.1 %b No\r\nContent-Length: %d\r\n\r\n%b" % (kind.encode(), len(said), said))
            return True
        if kind == "hang up":
            return False
        if kind == "hang":
            await asyncio.sleep(3600)
        count = body["max_tokens"]
        usage = {"prompt_tokens": 10, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 5}}
        if not body["stream"]:
            choice = {"text": "a", "finish_reason": "length"}
            said = json.dumps({"choices": [choice], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        parts = [event(f"w{i} ", chat=chat) for i in range(count - 1)] + [event("end", "length", chat=chat)]
        if kind == "cut":
            writer.write(b"%x\r\n%b\r\n" % (len(parts[0]), parts[0]))
            await writer.drain()
            return False
        if kind == "error":
            parts = [parts[0], b'data: {"error": {"message": "engine died"}}\n\n']
        if kind == "nonsense":
            parts = [b"data: {nonsense\n\n"]
        parts.append(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        for part in parts:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    found.thread.start()
    assert found.started.wait(30)
    yield found
    asyncio.run_coroutine_threadsafe(found.end(), found.loop).result(30)
    found.loop.call_soon_threadsafe(found.loop.stop)
    found.thread.join(30)


def options(server: Server, **given: Any) -> LoadOptions:
    small = {"random_input_len": 4, "random_output_len": 3, "num_prompts": "12", "processes": 2}
    return LoadOptions.create(**{"base_url": f"http://127.0.0.1:{server.port}/v1", **small, **given})


def run(server: Server, **given: Any) -> dict[str, Any]:
    found: dict[str, Any] = serve.bench_serve(options(server, **given))["runs"][0]
    return found


def trace(folder: Path, *prompts: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps({"timestamp": 0, "prompt": p, "output_len": 3}) + "\n" for p in prompts))
    return path


def test_every_request_is_sent_once_and_counted(server: Server) -> None:
    server.gate = lambda: server.most_open == 4 or len(server.seen) > 4  # as many at a time as were asked for
    found = run(server, max_concurrency="4", ignore_eos=True, goodput="ttft:60000,e2el:60000")
    assert len(server.seen) == 12 and len({tuple(b["prompt"]) for b in server.seen}) == 12
    assert server.most_open == 4 == found["peak_concurrency"]
    assert (found["requests"]["completed"], found["requests"]["failed"], found["short_answers"]) == (12, 0, 0)
    assert (found["output_tokens"], found["input_tokens"], found["tokens_per_chunk"]) == (36, 120, 1.0)
    assert found["prefix_cache"]["hit_rate"] == 0.5 and found["goodput"]["share"] == 1.0
    assert found["ttft_ms"]["max"] <= found["e2el_ms"]["max"]
    assert len(found["client"]["processes"]) == 2
    assert sum(p["requests"] for p in found["client"]["processes"]) == 12


def test_failures_are_told_apart(server: Server, tmp_path: Path) -> None:
    kinds = ["ok", "429", "429", "503", "400", "cut", "error", "nonsense", "hang up", "hang", "ok"]
    found = run(server, dataset="trace", dataset_path=trace(tmp_path, *kinds), num_prompts=None, timeout=1.5)
    counts = {kind: said["count"] for kind, said in found["requests"]["failures"].items()}
    assert counts == {
        "http_429": 2,
        "http_503": 1,
        "http_400": 1,
        "cut": 1,
        "error_event": 1,
        "bad_answer": 1,
        "no_answer": 1,
        "timeout": 1,
    }
    assert (found["requests"]["sent"], found["requests"]["completed"]) == (11, 2)
    assert found["requests"]["failures"]["http_503"]["examples"] == ["no: 503"]
    assert found["requests"]["failures"]["error_event"]["examples"] == ["engine died"]
    assert found["output_tokens"] == 6  # of the whole answers alone


def test_no_server_is_a_failure_of_every_request(server: Server) -> None:
    found = run(server, base_url="http://127.0.0.1:9", model="m", num_prompts="3")
    assert found["requests"]["failures"]["connect"]["count"] == 3


def test_a_rate_sends_all_at_their_times(server: Server) -> None:
    found = run(server, request_rate="400", burstiness=0.5)
    assert found["requests"]["completed"] == 12 and found["client"]["late_ms"] is not None


def test_conversations_go_on_from_the_answers(server: Server) -> None:
    found = run(server, dataset="multi-turn", endpoint="chat", num_prompts="3", num_turns=3, system_len=2)
    assert found["requests"]["completed"] == 9
    assert Counter(len(b["messages"]) for b in server.seen) == {2: 3, 4: 3, 6: 3}
    last = max(server.seen, key=lambda b: len(b["messages"]))
    assert [m["role"] for m in last["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert last["messages"][2]["content"] == "w0 w1 end"


def test_a_conversation_ends_at_a_failure_and_what_was_not_sent_is_said(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": c} for c in ("a", "503", "b", "c")]}))
    found = run(server, dataset="multi-turn", dataset_path=path, endpoint="chat", num_prompts=None)
    assert (found["requests"]["completed"], found["requests"]["failed"]) == (1, 1)
    assert found["requests"]["turns_not_sent"] == 2


def test_without_stream_whole_answers_are_timed(server: Server) -> None:
    found = run(server, stream=False, max_concurrency="2", header=["X-Mine=7"], api_key="secret")
    assert found["requests"]["completed"] == 12 and found["output_tokens"] == 36
    assert found["ttft_ms"] is None and found["e2el_ms"] is not None
    assert b"\r\nX-Mine: 7\r\n" in server.headers[0] and b"\r\nAuthorization: Bearer secret\r\n" in server.headers[0]


def test_warm_up_requests_do_not_count(server: Server) -> None:
    found = run(server, warmup=5)
    assert len(server.seen) == 17 and found["requests"]["sent"] == 12


def test_the_command_writes_numbers_and_plots(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    arguments = "--max-concurrency 1,2 --num-prompts 4 --random-input-len 4 --random-output-len 3 --goodput ttft:1000"
    url = f"http://127.0.0.1:{server.port}"
    done = runner.invoke(
        cli.app, ["bench", "serve", "--base-url", url, *arguments.split(), "--json", str(path), "--no-plots"]
    )
    assert done.exit_code == 0, done.output
    assert "concurrency 2" in done.output and "TTFT" in done.output and "goodput" in done.output
    result = json.loads(path.read_text())
    assert result["environment"]["cpu"] and result["model"] == "m" and len(result["runs"]) == 2
    assert str(tmp_path) not in path.read_text()
    assert not list(path.parent.glob("*.png"))
    assert (
        runner.invoke(cli.app, ["bench", "serve", "--from", str(path)]).exit_code == 0
    )  # on a machine with matplotlib
    plots = sorted(p.name for p in path.parent.glob("*.png"))
    assert plots == ["r_all.png", "r_concurrency-1.png", "r_concurrency-2.png"]
    compared = runner.invoke(cli.app, ["bench", "compare", str(path), str(path), "--fail"])
    assert compared.exit_code == 0 and "serve: concurrency 1: requests_per_s" in compared.output


def test_the_command_fails_if_a_request_did(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.port}"
    arguments = ["--base-url", url, "--dataset", "trace", "--dataset-path", str(trace(tmp_path, "ok", "429"))]
    assert serve.main(arguments) == 1  # python -m …, without typer
    assert "FAILED 1 × http_429: no: 429" in capsys.readouterr().out


def test_a_server_that_starts_is_waited_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.starting = 2
    url = f"http://127.0.0.1:{server.port}"
    arguments = ["--base-url", url, "--num-prompts", "2", "--random-output-len", "2", "--processes", "1"]
    assert serve.main(arguments) != 0
    assert "not ready" in capsys.readouterr().err
    assert serve.main([*arguments, "--ready-timeout", "60"]) == 0
    assert len(server.seen) == 2


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--base-url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("Error: no server answers at http://127.0.0.1:9")
    assert serve.main(["--goodput", "x"]) == 2
