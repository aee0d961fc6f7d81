"""Where each tensor of a checkpoint goes. Layers describe it, the loader follows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Checkpoint tensor ``name`` of ``shape`` fills rows [row, row + shape[0]) of parameter ``attr`` of ``module``.

    shard_dim: the dimension that tensor-parallel ranks will split (None: each holds it whole).
    """

    name: str
    module: nn.Module
    attr: str
    shape: tuple[int, ...]
    row: int = 0
    shard_dim: int | None = None

    @property
    def target(self) -> Tensor:
        """The rows to fill, a view of the parameter as it is now."""
        whole: Tensor = getattr(self.module, self.attr)
        return whole.data[self.row : self.row + self.shape[0]]


def meta_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory (meta device) and without gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give every parameter of ``module`` memory on ``device``, uninitialised.

    As Module.to_empty, which through empty_like imports sympy: half a second here, two and a half on a slow disk.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, requires_grad=False))
