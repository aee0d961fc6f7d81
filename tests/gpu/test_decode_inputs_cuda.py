import pytest
import torch

from nanovllm_bento.kernels.decode_inputs import decode_inputs
from tests.kernels.decode_inputs_checks import check_decode_inputs


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_decode_inputs_equal_the_reference(block_size: int) -> None:
    check_decode_inputs(decode_inputs, torch.device("cuda"), block_size)
