import pytest
import torch

from nanovllm_bento.kernels.decode_inputs_triton import launch_decode_inputs
from tests.kernels.decode_inputs_checks import check_decode_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_decode_inputs_equal_the_reference(block_size: int) -> None:
    check_decode_inputs(launch_decode_inputs, CPU, block_size)
