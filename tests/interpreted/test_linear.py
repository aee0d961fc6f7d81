import pytest
import torch

from nanovllm_bento.kernels.linear_triton import invariant_linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, n, k", [(1, 40, 72), (70, 130, 64), (3, 33, 200)])
def test_the_invariant_product_is_the_product(rows: int, n: int, k: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    b = torch.randn(n, generator=generator) if bias else None
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    out = torch.full((rows, n), torch.nan)
    torch.testing.assert_close(invariant_linear(x, weight, b, out).double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(out, invariant_linear(x, weight, b))
