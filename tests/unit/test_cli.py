"""The command line: options come from the settings, bad ones are errors, and serve hands them on as environment."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from nanovllm_bento import cli
from nanovllm_bento.cli.chat import error_message, stream_chat
from nanovllm_bento.cli.serve import SHUTDOWN_MARGIN, settings_environment
from nanovllm_bento.cli.terminal import console
from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.errors import ConfigError

runner = CliRunner()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Commands that would replace this process; the environment is put back after the test."""
    commands: list[list[str]] = []
    before = dict(os.environ)
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    yield commands
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("wide")
def test_every_setting_is_an_option_of_serve() -> None:
    text = runner.invoke(cli.app, ["serve", "--help"]).output
    for name in (*EngineConfig.model_fields, *ServiceConfig.model_fields):
        assert "--" + name.replace("_", "-") in text


def test_serve_hands_settings_on_as_environment(executed: list[list[str]]) -> None:
    arguments = (
        "--model demo --port 4000 --max-num-seqs 8 --no-enable-prefix-caching --stream-interval 2 --dtype float32"
    )
    result = runner.invoke(cli.app, ["serve", *arguments.split()])
    assert result.exit_code == 0, result.output
    command = executed[0]
    assert command[1:5] == ["-m", "bentoml", "serve", "service:NanoVLLM"]
    assert command[command.index("--port") + 1] == "4000"
    assert os.environ["NANOVLLM_MODEL"] == "demo"
    assert os.environ["NANOVLLM_STREAM_INTERVAL"] == "2"
    assert "NANOVLLM_BLOCK_SIZE" not in os.environ
    config = EngineConfig.create()
    assert (config.max_num_seqs, config.enable_prefix_caching, config.dtype) == (8, False, "float32")


def test_serve_gives_bentoml_the_grace_time_and_its_own_options(executed: list[list[str]]) -> None:
    arguments = "--model demo --shutdown-grace-seconds 7.5 -- --ssl-certfile cert.pem --backlog 4096"
    result = runner.invoke(cli.app, ["serve", *arguments.split()])
    assert result.exit_code == 0, result.output
    command = executed[0]
    assert command[-4:] == ["--ssl-certfile", "cert.pem", "--backlog", "4096"]
    # uvicorn cuts connections only after the service has ended them with an error
    assert int(command[command.index("--timeout-graceful-shutdown") + 1]) == 8 + SHUTDOWN_MARGIN


def test_a_model_without_its_option_is_an_error(executed: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    result = runner.invoke(cli.app, ["serve", "demo"])
    assert result.exit_code == 2 and not executed
    assert "--model" in result.output + capfd.readouterr().err


def test_serve_refuses_devices_that_are_not_there(executed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = runner.invoke(cli.app, ["serve", "--model", "demo", "--device", "cuda"])
    assert isinstance(result.exception, ConfigError) and "0 visible" in str(result.exception)
    assert not executed


def test_serve_refuses_what_the_service_would(executed: list[list[str]]) -> None:
    result = runner.invoke(cli.app, ["serve", "--max-num-seqs", "0"])
    assert isinstance(result.exception, ConfigError) and "max_num_seqs=0" in str(result.exception)
    assert not executed


@pytest.mark.parametrize("command", [["serve"], ["bench", "offline"], ["bench", "serve"], ["chat"], ["doctor"]])
def test_unknown_option_is_an_error(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--no-such-thing", "1"])
    assert result.exit_code == 2


def test_own_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["nanovllm-bento", "serve", "--block-size", "0"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("Error: block_size=0")


def test_a_relative_model_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings_environment({"model": "m"})["NANOVLLM_MODEL"] == str(tmp_path / "m")
    assert settings_environment({"model": "a/b", "seed": None}) == {"NANOVLLM_MODEL": "a/b"}
    (tmp_path / "keys").write_text("a:b")
    assert settings_environment({"api_keys_file": "keys"})["NANOVLLM_API_KEYS_FILE"] == str(tmp_path / "keys")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--preset gpu", "--preset is cpu"),
        ("--peer vllm", "--peer is transformers"),
        ("--input-len 4", "both"),
        ("--peer transformers", "--peer needs"),
    ],
)
def test_bench_offline_refuses_what_makes_no_sense(
    arguments: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = runner.invoke(cli.app, ["bench", "offline", *arguments.split()])
    assert result.exit_code == 2
    assert words in result.output + capfd.readouterr().err


def test_bench_scheduler_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = f"--num-seqs 4 --num-steps 20 --prompt-len 64 --json {path}"
    assert runner.invoke(cli.app, ["bench", "scheduler", *arguments.split()]).exit_code == 0
    assert json.loads(path.read_text())["step"]["num_running"] == 4


@pytest.mark.usefixtures("wide")
def test_models_lists_architectures_and_names() -> None:
    text = runner.invoke(cli.app, ["models"]).output
    assert "Qwen3ForCausalLM" in text and "LlamaForCausalLM" in text and ".gguf" in text and "demo" in text


@pytest.mark.usefixtures("wide")
def test_doctor_says_what_would_be_chosen() -> None:
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for subject in ("Python", "torch", "bentoml", "CPU capability", "device", "dtype", "attention"):
        assert subject in result.output


# -- chat -------------------------------------------------------------------------------------------------------------


def server(request: httpx.Request) -> httpx.Response:
    """A server that streams the number of messages it got, and refuses a message that says "bad"."""
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "m"}]})
    body = json.loads(request.content)
    assert body["stream"] is True and body["model"] == "m"
    if body["messages"][-1]["content"] == "bad":
        return httpx.Response(400, json={"error": {"message": "that is bad", "code": None}})
    pieces = ["got ", str(len(body["messages"]))]
    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    lines = [f"data: {json.dumps(event)}\n\n" for event in [{"choices": []}, *events]]
    return httpx.Response(200, text="".join(lines) + "data: [DONE]\n\n")


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> None:
    client = httpx.Client

    def make(**options: Any) -> httpx.Client:
        return client(**options, transport=httpx.MockTransport(server))

    monkeypatch.setattr(httpx, "Client", make)


@pytest.mark.usefixtures("fake_server", "wide")
def test_chat_keeps_the_conversation_and_can_forget_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "", "again", "bad", "more", "/reset", "new", "/exit"])
    monkeypatch.setattr(console, "input", lambda prompt: next(lines))
    with console.capture() as capture:
        result = runner.invoke(cli.app, ["chat", "--system", "be kind"])
    assert result.exit_code == 0, result.output
    text = capture.get()
    # system + hello; + answer + again; the refused message is dropped; reset keeps the system message
    for words in ("got 2", "got 4", "that is bad", "got 6"):
        assert words in text
    assert text.count("got 2") == 2


def test_an_error_event_in_a_stream_is_raised() -> None:
    lines = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {"message": "engine died"}}\n\n'
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=lines))
    with httpx.Client(transport=transport, base_url="http://test") as client:
        pieces = stream_chat(client, {})
        assert next(pieces) == "a"
        with pytest.raises(RuntimeError, match="engine died"):
            next(pieces)


def test_error_message_of_a_body_that_is_not_json() -> None:
    assert error_message(b"<html>", 502) == "HTTP 502: <html>"


def test_chat_without_a_server_names_the_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    result = runner.invoke(cli.app, ["chat", "--base-url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "nanovllm-bento serve" in result.output + capfd.readouterr().err
