"""The Bento holds the service and nothing else, is the same for the same sources, and installs the pinned set."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {name: ROOT / file for name, file in {"cpu": "bentofile.yaml", "cuda": "bentofile.cuda.yaml"}.items()}


def build(home: Path, variant: str) -> Path:
    """The folder of a Bento built into a store of its own."""
    env = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "NANOVLLM_MODEL": "not/recorded"}
    command = [sys.executable, "scripts/bento.py", "--variant", variant]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "bentos" / done.stdout.split()[-1].replace(":", "/")


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("first"), "cpu")


def files(bento: Path) -> dict[str, bytes]:
    """Content of every file, without the time of building."""
    found = {str(path.relative_to(bento)): path.read_bytes() for path in bento.rglob("*") if path.is_file()}
    return {name: re.sub(rb"creation_time: .*", b"", content) for name, content in found.items()}


def pins(path: Path) -> dict[str, str]:
    requirements = [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def test_the_bento_holds_the_service_and_nothing_else(bento: Path) -> None:
    package = {f"nanovllm_bento/{path.relative_to(ROOT / 'nanovllm_bento')}" for path in sources()}
    source = {name.removeprefix("src/") for name in files(bento) if name.startswith("src/")}
    assert source == package | {"service.py", "README.md", "LICENSE", "nanovllm_bento/py.typed", "bentofile.yaml"}
    rest = {name for name in files(bento) if not name.startswith("src/")}
    assert {Path(name).parts[0] for name in rest} == {"README.md", "apis", "bento.yaml", "env"}
    assert sum(map(len, files(bento).values())) < 4 * 2**20


def sources() -> list[Path]:
    return [path for path in (ROOT / "nanovllm_bento").rglob("*.py") if "__pycache__" not in path.parts]


def test_the_same_sources_make_the_same_bento(bento: Path, tmp_path: Path) -> None:
    again = build(tmp_path, "cpu")
    assert again.name == bento.name
    assert files(again) == files(bento)


def test_the_image_has_a_user_by_number_a_health_check_and_no_index(bento: Path) -> None:
    dockerfile = (bento / "env/docker/Dockerfile").read_text()
    assert "USER 1034:1034" in dockerfile and "HEALTHCHECK" in dockerfile
    described = dockerfile + (bento / "bento.yaml").read_text() + (bento / "env/python/requirements.txt").read_text()
    assert "index-url" not in described and "find-links" not in described and "not/recorded" not in described
    assert described.count("bentoml==") == 1, "BentoML's own pin only"


def test_the_variants_differ_in_labels_and_docker_only() -> None:
    options: dict[str, dict[str, Any]] = {name: yaml.safe_load(path.read_text()) for name, path in VARIANTS.items()}
    for name, option in options.items():
        assert option.pop("labels")["variant"] == name
        assert option.pop("docker")["env"]["NANOVLLM_DEVICE"] == name
    assert options["cpu"] == options["cuda"]


def test_all_that_a_bento_installs_is_pinned_as_it_was_tested() -> None:
    constraints, bento = pins(ROOT / "requirements/constraints.txt"), pins(ROOT / "requirements/bento.txt")
    needed: set[str] = set()
    todo = [("nanovllm-bento", frozenset[str]())]
    while todo:
        name, extras = todo.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            found = canonicalize_name(requirement.name)
            if found not in constraints:
                continue  # parts of CUDA, which torch pins itself
            if found not in needed:
                todo.append((found, frozenset(requirement.extras)))
            needed.add(found)
    assert bento == {name: constraints[name] for name in needed - {"bentoml", "triton"}}
