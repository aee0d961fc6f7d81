"""Where each tensor of a checkpoint goes, and which part of it a rank takes. Layers describe it, the loader follows."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from nanovllm_bento.layers.parallel import ParallelGroup

ALIGNMENT = 8
"""A rank's part of a dimension is padded to a multiple of so many elements: 16 bytes of a 16-bit type."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of a dimension of ``size``: [start, stop), and then zeros up to ``length`` elements."""

    size: int
    start: int
    stop: int
    length: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.size == self.length


def whole(size: int) -> Shard:
    """All of a dimension, as every rank holds it that does not share it."""
    return Shard(size, 0, size, size)


def split(size: int, group: ParallelGroup) -> Shard:
    """The rank's part of a dimension that is split evenly, in a length that is the same on all ranks.

    Where the size does not divide, the last ranks get less, even nothing, and zeros for the rest.
    """
    if group.size == 1:
        return whole(size)
    length = -(-size // (group.size * ALIGNMENT)) * ALIGNMENT
    return Shard(size, min(group.rank * length, size), min((group.rank + 1) * length, size), length)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Checkpoint tensor ``name`` of ``shape`` fills parameter ``attr`` of ``module`` from row ``row`` on.

    Of dimension ``shard_dim`` this rank takes [start, stop) only (None: it takes the tensor whole); that may be
    nothing, for a tensor which the checkpoint must hold but other ranks read. A parameter of more than two dimensions
    counts its rows over all but the last.
    """

    name: str
    module: nn.Module
    attr: str
    shape: tuple[int, ...]
    row: int = 0
    shard_dim: int | None = None
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, name: str, module: nn.Module, attr: str, dims: tuple[Shard, ...], row: int = 0) -> "WeightSpec":
        """The spec of a tensor with these dimensions, at most one of which is not whole."""
        shape = tuple(dim.size for dim in dims)
        for i, dim in enumerate(dims):
            if not dim.is_whole:
                return cls(name, module, attr, shape, row, i, dim.start, dim.stop)
        return cls(name, module, attr, shape, row)

    @property
    def part(self) -> tuple[slice, ...]:
        """Which part of the checkpoint's tensor this rank takes, as an index; () is all of it."""
        if self.shard_dim is None:
            return ()
        return (*(slice(0, size) for size in self.shape[: self.shard_dim]), slice(self.start, self.stop))

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of that part."""
        if self.shard_dim is None:
            return self.shape
        return (*self.shape[: self.shard_dim], self.stop - self.start, *self.shape[self.shard_dim + 1 :])

    @property
    def num_elements(self) -> int:
        """How many elements this rank takes."""
        return prod(self.part_shape)

    @property
    def target(self) -> Tensor:
        """What to fill, of ``part_shape``: a view of the parameter as it is now."""
        parameter: Tensor = getattr(self.module, self.attr).data
        if parameter.dim() > 2:
            parameter = parameter.view(-1, parameter.shape[-1])
        shape = self.part_shape
        rows = parameter[self.row : self.row + shape[0]]
        return rows if len(shape) == 1 else rows[:, : shape[1]]


def meta_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory (meta device) and without gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)


def allocate(module: nn.Module, specs: Iterable[WeightSpec], device: torch.device) -> None:
    """Give every parameter of ``module`` memory on ``device``: uninitialised, or zeros where the specs leave gaps.

    As Module.to_empty, which through empty_like imports sympy: half a second here, two and a half on a slow disk.
    """
    filled: defaultdict[tuple[nn.Module, str], int] = defaultdict(int)
    for spec in specs:
        filled[spec.module, spec.attr] += spec.num_elements
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            make = torch.empty if filled[part, name] == parameter.numel() else torch.zeros
            memory = make(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, requires_grad=False))
