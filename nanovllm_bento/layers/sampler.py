"""Sampling parameters of the running sequences, one row per slot, and the step from logits to tokens."""

import numpy as np
import torch

from nanovllm_bento.kernels.sample import sample, seed_to_int64
from nanovllm_bento.sampling_params import SamplingParams


class Sampler:
    """Keeps each slot's parameters, so that a step only says which slots it samples."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.int64)

    def set_slot(self, slot: int, params: SamplingParams) -> None:
        """Give a slot to a new sequence. params.seed is set."""
        assert params.seed is not None
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = seed_to_int64(params.seed)

    def __call__(
        self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray, banned: list[tuple[int, list[int]]]
    ) -> torch.Tensor:
        """Sample one token per row: int64 [n] on the logits' device; -1 where the logits are not numbers.

        logits: float32 [n, vocab], changed in place. slots: int64 [n]. positions: int64 [n], the place of the new token
        in its sequence. banned: (row, token ids) that must not be sampled there (min_tokens).
        """
        for row, token_ids in banned:
            logits[row, token_ids] = -torch.inf
        if not self.temperature[slots].any():
            best, tokens = logits.max(dim=-1)
            return tokens.masked_fill(best.isnan() | best.isinf(), -1)

        def put(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(self.device)

        return sample(
            logits,
            put(self.temperature[slots]),
            put(self.top_k[slots]),
            put(self.top_p[slots]),
            put(self.min_p[slots]),
            put(self.seed[slots]),
            put(positions),
        )
