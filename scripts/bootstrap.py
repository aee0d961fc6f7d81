#!/usr/bin/env python3
"""Makes .venv with the pinned, known-good set, and does nothing (fast) when it is there already.

    python3 scripts/bootstrap.py [runtime|dev|bench] [--venv .venv] [--python python3.12]

Standard library only. PyTorch is the one delicate package: on a machine with an NVIDIA GPU the usual build is
installed; on any other the CPU build, never gigabytes of CUDA. Which one pip would take depends on how pip is
configured, so it is asked first (a dry run): if that resolves without CUDA packages, it is used as it is; if not, uv
fetches the CPU build, because uv knows where PyTorch keeps it. A Python for which no build can be had is passed over.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
TORCH = "2.13.0"
SUPPORTED = ((3, 11), (3, 13))
CANDIDATES = ("python3.12", "python3.11", "python3.13", "python3", "python")
EXTRAS = {"runtime": set(), "dev": {"dev"}, "bench": {"bench"}}
STAMP = "nanovllm-bootstrap.json"
PIP_QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}


class BootstrapError(Exception):
    """What went wrong, and what to do about it."""


def say(text: str) -> None:
    print(f"[bootstrap] {text}", flush=True)


def run(command: "list[str]", *, capture: bool = False) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **PIP_QUIET},
        text=True,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if capture else None,
    )


def fingerprint() -> str:
    """Changes when anything that decides what is installed changes."""
    digest = hashlib.sha256(str(ROOT).encode())  # an editable install points here
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> "dict[str, object]":
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def python_version(python: str) -> "tuple[int, int] | None":
    """(major, minor) of an interpreter that really runs and can make environments; None for any other.

    Version managers leave shims on PATH for versions that are not active; those exist but fail.
    """
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30)
        major, minor = map(int, done.stdout.split()) if done.returncode == 0 else (0, 0)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return (major, minor) if major else None


def is_supported(version: "tuple[int, int]") -> bool:
    return SUPPORTED[0] <= version <= SUPPORTED[1]


def has_nvidia_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def is_cuda_package(name: str) -> bool:
    """Whether a package is a part of CUDA (nvidia-ml-py only asks a driver, if there is one)."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    return name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"


def installed_torch(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('torch'))"
    return run([str(python), "-c", code], capture=True).stdout.strip().partition("+")[0]


def install_torch(python: Path) -> None:
    """Raises BootstrapError if no build that fits this machine can be had for this Python."""
    if installed_torch(python) == TORCH:
        return
    pip = [str(python), "-m", "pip"]
    constrain = ["-c", str(CONSTRAINTS)]
    if has_nvidia_gpu():
        say(f"installing torch {TORCH} for the NVIDIA GPU of this machine")
        if run([*pip, "install", *constrain, f"torch=={TORCH}"]).returncode:
            raise BootstrapError(f"pip could not install torch=={TORCH}; its message is above.")
        return
    say(f"asking pip what torch {TORCH} would bring")
    plan = run([*pip, "install", "--dry-run", "--quiet", "--report", "-", *constrain, f"torch=={TORCH}"], capture=True)
    if plan.returncode == 0:
        names = [item["metadata"]["name"] for item in json.loads(plan.stdout)["install"]]
        cuda = sorted(filter(is_cuda_package, names))
        if not cuda:
            say(f"installing torch {TORCH} (CPU)")
            if run([*pip, "install", *constrain, f"torch=={TORCH}"]).returncode:
                raise BootstrapError(f"pip could not install torch=={TORCH}; its message is above.")
            return
        say(
            f"pip would install CUDA ({len(cuda)} packages) on a machine without a GPU; taking the CPU build through uv"
        )
    else:
        last = (plan.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"pip finds no torch {TORCH} for this Python ({last}); trying uv")
    if run([*pip, "install", "--quiet", *constrain, "uv"]).returncode:
        raise BootstrapError("pip could not install uv, which fetches the CPU build of torch.")
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), "--torch-backend=cpu"]
    if run([*uv, *constrain, f"torch=={TORCH}"]).returncode:
        raise BootstrapError(
            f"no CPU build of torch {TORCH} could be had for this Python. Remedy: install it yourself into the "
            f"environment ({python} -m pip install torch=={TORCH}, with --index-url or --find-links naming where "
            "your CPU wheel lies; PyTorch's page 'Get Started' names its own index) and run this again."
        )


def make_venv(python: str, venv: Path) -> None:
    if venv.exists():
        if not (venv / "pyvenv.cfg").exists():
            raise BootstrapError(f"{venv} exists and is not a virtual environment. Remove it or choose VENV=….")
        shutil.rmtree(venv)
    if run([python, "-m", "venv", str(venv)]).returncode:
        raise BootstrapError(f"{python} could not make a virtual environment in {venv}.")


def prepare(venv: Path, wanted: "str | None") -> Path:
    """The environment's interpreter, with torch installed; tries one Python after another until torch is there."""
    inside = venv / "bin" / "python"
    asked = python_version(wanted) if wanted else None
    have = python_version(str(inside)) if inside.exists() else None
    if have and is_supported(have) and (asked is None or asked == have):
        install_torch(inside)
        return inside
    tried: list[str] = []
    seen: set[tuple[int, int]] = set()
    for candidate in (wanted,) if wanted else CANDIDATES:
        version = python_version(candidate)
        if version is None:
            tried.append(f"{candidate}: does not run, or lacks venv (on Debian: install python3-venv)")
            continue
        if not is_supported(version):
            tried.append(f"{candidate}: is {version[0]}.{version[1]}")
            continue
        if version in seen:
            continue
        seen.add(version)
        say(f"making {venv.name} with {candidate} ({version[0]}.{version[1]})")
        try:
            make_venv(candidate, venv)
            install_torch(inside)
            return inside
        except BootstrapError as error:
            tried.append(f"{candidate}: {error}")
    low, high = (".".join(map(str, v)) for v in SUPPORTED)
    raise BootstrapError(
        f"no suitable Python ({low} to {high}) with torch {TORCH} found. Tried:\n  " + "\n  ".join(tried) + "\n"
        "Install one of them, or name one: make PYTHON=/path/to/python3.12 …"
    )


def bootstrap(group: str, venv: Path, wanted: "str | None") -> None:
    inside = venv / "bin" / "python"
    stamp = read_stamp(venv)
    extras = set(EXTRAS[group])
    if stamp.get("fingerprint") == fingerprint() and inside.exists():
        before = {str(extra) for extra in stamp["extras"]}  # type: ignore[attr-defined]
        if extras <= before:
            return
        extras |= before
    started = time.monotonic()
    python = prepare(venv, wanted)
    target = f".[{','.join(sorted(extras))}]" if extras else "."
    say(f"installing nanovllm_bento {target.removeprefix('.')} and its pinned dependencies")
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), "-e", target]
    if run(command).returncode:
        raise BootstrapError("pip could not install the dependencies; its message is above.")
    (venv / STAMP).write_text(json.dumps({"fingerprint": fingerprint(), "extras": sorted(extras)}))
    say(f"ready in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", default="runtime", choices=sorted(EXTRAS))
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--python", help="interpreter to use; default: the first of python3.12, 3.11, 3.13 that works")
    options = parser.parse_args()
    wanted = options.python or os.environ.get("PYTHON")
    try:
        bootstrap(options.group, ROOT / options.venv, wanted)
    except BootstrapError as error:
        print(f"[bootstrap] failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
