import pytest
import torch

from nanovllm_bento.kernels.linear import linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(4096, 1024), (1024, 3072), (151936, 1024), (100, 576)])
def test_a_row_of_the_invariant_product_does_not_depend_on_its_neighbours(n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, k, device="cuda").to(dtype)
    weight = (torch.randn(n, k, device="cuda") / k**0.5).to(dtype)
    whole = linear(x, weight, None, batch_invariant=True)
    wanted = x.double() @ weight.double().T
    error = (whole.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for rows in (1, 2, 17, 64, 65, 256):
        assert torch.equal(linear(x[:rows].contiguous(), weight, None, batch_invariant=True), whole[:rows])
