"""Which GPUs a service needs, and which of them its processes see under BentoML.

BentoML gives *all* workers one CUDA_VISIBLE_DEVICES, made of as many devices as ``resources.gpu`` says, unless that
variable (or BENTOML_DISABLE_GPU_ALLOCATION) is set for ``bentoml serve`` itself. The engine inherits its devices from
the main process, or, restarted, from a worker: so ``resources.gpu`` is the number that the engine needs, no less. No
torch here: devices are counted by NVML, as BentoML counts them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm_bento.config import EngineConfig, ServiceConfig
from nanovllm_bento.errors import ConfigError

_NO_ALLOCATION = "BENTOML_DISABLE_GPU_ALLOCATION"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MAX_WORKERS, _CORES_PER_WORKER = 4, 4


def gpus_needed(config: EngineConfig) -> int:
    """Devices of one engine: tensor_parallel_size × data_parallel_size; none where the device is the CPU."""
    return 0 if config.device == "cpu" else config.tensor_parallel_size * config.data_parallel_size


def service_resources(config: EngineConfig, num_gpus: int | None = None) -> dict[str, Any]:
    """``resources`` of the BentoML service. num_gpus: devices of this machine; None counts them.

    With device="auto" a machine without a GPU asks for none: BentoML would warn, and serve on the CPU all the same.
    For a Bento that is built on such a machine and deployed elsewhere set NANOVLLM_DEVICE=cuda.
    """
    needed = gpus_needed(config)
    if config.device == "auto" and needed and not (count_gpus() if num_gpus is None else num_gpus):
        needed = 0
    return {"gpu": needed} if needed else {}


def num_workers(config: ServiceConfig, engine_config: EngineConfig, num_cores: int | None = None) -> int:
    """How many API workers to start. num_cores: CPUs of this process; None counts them, with the cgroup's quota.

    One worker sends some 15,000 events a second; a decode step of 256 sequences on an H100 makes 36,000.
    """
    if config.workers is not None:
        return config.workers
    if not service_resources(engine_config):
        return 1
    return min(_MAX_WORKERS, max(1, (usable_cores() if num_cores is None else num_cores) // _CORES_PER_WORKER))


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs that this process may use: its affinity, and the CPU quota of a container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def count_gpus() -> int:
    """NVIDIA GPUs of this machine; 0 without a driver."""
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except (pynvml.NVMLError, OSError):
        return 0


def worker_devices(config: EngineConfig, num_gpus: int, env: Mapping[str, str] | None = None) -> str | None:
    """CUDA_VISIBLE_DEVICES of the workers of a service alone on its machine; None: not set, they see every device."""
    env = os.environ if env is None else env
    if _VISIBLE in env:
        return env[_VISIBLE]
    needed = service_resources(config, num_gpus).get("gpu", 0)
    if not needed or _NO_ALLOCATION in env:
        return None
    return ",".join(map(str, range(needed)))


def visible_gpus(num_gpus: int, env: Mapping[str, str] | None = None) -> int:
    """How many of the machine's devices a process with this environment sees.

    As CUDA does, the list of CUDA_VISIBLE_DEVICES ends at the first entry that names no device.
    """
    listed = (os.environ if env is None else env).get(_VISIBLE)
    if listed is None:
        return num_gpus
    seen = 0
    for entry in listed.split(","):
        entry = entry.strip()
        if not entry.startswith(("GPU-", "MIG-")) and not (entry.isdecimal() and int(entry) < num_gpus):
            break
        seen += 1
    return seen


def check_devices(config: EngineConfig, num_gpus: int | None = None, env: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError if the engine would see fewer devices than it needs."""
    total = count_gpus() if num_gpus is None else num_gpus
    needed, seen = gpus_needed(config), visible_gpus(total, env)
    if config.device == "auto" and (needed == 1 or not total):
        return  # a CPU will do
    if seen < needed:
        listed = (os.environ if env is None else env).get(_VISIBLE)
        why = f" ({_VISIBLE}={listed} of {total})" if listed is not None else ""
        raise ConfigError(
            f"device={config.device}, tensor_parallel_size={config.tensor_parallel_size} × data_parallel_size="
            f"{config.data_parallel_size}: {needed} GPU{'s' if needed > 1 else ''} needed, {seen} visible{why}."
        )


def explain_devices(config: EngineConfig, num_gpus: int | None = None, env: Mapping[str, str] | None = None) -> str:
    """One line for ``nanovllm-bento doctor``: what is needed, what is there, what workers and engine inherit."""
    env = os.environ if env is None else env
    total = count_gpus() if num_gpus is None else num_gpus
    needed = service_resources(config, total).get("gpu", 0)
    there = f"needs {needed}, this machine has {total}"
    if _VISIBLE in env:
        inherit = (
            f"{_VISIBLE}={env[_VISIBLE]!r} is set: workers and engine inherit it ({visible_gpus(total, env)} seen)"
        )
    elif not needed:
        inherit = f"{_VISIBLE} stays unset for workers and engine"
    elif _NO_ALLOCATION in env:
        inherit = f"{_NO_ALLOCATION} is set: workers and engine see all"
    else:
        inherit = f"BentoML gives all workers {_VISIBLE}={worker_devices(config, total, env)}"
    try:
        check_devices(config, total, env)
    except ConfigError as error:
        return f"{there}; {inherit}. NOT ENOUGH: {error}"
    return f"{there}; {inherit}"
