"""Imports go one way: serving → engine → models → layers → kernels, over leaves that know none of these."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanovllm_bento"
NAME = "nanovllm_bento"

LEAVES = {"errors", "outputs", "sampling_params", "config", "gguf_file", "hub", "text", "log_format"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "outputs": set(),
    "sampling_params": {"errors"},
    "config": {"errors"},
    "log_format": set(),
    "gguf_file": {"errors"},
    "hub": {"errors", "models.gguf", "gguf_file", "text.tokenizer"},
    "text": {"errors", "gguf_file", "hub", "sampling_params", "outputs", "config"},
    "kernels": {"errors"},
    "layers": {"errors", "sampling_params", "kernels"},
    "models": {"errors", "gguf_file", "hub", "kernels", "layers"},
    "engine": {"errors", "config", "log_format", "hub", "sampling_params", "outputs", "kernels", "layers", "models"},
    "serving": (LEAVES - {"outputs"})
    | {
        "engine.client",
        "engine.messages",
        "engine.request",
        "engine.process_client",
        "engine.processes",
        "engine.ipc_folder",
    },
    "llm": LEAVES | {"engine"},
    "bench": LEAVES | {"kernels", "layers", "models", "engine", "llm", "serving"},
    "cli": LEAVES | {"kernels", "models", "engine", "llm", "bench", "serving.resources"},
}
"""What each part may import of this package beside itself. A dotted name allows that one module only."""

WEB = {"bentoml", "_bentoml_sdk", "fastapi", "starlette", "uvicorn", "httpx", "openai"}
TEXT = {"tokenizers", "transformers", "jinja2"}
TENSORS = {"torch", "triton", "safetensors"}
FORBIDDEN: dict[str, set[str]] = {
    "errors": WEB | TEXT | TENSORS,
    "outputs": WEB | TEXT | TENSORS,
    "sampling_params": WEB | TEXT | TENSORS,
    "config": WEB | TEXT | TENSORS,
    "log_format": WEB | TEXT | TENSORS,
    "gguf_file": WEB | TEXT | TENSORS,
    "hub": {"torch", "triton", "transformers"},
    "text": WEB | TENSORS | {"transformers"},
    "kernels": WEB | TEXT,
    "layers": WEB | TEXT,
    "models": WEB | TEXT,
    "engine": WEB | TEXT,
    "serving": TENSORS | {"transformers", "gguf"},
    "llm": WEB | {"transformers"},
}
"""Third-party packages that a part must not know, wherever in a file they would be imported."""


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file, of every module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names of all modules a file may import, also inside functions and under TYPE_CHECKING."""
    package = f"{NAME}.{module}".rstrip(".") if path.name == "__init__.py" else f"{NAME}.{module}".rpartition(".")[0]
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*package.split(".")[: len(package.split(".")) - node.level + 1], base]))
            for alias in node.names:  # `from package import module` imports that module
                full = f"{base}.{alias.name}"
                yield full if full.removeprefix(NAME + ".") in known else base


def part_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_part_has_its_rules() -> None:
    assert {part_of(m) for m in modules()} - {""} <= ALLOWED.keys()


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    wrong = []
    for module, path in modules().items():
        if part_of(module) != part:
            continue
        for name in imports(path, module):
            inside = name.removeprefix(NAME).removeprefix(".")
            if not name.startswith(NAME) or not inside or part_of(inside) == part:
                continue
            if inside not in ALLOWED[part] and part_of(inside) not in ALLOWED[part]:
                wrong.append(f"{module} imports {inside}")
    assert not wrong


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_do_not_know_what_is_not_theirs(part: str) -> None:
    wrong = []
    for module, path in modules().items():
        if part_of(module) == part:
            used = {name.partition(".")[0] for name in imports(path, module)} & FORBIDDEN[part]
            wrong += [f"{module} imports {name}" for name in sorted(used)]
    assert not wrong


def test_only_llm_and_the_tools_import_the_engine_itself() -> None:
    users = {
        part_of(module)
        for module, path in modules().items()
        for name in imports(path, module)
        if name == f"{NAME}.engine.core"
    }
    assert users <= {"engine", "llm", "bench"}


def loaded_after(statements: str, block: str = "") -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after some statements."""
    code = f"import sys\n{block}\n{statements}\n"
    code += "print(*[m for m in ('torch', 'torch._dynamo', 'transformers', 'triton', 'sympy') if sys.modules.get(m)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def import_all(*parts: str, but: str = "-") -> str:
    """Code that imports every module of the parts, except those whose name ends with ``but``."""
    names = [f"{NAME}.{m}".rstrip(".") for m in modules() if part_of(m) in parts and not m.endswith(but)]
    assert names
    return "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in names)


def test_serving_and_the_leaves_load_neither_torch_nor_transformers() -> None:
    assert loaded_after(import_all("", "serving", *LEAVES)) == set()


def test_the_command_line_starts_without_torch() -> None:
    assert loaded_after(import_all("cli")) == set()


def test_the_service_loads_neither_torch_nor_transformers() -> None:
    assert loaded_after("import service") == set()


def test_all_but_the_triton_sources_import_without_triton() -> None:
    """Those (*_triton.py) are imported by the dispatch functions, for tensors on a GPU."""
    parts = ("kernels", "layers", "models", "engine")
    assert "torch" in loaded_after(import_all(*parts, but="_triton"), block="sys.modules['triton'] = None")


TINY = """
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.loader import load_model
import torch
config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=32, intermediate_size=64,
    vocab_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True, torch_dtype="float32")
load_model(ModelConfig.from_dict(config), "unused", dtype=torch.float32, load_format="dummy")
"""


def test_loading_a_model_imports_no_compiler() -> None:
    """torch pulls in sympy and its compiler for some innocent calls: seconds of every start."""
    assert loaded_after(TINY) == {"torch"}


def pins(name: str) -> dict[str, str]:
    """Package -> exact version, of a requirements file."""
    lines = [line.partition(";")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(package): version for package, version in pairs}


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def declared(group: str = "") -> set[str]:
    """Packages that pyproject.toml asks for: the package's own, or an extra's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][group] if group else project["dependencies"]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in wanted}  # type: ignore[index]


def test_all_dependencies_are_pinned() -> None:
    assert declared() | declared("dev") | declared("bench") <= pins("constraints.txt").keys()


def test_what_is_imported_is_declared() -> None:
    distribution = {
        "zmq": "pyzmq",
        "starlette": "fastapi",
        "pydantic_core": "pydantic",
        "pynvml": "nvidia-ml-py",
        NAME: "",
    }
    optional = {"triton", "transformers", "flash-attn", "flash-attn-interface", "matplotlib", "sentencepiece"}
    optional |= {"opentelemetry"}
    used = {
        normal(distribution.get(top, top))
        for module, path in modules().items()
        for top in [name.partition(".")[0] for name in imports(path, module)]
        if top not in sys.stdlib_module_names
    } - {""}
    assert used - optional <= declared()
