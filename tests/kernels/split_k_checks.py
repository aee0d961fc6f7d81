"""What tests of split_k's kernel state, in Triton's interpreter and on a GPU alike: results against float64."""

import torch

from nanovllm_bento.kernels.split_k import Config
from nanovllm_bento.kernels.split_k_triton import launch
from tests.kernels.skinny_checks import TOLERANCE, make_inputs, relative_error, wanted64

OPERATIONS = ["linear", "linear_parts", "gate_up"]


def check_equals_float64(
    operation: str, m: int, n: int, k: int, dtype: torch.dtype, device: str, config: Config, *, bias: bool = False
) -> None:
    inputs = make_inputs(operation, m, n, k, dtype, device, bias)
    parts = operation == "linear_parts"
    out = torch.full((config.splits, m, n), float("nan"), dtype=torch.float32 if parts else dtype, device=device)
    found = launch(operation, inputs["x"], inputs["weight"], out, config, inputs["bias"])
    assert found is out
    tolerance = 1e-5 if parts else TOLERANCE[dtype]  # parts are not rounded to x's dtype
    assert relative_error(found.sum(0), wanted64(inputs)) < tolerance  # NaN is not smaller


def check_each_part_is_of_its_share(m: int, n: int, k: int, dtype: torch.dtype, device: str, config: Config) -> None:
    inputs = make_inputs("linear_parts", m, n, k, dtype, device, True)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    out = x.new_full((config.splits, m, n), float("nan"), dtype=torch.float32)
    launch("linear_parts", x, weight, out, config, bias)
    shares = zip(x.double().chunk(config.splits, -1), weight.double().chunk(config.splits, -1), strict=True)
    wanted = torch.stack([a @ b.T for a, b in shares])
    wanted[0] += bias.double()
    assert relative_error(out, wanted) < 1e-5
