import pytest
import torch

from nanovllm_bento.kernels.embedding import embedding
from tests.kernels import embedding_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_its_row(dtype: torch.dtype) -> None:
    checks.check_embedding(embedding, 50, 40, dtype, "cpu")
    checks.check_no_tokens(embedding, "cpu")


def test_an_id_without_a_row_takes_the_nearest() -> None:
    checks.check_ids_without_a_row(embedding, "cpu")


def test_where_each_id_should_have_a_row_one_without_is_an_error() -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([3]), torch.ones(3, 8))
