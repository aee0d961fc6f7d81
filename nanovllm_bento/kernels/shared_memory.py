"""How the kernels of a decode step divide a multiprocessor's memory: what they share of it, and its L1 cache.

Programmatic dependent launch lets a kernel start beside the one ahead, and ask for its weights. But on a multiprocessor
only kernels of one division can run at a time: to change it, all of one must have ended. Left alone, the driver gives
each kernel a division that suits that one, and the kernels of a decode step hardly overlapped. Here all of them get the
same while a step is captured in a CUDA graph, which keeps it.

Best is the smallest shared memory that holds all programs of attention at once, if a multiprocessor can: with less they
come in two waves, and more leaves no L1 cache.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from nanovllm_bento.kernels.launch import has_triton

DRIVERS_CHOICE = -1
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # CUfunction_attribute

TUNED: dict[tuple[int, int], list[tuple[int, int]]] = {
    (1024, 2): [(1, 43), (2, 71), (8, 57), (16, 43), (48, 57), (64, 43)],
    (1024, 1): [(2, 43), (40, 57)],
    (4096, 2): [(2, 43)],
}
"""(Hidden size, bytes of a number in the KV cache) -> (up to so many rows, percent of the most there can be). More
rows: the driver's choice, which was no worse. Qwen3-0.6B's and 8B's shapes on an H100 (benchmarks/decode_rows.py)."""


def choose_percent(rows: int, hidden_size: int, kv_itemsize: int) -> int:
    """Percent of the largest shared memory for a decode step of ``rows`` rows."""
    measured = TUNED.get((hidden_size, kv_itemsize), [])
    return next((percent for most, percent in measured if rows <= most), DRIVERS_CHOICE)


class _Kernels:
    """Every Triton kernel that was loaded since this came to be, as the driver's handle, and what they prefer now."""

    def __init__(self) -> None:
        from triton import knobs

        self.percent, self.handles = DRIVERS_CHOICE, list[int]()
        self._driver = ctypes.CDLL("libcuda.so.1")
        knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def prefer(self, percent: int) -> None:
        self.percent = percent
        for handle in self.handles:
            self._set(handle)

    def _loaded(self, module: int, function: int, name: str, *rest: Any) -> None:
        self.handles.append(function)
        if self.percent != DRIVERS_CHOICE:
            self._set(function)

    def _set(self, handle: int) -> None:
        function, percent = ctypes.c_void_p(handle), ctypes.c_int(self.percent)
        code = self._driver.cuFuncSetAttribute(function, _PREFERRED_SHARED_MEMORY_CARVEOUT, percent)
        if code != 0:
            raise RuntimeError(f"cuFuncSetAttribute failed with CUDA driver error {code}.")


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
    kernels.prefer(percent)
    try:
        yield
    finally:
        kernels.prefer(DRIVERS_CHOICE)
