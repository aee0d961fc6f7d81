"""Token embedding and LM head, which may share one matrix. Ranks split both over the vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.embedding import embedding
from nanovllm_bento.kernels.linear import linear, pack_weight
from nanovllm_bento.kernels.products import choose_head
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.weight_spec import WeightSpec, meta_parameter, split, whole


class TokenEmbedding(nn.Module):
    """weight: [vocab_size, hidden_size]; with several ranks each one's rows between two rows of zeros."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, group: ParallelGroup = SINGLE) -> None:
        super().__init__()
        self.group = group
        self.shard = split(vocab_size, group)
        self.hidden = whole(hidden_size)
        self.margin = 0 if group.size == 1 else 1
        self.weight = meta_parameter(self.shard.length + 2 * self.margin, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [num_tokens] -> [num_tokens, hidden_size]."""
        if self.group.size == 1:
            return embedding(input_ids, self.weight)
        rows = embedding(input_ids, self.weight, self.shard.start - self.margin)  # other ranks' ids: zeros
        return self.group.all_reduce(rows)

    @property
    def rows(self) -> Tensor:
        """The vocabulary's rows that this rank holds, padded to a length that is the same on all ranks."""
        return self.weight.data[self.margin : self.margin + self.shard.length]

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        yield WeightSpec.of(f"{name}.weight", self, "weight", (self.shard, self.hidden), self.margin)


class LMHead(nn.Module):
    """Logits from hidden states. ``tied``: takes the embedding's matrix instead of one of its own.

    On a CPU the product reads a packed copy; a tied embedding keeps the plain one too, for its rows.
    """

    weight: nn.Parameter | None

    def __init__(self, embed: TokenEmbedding, *, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.group, self.shard, self.hidden = embed.group, embed.shard, embed.hidden
        shape = self.shard.length, self.hidden.size
        self.weight = None if tied else meta_parameter(*shape, dtype=embed.weight.dtype)
        self.packed: Tensor | None = None
        self.batch_invariant = False

    def forward(self, hidden: Tensor, embed: TokenEmbedding, out: Tensor | None = None) -> Tensor:
        """This rank's logits: [rows, hidden_size] -> [rows, shard.length], written into ``out`` if given.

        The first shard.stop - shard.start are of the tokens from shard.start on. On a GPU in the model's dtype, which
        the sampler widens as it reads; on a CPU in float32.
        """
        weight = embed.rows if self.tied else self.weight
        shape = len(hidden), self.shard.length, self.hidden.size
        products = None if self.batch_invariant else choose_head(*shape, hidden.dtype, hidden.device)
        if products is not None:
            assert weight is not None
            logits = products.linear(hidden, weight, None, out=out)
        else:
            logits = linear(hidden, weight, None, self.packed, batch_invariant=self.batch_invariant, out=out)
        return logits if logits.is_cuda else logits.float()

    def gather(self, logits: Tensor) -> Tensor:
        """All ranks' logits, on every rank: [rows, shard.length] -> [rows, vocab_size]."""
        logits = self.group.all_gather(logits)
        return logits if logits.shape[1] == self.shard.size else logits[:, : self.shard.size].contiguous()

    def weight_specs(self, name: str) -> Iterator[WeightSpec]:
        if self.weight is not None:
            yield WeightSpec.of(f"{name}.weight", self, "weight", (self.shard, self.hidden))

    def finalize(self, embed: TokenEmbedding) -> None:
        self.packed = pack_weight(embed.rows if self.weight is None else self.weight.data)
        if self.packed is not None:
            self.weight = None
