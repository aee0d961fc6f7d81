from functools import partial

import pytest
import torch

from nanovllm_bento.kernels.embedding_triton import embedding
from tests.kernels import embedding_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 40, 1024, 2500])  # 2500: three blocks, the last cut short
def test_each_token_gets_its_row(n: int, dtype: torch.dtype) -> None:
    checks.check_embedding(embedding, 50, n, dtype, "cpu")


def test_a_row_may_be_cut_into_any_blocks() -> None:
    checks.check_embedding(partial(embedding, block=32), 50, 100, torch.float16, "cpu")


def test_an_id_without_a_row_takes_the_nearest() -> None:
    checks.check_ids_without_a_row(embedding, "cpu")


def test_ids_at_any_address() -> None:
    checks.check_ids_at_any_address(embedding, "cpu")
    checks.check_no_tokens(embedding, "cpu")
