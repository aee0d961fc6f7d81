"""How the kernels of a decode step divide a multiprocessor's memory: what they share of it, and its L1 cache.

Programmatic dependent launch lets a kernel start beside the one ahead, and ask for its weights. But on a multiprocessor
only kernels of one division can run at a time: to change it, all of one must have ended. Left alone, the driver gives
each kernel a division that suits that one, and the kernels of a decode step hardly overlapped. Here all of them get the
same while a step is captured in a CUDA graph, which keeps it.

As a rule the smallest shared memory is best that holds all programs of attention at once: with less they come in two
waves, and more leaves no L1 cache.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from nanovllm_bento.kernels.launch import has_triton

logger = logging.getLogger(__name__)

DRIVERS_CHOICE = -1
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # CUfunction_attribute


class Shape(NamedTuple):
    """What decides how much the kernels of a decode step hold."""

    hidden_size: int
    head_dim: int
    num_kv_heads: int
    kv_itemsize: int  # bytes of a number in the KV cache


TUNED: dict[Shape, list[tuple[int, int]]] = {
    Shape(1024, 128, 8, 2): [(1, 43), (2, 71), (11, 57), (16, 43), (48, 57), (64, 43)],
    Shape(1024, 128, 8, 1): [(2, 43), (32, 57)],
    Shape(4096, 128, 8, 2): [(2, 43)],
}
"""Shape -> (up to so many rows, percent of the most there can be); above, and elsewhere: the driver's choice.

Qwen3-0.6B's and 8B's on an H100 (benchmarks/decode_rows.py); with more rows it was no worse."""
CHOSEN_WITH_ATTENTION = {Shape(1024, 128, 8, 2)}
"""Where the configurations of attention were chosen with the division (FEW_PAIRS in attention/decode_triton.py)."""


def choose_percent(rows: int, shape: Shape) -> int:
    """Percent of the largest shared memory for a decode step of ``rows`` rows."""
    return next((percent for most, percent in TUNED.get(shape, []) if rows <= most), DRIVERS_CHOICE)


class _Kernels:
    """Every Triton kernel that was loaded since this came to be, as the driver's handle, and what they prefer now."""

    def __init__(self) -> None:
        from triton import knobs

        self.percent, self.handles = DRIVERS_CHOICE, dict[int, None]()
        self._driver, self._refused = ctypes.CDLL("libcuda.so.1"), False
        knobs.runtime.kernel_load_end_hook.add(self._loaded)
        if hasattr(knobs.runtime, "kernel_unload_hook"):  # of newer versions, which unload kernels
            knobs.runtime.kernel_unload_hook.add(self._unloaded)

    def prefer(self, percent: int) -> None:
        self.percent = percent
        for handle in self.handles:
            self._set(handle)

    def _loaded(self, module: int, function: int, *rest: Any) -> None:
        self.handles[function] = None
        if self.percent != DRIVERS_CHOICE:
            self._set(function)

    def _unloaded(self, module: int, function: int, *rest: Any) -> None:
        self.handles.pop(function, None)

    def _set(self, handle: int) -> None:
        function, percent = ctypes.c_void_p(handle), ctypes.c_int(self.percent)
        code = self._driver.cuFuncSetAttribute(function, _PREFERRED_SHARED_MEMORY_CARVEOUT, percent)
        if code != 0 and not self._refused:
            self._refused = True  # decode steps are slower then, no more
            logger.warning("cuFuncSetAttribute failed with CUDA driver error %d; kernels may overlap less", code)


@cache
def watch() -> _Kernels | None:
    """Note the kernels that Triton loads from now on; those of before keep the driver's choice. None without Triton."""
    return _Kernels() if has_triton() else None


@contextmanager
def prefer(percent: int) -> Iterator[None]:
    """Triton kernels launched or captured within prefer so much shared memory; to be used on one thread."""
    kernels = watch()
    if kernels is None or percent == DRIVERS_CHOICE:
        yield
        return
    try:
        kernels.prefer(percent)
        yield
    finally:
        kernels.prefer(DRIVERS_CHOICE)
