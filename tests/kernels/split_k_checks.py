"""What tests of split_k's kernel state, in Triton's interpreter and on a GPU alike: results against float64."""

import torch
from torch import Tensor

from nanovllm_bento.kernels.split_k import Config, is_gated
from nanovllm_bento.kernels.split_k_triton import launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPERATIONS = ["linear", "linear_parts", "gate_up"]


def make_inputs(
    operation: str, m: int, n: int, k: int, dtype: torch.dtype, device: str, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias. x is a slice of something wider, and what lies beside it and after it is NaN."""
    x = torch.full((m + 1, k + 16), float("nan"), dtype=dtype, device=device)[:m, :k]
    x.copy_(torch.randn(m, k, device=device) * torch.linspace(0.5, 2, m, device=device)[:, None])
    weight = (torch.randn(2 * n if is_gated(operation) else n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype) if bias else None


def wanted64(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = x.double() @ weight.double().T
    if is_gated(operation):
        gate, up = y.chunk(2, -1)
        y = gate / (1 + (-gate).exp()) * up
    return y if bias is None else y + bias.double()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check_equals_float64(
    operation: str, m: int, n: int, k: int, dtype: torch.dtype, device: str, config: Config, *, bias: bool = False
) -> None:
    inputs = make_inputs(operation, m, n, k, dtype, device, bias=bias)
    parts = operation == "linear_parts"
    out = torch.full((config.splits, m, n), float("nan"), dtype=torch.float32 if parts else dtype, device=device)
    found = launch(operation, *inputs[:2], out, config, inputs[2])
    assert found is out
    tolerance = 1e-5 if parts else TOLERANCE[dtype]  # parts are not rounded to x's dtype
    assert relative_error(found.sum(0), wanted64(operation, *inputs)) < tolerance  # NaN is not smaller


def check_each_part_is_of_its_share(m: int, n: int, k: int, dtype: torch.dtype, device: str, config: Config) -> None:
    x, weight, bias = make_inputs("linear_parts", m, n, k, dtype, device, bias=True)
    assert bias is not None
    out = x.new_full((config.splits, m, n), float("nan"), dtype=torch.float32)
    launch("linear_parts", x, weight, out, config, bias)
    shares = zip(x.double().chunk(config.splits, -1), weight.double().chunk(config.splits, -1), strict=True)
    wanted = torch.stack([a @ b.T for a, b in shares])
    wanted[0] += bias.double()
    assert relative_error(out, wanted) < 1e-5
