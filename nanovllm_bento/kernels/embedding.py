"""Rows of a matrix by id: what each token enters the first layer with."""

import torch
from torch import Tensor


def embedding(input_ids: Tensor, weight: Tensor, first: int | None = None) -> Tensor:
    """input_ids: int64 [num_tokens]; weight: [num_rows, n]. Returns [num_tokens, n] in weight's dtype.

    first: the id of weight's first row; may be negative. An id without a row then takes the nearest, the first or the
    last. None: ids count from 0 and each has a row; on a CPU one that has none raises IndexError, on CUDA, where that
    could not be told before the step ends, it takes the nearest too. On CUDA both tensors are contiguous.
    """
    if weight.is_cuda:
        from nanovllm_bento.kernels.embedding_triton import embedding as on_cuda

        return on_cuda(input_ids, weight, first or 0)
    return embedding_reference(input_ids, weight, first)


def embedding_reference(input_ids: Tensor, weight: Tensor, first: int | None = None) -> Tensor:
    if first is not None:
        input_ids = (input_ids - first).clamp_(0, len(weight) - 1)
    return torch.nn.functional.embedding(input_ids, weight)
