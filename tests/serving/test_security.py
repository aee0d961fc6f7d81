"""Threats of docs/security.md that are not of one module: hostile bodies, paths, models, logs, and what is imported."""

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nanovllm_bento import hub
from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError, InvalidRequestError, ModelNotFoundError
from nanovllm_bento.text.chat_template import ChatTemplate
from tests.serving.fakes import FakeEngine

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "nanovllm_bento").rglob("*.py"), ROOT / "service.py"])
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DEEP = 200_000


# -- bodies -----------------------------------------------------------------------------------------------------------


def nested(field: bytes, inside: bytes = b"1") -> bytes:
    return b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "' + field + b'": ' + inside + b"}"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        nested(b"chat_template_kwargs", b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
        nested(b"logit_bias", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        nested(b"max_tokens", b"9" * 5000),
        nested(b"max_tokens", b"1e400"),
        nested(b"seed", b"9" * 400_000),
        nested(b"n", b"1" + b"0" * 4000),
        nested(b"temperature", b"1" + b"0" * 4000),
        nested(b"temperature", b"1e999"),
        nested(b"temperature", b"NaN"),
        nested(b"temperature", b"-Infinity"),
        nested(b"top_p", b"NaN"),
        nested(b"min_p", b"Infinity"),
        nested(b"priority", b"9" * 30),
        nested(b"stop_token_ids", b"[" + b"9" * 100 + b"]"),
        nested(b"stop", json.dumps(["x"] * 100_000).encode()),
        nested(b"model", b'"\xff\xfe"'),
        nested(b"model", b'"\xed\xa0\x80"'),
        nested(b"model", b'"\\ud800"'),
        nested(b"user", b'"\\udfff"'),
        nested(b"cache_salt", b'"\\udfff"'),
        nested(b"stop", b'"\\udfff"'),
        b"\x00" * 1000,
        b"\xef\xbb\xbf" + nested(b"n"),
        nested(b"n").decode().encode("utf-16"),
        nested(b"n") + b"\x00",
        nested(b"n") + nested(b"n"),
        b"\x1f\x8b\x08\x00" + b"\x00" * 100,
        b"\x80\x04\x95",
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value.removeprefix(nested(b"")[:-5])[:24]),
)
async def test_hostile_bodies_are_400_and_the_server_goes_on(
    http: httpx.AsyncClient, engine: FakeEngine, path: str, body: bytes
) -> None:
    answer = await http.post(path, content=body)
    assert answer.status_code == 400, answer.text[:500]
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 10_000
    assert not engine.requests
    assert (await http.post(TEXT, json={"prompt": "a"})).status_code == 200


async def test_of_a_field_given_twice_the_last_counts(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """As in Python, JavaScript and Go; nothing that decides about access is in the body."""
    answer = await http.post(TEXT, content=b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}')
    assert answer.json()["usage"]["completion_tokens"] == 2


async def test_control_characters_are_text_like_any_other(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": "a\x00b\x1b[2J", "stop": ["\x00"], "user": "\x00", "cache_salt": "\x00"}
    assert (await http.post(TEXT, json=body)).status_code == 200
    assert [prompt for prompt, _ in engine.requests.values()] == [list(b"a\x00b\x1b[2J")]


async def test_a_name_of_a_model_never_leads_to_a_file(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "resolve_model", lambda *_: pytest.fail("a request's model was looked up"))
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "tiny/../..",
        "tiny\x00",
        "~/x",
        "file:///etc/passwd",
        "TINY",
        " tiny",
    ):
        answer = await http.post(TEXT, json={"prompt": "a", "model": name})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found", name
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models//etc/passwd", "/v1/models/%2e%2e/%2e%2e"):
        answer = await http.get(path)
        assert answer.status_code == 404 and "root:" not in answer.text, path


# -- prompts stay private ---------------------------------------------------------------------------------------------


async def test_no_prompt_and_no_answer_is_logged(
    http: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.reply = "my answer"
    with caplog.at_level(logging.DEBUG):
        for field in ({}, {"stream": True}, {"n": 2}, {"temperature": -1}, {"x": "my secret"}, {"stop": 5}):
            await http.post(TEXT, json={"prompt": "my secret", **field})
            await http.post(CHAT, json={"messages": [{"role": "user", "content": "my secret"}], **field})
        await http.post(TEXT, content=b'{"prompt": "my secret')
        engine.dies_after = 1
        await http.post(TEXT, json={"prompt": "my secret"})
        engine.submit = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign]
        await http.post(TEXT, json={"prompt": "my secret"})
    assert "ZeroDivisionError" in caplog.text, "what is logged is looked at"
    assert "my secret" not in caplog.text and "my answer" not in caplog.text


# -- nothing that runs code -------------------------------------------------------------------------------------------

UNPICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "yaml"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_nothing_unpickles() -> None:
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wrong += [f"{name}: {a.name}" for a in node.names if a.name.partition(".")[0] in UNPICKLES]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLES:
                wrong.append(f"{name}: {node.module}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if node.func.attr in ("send_pyobj", "recv_pyobj"):
                    wrong.append(f"{name}: {called}")
                if called in ("torch.load", "np.load", "numpy.load") and keywords.get("weights_only") != "True":
                    wrong.append(f"{name}: {called}")
                if called.startswith(("multiprocessing.", "mp.")) and node.func.attr in ("Queue", "Pipe", "Manager"):
                    wrong.append(f"{name}: {called}")
    assert not wrong


def test_nothing_runs_code_that_came_from_elsewhere() -> None:
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE:
                    wrong.append(f"{name}: {node.func.id}")
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                        wrong.append(f"{name}: trust_remote_code")
                    if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                        wrong.append(f"{name}: shell=True")
    assert not wrong


def test_trust_remote_code_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        ServiceConfig.create(env={}, trust_remote_code=True)


def test_every_socket_of_ours_is_in_the_ipc_folder() -> None:
    """None listens on the network but BentoML's."""
    pattern = re.compile(r"""["'](tcp|udp|pgm|ws)://|\.bind\(\s*\(|start_server\(|\.listen\(""")
    wrong = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in SOURCES
        if "bench" not in path.parts
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_weights_that_need_unpickling_are_refused(tmp_path: Path, name: str) -> None:
    from nanovllm_bento.models.weights import SafetensorsReader

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file"):
        SafetensorsReader(tmp_path)
    with pytest.raises(ModelNotFoundError, match="not a GGUF file"):
        hub.resolve_model(str(tmp_path / name))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ ''.format_map.__self__.__class__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_models_chat_template_stays_in_its_sandbox(source: str) -> None:
    """What it may not see is either an error or nothing at all."""
    try:
        assert ChatTemplate(source).render([{"role": "user", "content": "a"}]) == ""
    except InvalidRequestError:
        pass


def test_a_message_is_never_a_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    for text in ("{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "{{ ''.__class__ }}"):
        assert template.render([{"role": "user", "content": text}]) == text
