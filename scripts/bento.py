#!/usr/bin/env python3
"""Builds the Bento: ``bentoml build`` with a version that comes of its content, and with a model in it if asked for.

    python scripts/bento.py [--variant cpu|cuda] [--model demo]

Without --model the Bento holds no weights, and NANOVLLM_MODEL names the model when it is served (a Hub id is fetched on
start). With it the model is put into BentoML's model store, named in the Bento's ``models``, and served by default.
What is packaged, and how, is said in bentofile.yaml alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bentoml
import yaml
from bentoml.exceptions import NotFound

import nanovllm_bento
from nanovllm_bento.errors import NanoVLLMError
from nanovllm_bento.hub import ModelFiles, resolve_model

ROOT = Path(__file__).resolve().parent.parent
BENTOFILES = {"cpu": ROOT / "bentofile.yaml", "cuda": ROOT / "bentofile.cuda.yaml"}
DIGITS = 12


def build(variant: str, model: str | None) -> str:
    """Build the Bento unless the store has it; returns its tag. Raises ModelError, CalledProcessError."""
    options: dict[str, Any] = yaml.safe_load(BENTOFILES[variant].read_text())
    if model is not None:
        options["models"] = [store(resolve_model(model))]
        options["docker"]["env"] |= {
            "NANOVLLM_MODEL": options["models"][0],
            "NANOVLLM_SERVED_MODEL_NAME": Path(model).name if Path(model).exists() else model,
        }
    tag = f"{options['name']}:{version(options)}"
    try:
        bentoml.bentos.get(tag)
        return tag
    except NotFound:
        pass
    # The service's description in a Bento is of the device it is for, not of this machine; nor of what is set here.
    env = {name: value for name, value in os.environ.items() if not name.startswith("NANOVLLM_")}
    env["NANOVLLM_DEVICE"] = options["docker"]["env"]["NANOVLLM_DEVICE"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as bentofile:
        yaml.safe_dump(options, bentofile, sort_keys=False)
        bentofile.flush()
        command = [sys.executable, "-m", "bentoml", "build", "-f", bentofile.name, "--version", tag.partition(":")[2]]
        subprocess.run([*command, "-o", "tag", "."], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return tag


def version(options: dict[str, Any]) -> str:
    """The package's version and a digest of all that the Bento is made of: the same sources have the same version."""
    digest = hashlib.sha256(yaml.safe_dump(options).encode())
    digest.update(bentoml.__version__.encode())
    sources = {path for pattern in options["include"] for path in ROOT.glob(pattern)}
    sources |= {ROOT / options["python"]["requirements_txt"], ROOT / options["docker"]["dockerfile_template"]}
    for path in sorted(sources):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"{nanovllm_bento.__version__}-{digest.hexdigest()[:DIGITS]}"


def store(files: ModelFiles) -> str:
    """Put a model's files into BentoML's model store unless they are there; returns its tag, name:digest."""
    found = [files.path] if files.path.is_file() else sorted(p for p in files.path.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for path in found:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    name = files.name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").removesuffix(".gguf")
    tag = f"{name.partition(':')[0]}:{digest.hexdigest()[:DIGITS]}"
    try:
        bentoml.models.get(tag)
    except NotFound:
        with bentoml.models.create(tag, labels={"project": "nanovllm_bento"}) as model:
            for path in found:  # a Hub's cache holds links
                shutil.copyfile(path, Path(model.path) / path.name)
    return tag


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(BENTOFILES), default="cpu")
    parser.add_argument("--model", help="model to put into the Bento: demo, a folder, a .gguf file, a Hub id")
    options = parser.parse_args()
    try:
        print(build(options.variant, options.model or None))
    except (NanoVLLMError, subprocess.CalledProcessError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
