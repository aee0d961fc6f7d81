"""Where a result was measured: hardware, versions, commit and command. Every result file holds this."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nanovllm_bento

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "bentoml", "numpy", "pyzmq")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
"""The CPU features that decide how fast a model can run."""


def environment() -> dict[str, Any]:
    """Hardware, software, commit and command line, ready for JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "nanovllm_bento": nanovllm_bento.__version__,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "gpu": gpu(),
        "packages": package_versions(),
    }


def command_line() -> str:
    """The command as one would type it: without the folders of this machine."""
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    program, module = Path(sys.argv[0]), getattr(sys.modules["__main__"], "__spec__", None)
    if program.name == "nanovllm-bento":
        return shlex.join([program.name, *arguments])
    if module is not None:  # of a package, by -m
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *arguments])
    return shlex.join(["python", os.path.relpath(program) if program.exists() else program.name, *arguments])


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter for speed; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """Model, features that matter, cores this process may use, memory in GiB; if torch is loaded, how it sees it."""
    fields = _proc_fields("/proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    torch = sys.modules.get("torch")
    memory = _proc_fields("/proc/meminfo").get("MemTotal", "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cores,
        "torch_threads": torch.get_num_threads() if torch else None,
        "torch_capability": torch.backends.cpu.get_cpu_capability() if torch else None,
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
    }


def gpu() -> list[dict[str, Any]]:
    """Every NVIDIA GPU: name, memory in MiB, driver. Empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [{"name": r[0], "memory_mib": int(r[1]), "driver": r[2]} for r in rows if len(r) == 3]


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether files differ from it; None outside of one."""
    root = Path(nanovllm_bento.__file__).parents[1]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / ".git").exists():
        return None
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Write a result to a JSON file (made with its folder); without a path, print it."""
    text = json.dumps(result, indent=2)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _proc_fields(path: str) -> dict[str, str]:
    """``name: value`` lines of a file in /proc; the first of each name. Empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields
