"""Whether FlashAttention really runs a case here: tried once in a process of its own, the answer kept on disk.

A build may lack a head_dim or a dtype, and some builds then end the whole process at launch instead of raising. So the
trial must not run in an engine; and as it takes seconds, an engine's start must not wait for it twice.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

TIMEOUT = 120.0
"""Seconds a trial may take."""
_TRIAL = 2
"""Which form of FlashAttention.trial an answer is of."""


def probe(
    module: str, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int
) -> str | None:
    """None if FlashAttention (its ``module``) runs the case on this GPU, else the reason why not."""
    case: list[str | int] = [module, num_heads, num_kv_heads, head_dim, str(dtype).removeprefix("torch."), block_size]
    key = json.dumps([*case, _TRIAL, _fingerprint(module), torch.cuda.get_device_name(), torch.__version__])
    cache = _cache_file()
    known = _read(cache)
    if key in known:
        return known[key]
    reason, lasting = _try(case)
    if lasting:
        known[key] = reason
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(cache)
        except OSError:
            pass  # asked again next time
    return reason


def _read(cache: Path) -> dict[str, str | None]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _try(case: list[str | int]) -> tuple[str | None, bool]:
    """(reason, whether it will be the same next time: not so where the GPU was busy, full or slow)."""
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, json.dumps(case)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"a trial did not end within {TIMEOUT:.0f} s", False
    answer = done.stdout.strip().splitlines()
    reason: str | None
    if done.returncode == 0 and answer:
        reason = json.loads(answer[-1])
    else:
        said = done.stderr.strip().splitlines()
        reason = f"a trial ended its process ({said[-1] if said else f'exit status {done.returncode}'})"
    return reason, reason is None or not re.search(r"out of memory|busy|unavailable", reason, re.IGNORECASE)


def _fingerprint(module: str) -> list[object]:
    """What changes when the library is another build: file, size and time of its module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its package is not there
        spec = None
    if spec is None or spec.origin is None:
        return []
    stat = os.stat(spec.origin)
    return [spec.origin, stat.st_size, stat.st_mtime]


def _cache_file() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = os.environ.get("NANOVLLM_CACHE") or base / "nanovllm_bento"  # as hub.py's, which kernels do not import
    return Path(home) / "flash_attn.json"


def main() -> None:
    """The child: runs one small step of each kind and prints the answer as JSON."""
    from nanovllm_bento.kernels.attention.flash_backend import FlashAttention

    _, num_heads, num_kv_heads, head_dim, dtype, block_size = json.loads(sys.argv[1])
    device = torch.device("cuda")
    backend = FlashAttention(block_size, device)
    print(json.dumps(backend.trial(num_heads, num_kv_heads, head_dim, getattr(torch, dtype), block_size, device)))


if __name__ == "__main__":
    main()
