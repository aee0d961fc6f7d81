"""Memory of every rank's GPU that the kernels of all ranks can read and write: CUDA IPC through the driver.

torch.distributed's symmetric memory does the same, but it asks for a process group in torch's global registry, which
belongs to the user's process, in ways that differ between versions, and it makes NVLink multicast objects where it can.
The few functions used here are part of the driver's stable interface.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LAZY_ENABLE_PEER_ACCESS = 1


class PeerMemoryError(Exception):
    """Why the ranks' GPUs cannot share memory, rank by rank."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


@dataclass(slots=True, eq=False)
class PeerMemory:
    """addresses: where each rank's block lies in this process, in the order of the ranks; empty once closed."""

    rank: int
    device: torch.device
    addresses: list[int]

    @classmethod
    def share(cls, store: Any, rank: int, size: int, device: torch.device, num_bytes: int, fill: int) -> "PeerMemory":
        """Every rank gives num_bytes (a multiple of 4), filled with the 32-bit word ``fill``. Blocks for the others.

        store: a torch.distributed Store in which the ranks meet, used for nothing else. Raises PeerMemoryError, on all
        ranks, where it fails on one.
        """
        own = 0

        def export() -> bytes:
            nonlocal own
            own = _allocate(num_bytes, fill)
            handle = _IpcHandle()
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(own))
            return bytes(handle)

        memory = cls(rank, device, [])
        try:
            with torch.cuda.device(device):
                torch.cuda.synchronize()  # makes the device's context, in which the driver's functions work
                handles = _agree(store, "handle", rank, size, export)

                def open_all() -> bytes:
                    for other, handle in enumerate(handles):
                        memory.addresses.append(own if other == rank else _open(handle))
                    return b""

                _agree(store, "opened", rank, size, open_all)
        except PeerMemoryError:
            memory.close()
            raise
        return memory

    def close(self) -> None:
        """Let go of the peers' memory; no kernel may use it any more.

        This rank's own stays until its process ends: freeing what another process still maps is undefined, and
        whether one does cannot be known when ranks end in any order.
        """
        addresses, self.addresses = self.addresses, []
        with torch.cuda.device(self.device):
            for other, address in enumerate(addresses):
                if other != self.rank:
                    try:
                        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
                    except PeerMemoryError:
                        pass  # the device has failed; there is nothing left to give back


def _agree(store: Any, step: str, rank: int, size: int, act: Callable[[], bytes]) -> list[bytes]:
    """What ``act`` returned on each rank; raises PeerMemoryError if it raised one, or OSError, on any."""
    try:
        store.set(f"{step}/{rank}", "+" + act().hex())
    except (OSError, PeerMemoryError) as error:
        store.set(f"{step}/{rank}", f"-{error}")
    answers = [bytes(store.get(f"{step}/{other}")).decode() for other in range(size)]
    failed = [f"rank {other}: {answer[1:]}" for other, answer in enumerate(answers) if answer[0] == "-"]
    if failed:
        raise PeerMemoryError("; ".join(failed))
    return [bytes.fromhex(answer[1:]) for answer in answers]


def _allocate(num_bytes: int, fill: int) -> int:
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
    _call("cuMemsetD32_v2", address, ctypes.c_uint32(fill & 0xFFFFFFFF), ctypes.c_size_t(num_bytes // 4))
    torch.cuda.synchronize()
    return address.value


def _open(handle: bytes) -> int:
    address = ctypes.c_uint64()
    given = _IpcHandle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS))
    return address.value


def _call(function: str, *arguments: Any) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    status = getattr(driver, function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        raise PeerMemoryError(f"{function}: {(name.value or b'unknown error').decode()} ({status})")
