"""GGUF files: their metadata and where their tensors lie. A leaf, without torch, used by hub, text and models.

Written after the format's description in ggml's docs/gguf.md. Arrays (a vocabulary has a hundred thousand strings) are
stepped over and decoded only when asked for, so that opening a file takes milliseconds.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm_bento.errors import CorruptFileError, ModelNotFoundError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_NATIVE_TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 30: (1, 2)}
"""ggml type -> (elements in a block, bytes of a block), for F32, F16, Q4_0, Q4_1, Q8_0 and BF16."""


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array that was not decoded: ``count`` elements of GGUF type ``element`` from byte ``offset`` on."""

    element: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: outermost dimension first, as in torch. kind: ggml's type number. offset: bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    num_bytes: int


@dataclass(slots=True)
class GGUFFile:
    """metadata: scalars, strings and undecoded arrays by key; data: the whole file, memory-mapped."""

    path: Path
    data: mmap.mmap
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)

    def array(self, key: str) -> list[Any]:
        """The elements of the array at ``key``."""
        array: GGUFArray = self.metadata[key]
        return _Cursor(self.data, array.offset).array(array.element, array.count)

    def decoded(self) -> dict[str, Any]:
        """All metadata, arrays as lists (0.1 s for a vocabulary)."""
        return {k: self.array(k) if isinstance(v, GGUFArray) else v for k, v in self.metadata.items()}


class _Cursor:
    """Reads GGUF's little-endian values one after the other; struct.error or ValueError beyond the file's end."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            raise ValueError(f"{num_bytes} bytes from byte {self.at} on lie beyond its end")
        self.at += num_bytes

    def string(self) -> str:
        """Bytes that are not UTF-8 are kept as lone surrogates."""
        (length,) = _LENGTH.unpack_from(self.data, self.at)
        self.at += _LENGTH.size
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        element, count = self.number("I"), self.number("Q")
        array = GGUFArray(element, count, self.at)
        if element in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            unpack, data, at = _LENGTH.unpack_from, self.data, self.at
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self.at = at
        else:
            raise ValueError(f"arrays of value type {element} are not known")
        return array

    def array(self, element: int, count: int) -> list[Any]:
        if element == _STRING:
            return [self.string() for _ in range(count)]
        return list(struct.unpack_from(f"<{count}{_SCALARS[element]}", self.data, self.at))


def open_gguf(path: str | Path) -> GGUFFile:
    """Open and check a GGUF file (version 2 or 3, little-endian).

    Raises ModelNotFoundError if there is none, CorruptFileError if it is truncated or no GGUF file.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist.")
    with path.open("rb") as f:
        try:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise CorruptFileError(f"{path} is empty, not a GGUF file. Fetch it again.") from e
    if data[:4] != b"GGUF":
        raise CorruptFileError(f"{path} is not a GGUF file: it begins with {data[:4]!r}. Fetch it again.")
    file = GGUFFile(path, data)
    try:
        _parse(file)
    except (struct.error, ValueError, OverflowError, MemoryError) as e:
        raise CorruptFileError(f"{path} is truncated or not a GGUF file: {e}. Fetch it again.") from e
    return file


def _parse(file: GGUFFile) -> None:
    cursor = _Cursor(file.data, 4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not known (a big-endian file reads like that too)")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    for _ in range(num_values):
        key = cursor.string()
        file.metadata[key] = cursor.value(cursor.number("I"))
    found = []
    for _ in range(num_tensors):
        name = cursor.string()
        num_dims = cursor.number("I")
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
        found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = file.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = math.ceil(cursor.at / alignment) * alignment
    for name, shape, kind, offset in found:
        block, block_bytes = _block_size(kind)
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {shape} does not divide into blocks of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(file.data):
            raise ValueError(f"tensor {name} ends at byte {start + offset + num_bytes} of {len(file.data)}")
        file.tensors[name] = GGUFTensor(name, shape, kind, start + offset, num_bytes)


def _block_size(kind: int) -> tuple[int, int]:
    """(elements, bytes) of one block of a ggml type."""
    if kind in _NATIVE_TYPES:
        return _NATIVE_TYPES[kind]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return block, block_bytes
