"""What the two Triton attention kernels share: in which dtype and how exactly they multiply."""

import torch
import triton.language as tl

LOG2E = 1.4426950408889634


def dot_dtype(dtype: torch.dtype, fp8_cache: bool, device: torch.device) -> tl.dtype:
    """The dtype that both operands of a product are converted to; sums are float32 always.

    An fp8 cache is multiplied in float16, which holds every e4m3 value (and q, normalised, far below its 65504).
    Triton's interpreter, the only way to get here on a CPU, multiplies bfloat16 and fp8 wrongly: float32 there.
    """
    if dtype == torch.float32 or device.type == "cpu":
        return tl.float32
    if fp8_cache:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def dot_precision(dtype: torch.dtype) -> str:
    """float32 without TF32; the value is not looked at for shorter dtypes."""
    return "ieee" if dtype == torch.float32 else "tf32"
