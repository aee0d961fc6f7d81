"""What every Triton launch asks about the machine and the device."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return find_spec("triton") is not None


@cache
def use_pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` may use programmatic dependent launch (Hopper and later).

    A kernel launched so may start before the one before it has ended, and waits for it (gdc_wait) before it touches
    what that one wrote. What it loads earlier, weights above all, is then on its way while the other still runs.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
