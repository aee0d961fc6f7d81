"""Sampling parameters of the running sequences, one row per slot, and the step from logits to tokens."""

import numpy as np
import torch

from nanovllm_bento.kernels.sample import (
    MIN_TEMPERATURE,
    ban_tokens,
    new_slot_table,
    sample_rows,
    sample_shards,
    seed_to_int64,
    slot_words,
)
from nanovllm_bento.layers.parallel import ParallelGroup
from nanovllm_bento.sampling_params import SamplingParams

_NOTHING = np.empty(0, np.int64)


class Sampler:
    """Keeps each slot's parameters, so that a step only says which slots it samples.

    The host's table is the truth. The device has a copy, which ``apply`` brings up to date in the order of the stream,
    so that steps in flight are not disturbed; the ranks of a tensor-parallel engine apply what rank 0 took. Nothing
    here waits for the device.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.slots = new_slot_table(max_num_seqs)
        self.slot_params = slot_words(self.slots.copy()).to(device)
        self._filters = np.zeros(max_num_seqs, bool)
        self._changed: set[int] = set()

    def set_slot(self, slot: int, params: SamplingParams) -> None:
        """Give a slot to a new sequence, on the host. params.seed is set."""
        assert params.seed is not None
        seed = seed_to_int64(params.seed)
        self.slots[slot] = (params.temperature, params.top_p, params.min_p, min(params.top_k, 2**31 - 1), seed, slot)
        filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._filters[slot] = filters and np.float32(params.temperature) >= np.float32(MIN_TEMPERATURE)
        self._changed.add(slot)

    def needs_filter(self, slots: np.ndarray) -> bool:
        """Whether any of the slots asks for top-k, top-p or min-p. Negative slots (padding) do not."""
        return bool(self._filters[slots[slots >= 0]].any())

    def take_changes(self) -> np.ndarray:
        """The parameters of the slots given away since the last call, for ``apply``: int32 [n, 8]."""
        changed, self._changed = list(self._changed), set()
        return self.slots[changed].view(np.int32).reshape(-1, 8)

    def apply(self, changes: np.ndarray) -> None:
        """Enqueue the upload of changed slots; call it before the step that samples them."""
        if len(changes):
            words = self._put(torch.from_numpy(changes))
            self.slot_params.index_copy_(0, words.view(torch.int64)[:, 3], words)

    def ban(self, logits: torch.Tensor, banned: np.ndarray) -> None:
        """Set logits to -inf in place. logits: [n, vocab], contiguous; banned: int64 [m], row * vocab + token id."""
        if len(banned):
            ban_tokens(logits, self._put(torch.from_numpy(banned)))

    def sample_shards(
        self,
        logits: torch.Tensor,
        vocab: tuple[int, int],
        slots: torch.Tensor,
        positions: torch.Tensor,
        group: ParallelGroup,
        last_tokens: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token per row, without filters, from the ranks' shards of the logits; ``vocab``: this rank's tokens.

        last_tokens, out: as ``sample_rows``.
        """
        start, stop = vocab
        return sample_shards(
            logits,
            stop - start,
            start,
            self.slot_params,
            slots,
            positions,
            group.all_gather,
            group.size,
            last_tokens,
            out,
        )

    def sample_device(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        filtered: bool,
        last_tokens: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token per row by the device's parameters, as ``sample_rows``. A CUDA graph can hold it."""
        where = {"last_tokens": last_tokens, "out": out}
        return sample_rows(logits, self.slot_params, slots, positions, filtered=filtered, **where)

    def __call__(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
        banned: np.ndarray = _NOTHING,
        last_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample one token per row: int64 [n] on the logits' device; -1 where the logits are not numbers.

        logits: [n, vocab], contiguous, changed in place. slots: int [n]. positions: int [n], the place of the new token
        in its sequence. banned: as ``ban``. last_tokens: as ``sample_rows``.
        What ``set_slot`` changed is applied first.
        """
        self.apply(self.take_changes())
        self.ban(logits, banned)
        rows = self.put_rows(slots, positions)
        return self.sample_device(logits, rows[0], rows[1], self.needs_filter(slots), last_tokens)

    def put_rows(self, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """int64 [2, n] on the device."""
        return self._put(torch.from_numpy(np.stack([slots, positions]).astype(np.int64, copy=False)))

    def _put(self, host: torch.Tensor) -> torch.Tensor:
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)


def score_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [2, n]: the log-probability of each row's target, and 1 where it is the first of the largest logits.

    logits: [n, vocab], not changed. targets: int64 [n]. A row's result does not depend on the rows beside it.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, targets[:, None])[:, 0]
    return torch.stack((logprobs, (logits.argmax(dim=-1) == targets).float()))
