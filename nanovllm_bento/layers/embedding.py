"""Token embedding and LM head, which may share one matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.layers.weight_spec import WeightSpec, meta_parameter


class TokenEmbedding(nn.Module):
    """weight: [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = meta_parameter(vocab_size, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [num_tokens] -> [num_tokens, hidden_size]."""
        return embedding(input_ids, self.weight)

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        yield WeightSpec(f"{name}.weight", self, "weight", tuple(self.weight.shape), shard_dim=0)


class LMHead(nn.Module):
    """Logits from hidden states. ``tied``: takes the embedding's matrix instead of one of its own.

    On a CPU the product reads a packed copy; a tied embedding keeps the plain one too, for its rows.
    """

    weight: nn.Parameter | None

    def __init__(self, embed: TokenEmbedding, *, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.weight = None if tied else meta_parameter(*embed.weight.shape, dtype=embed.weight.dtype)
        self.packed: Tensor | None = None
        self.batch_invariant = False

    def forward(self, hidden: Tensor, embed: TokenEmbedding, out: Tensor | None = None) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size], written into ``out`` if given.

        On a GPU in the model's dtype, which the sampler widens as it reads; on a CPU in float32.
        """
        weight = embed.weight if self.tied else self.weight
        logits = linear(hidden, weight, None, self.packed, batch_invariant=self.batch_invariant, out=out)
        return logits if logits.is_cuda else logits.float()

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        if self.weight is not None:
            yield WeightSpec(f"{name}.weight", self, "weight", tuple(self.weight.shape), shard_dim=0)

    def finalize(self, embed: TokenEmbedding) -> None:
        weight = embed.weight if self.weight is None else self.weight
        self.packed = pack_weight(weight.data)
        if self.packed is not None:
            self.weight = None
