"""What tests of the skinny linears state, in Triton's interpreter and on a GPU alike: results against float64."""

from typing import Any

import torch
from torch import Tensor

from nanovllm_bento.kernels.skinny import Config, is_gated
from nanovllm_bento.kernels.skinny_triton import launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPERATIONS = ["linear", "linear_add", "norm_linear", "norm_gate_up", "gate_up"]
EPS = 1e-2  # large enough to show


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def make_inputs(operation: str, m: int, n: int, k: int, dtype: torch.dtype, device: str, bias: bool) -> dict[str, Any]:
    """Arguments of launch. x is a slice of something wider, and what lies beside it is NaN; so is the unwritten out."""
    wide = torch.full((m, k + 16), float("nan"), dtype=dtype, device=device)
    x = wide[:, :k]
    x.copy_(torch.randn(m, k, device=device) * torch.linspace(0.5, 2, m, device=device)[:, None])
    rows = 2 * n if is_gated(operation) else n
    out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    if operation == "linear_add":
        out.normal_()
    return {
        "operation": operation,
        "x": x,
        "weight": (torch.randn(rows, k, device=device) / k**0.5).to(dtype),
        "out": out,
        "norm_weight": torch.rand(k, device=device).to(dtype) + 0.5 if operation.startswith("norm") else None,
        "eps": EPS,
        "bias": torch.randn(n, device=device).to(dtype) if bias else None,
    }


def wanted64(inputs: dict[str, Any]) -> Tensor:
    """The operation in float64, except that a norm rounds to x's dtype where rms_norm_reference does."""
    x, weight, dtype = inputs["x"].double(), inputs["weight"].double(), inputs["x"].dtype
    if inputs["norm_weight"] is not None:
        x = x / (x.square().mean(-1, keepdim=True) + inputs["eps"]).sqrt()
        x = (x.to(dtype) * inputs["norm_weight"]).double()
    y: Tensor = x @ weight.T
    if inputs["bias"] is not None:
        y = y + inputs["bias"].double()
    if is_gated(inputs["operation"]):
        gate, up = y.chunk(2, -1)
        y = gate / (1 + (-gate).exp()) * up
    if inputs["operation"] == "linear_add":
        y = y + inputs["out"].double()
    return y


def assert_equals_float64(
    operation: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: str,
    config: Config | None = None,
    bias: bool = False,
    tolerance: float = 0.0,
) -> None:
    inputs = make_inputs(operation, m, n, k, dtype, device, bias)
    wanted = wanted64(inputs)
    found = launch(**inputs, config=config)
    assert found is inputs["out"]
    assert relative_error(found, wanted) < (tolerance or TOLERANCE[dtype])  # NaN is not smaller


def assert_rows_do_not_depend_on_the_batch(
    operation: str, n: int, k: int, dtype: torch.dtype, device: str, config: Config
) -> None:
    inputs = make_inputs(operation, 5, n, k, dtype, device, bias=False)
    before = inputs["out"].clone()
    together = launch(**inputs, config=config).clone()
    for row in range(5):
        alone = inputs | {"x": inputs["x"][row : row + 1], "out": before[row : row + 1].clone()}
        assert torch.equal(launch(**alone, config=config), together[row : row + 1])
