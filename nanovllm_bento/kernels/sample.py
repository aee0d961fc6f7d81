"""Choosing tokens from logits: temperature, top-k, top-p, min-p, then the Gumbel-max trick with counter-based noise.

The noise of vocabulary entry v is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
keyed by the request's seed and counted by (v, position of the token in its sequence). So a request's tokens depend on
its logits and its seed alone: not on the batch, its row, or whether it was preempted and resumed.

Here: the PyTorch reference and its dispatch. The token is argmax(logit / temperature + gumbel(noise)), which draws
from the softmax exactly (Gumbel 1954). As the noise is bounded (23 bits), an entry more than 19.5 below the row's best
cannot win, and the reference draws noise for the others alone.
"""

import numpy as np
import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
# u is in [2^-24, 1 - 2^-24], so gumbel(u) is in [-2.82, 16.64].
_MAX_GUMBEL_SPREAD = 19.5


def philox_uniform(seed: torch.Tensor, position: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in (0, 1): seed (int64, its 64 bits), position and index (int64), broadcast together.

    Philox4x32-10 with counter (index, position, 0, 0), the seed as key; the first output word's top 23 bits, centred.
    """
    seed, position, index = torch.broadcast_tensors(seed, position, index)
    c0, c1 = index & _MASK, position & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1  # 64-bit wrap-around keeps all bits; shifts are masked
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return ((c0 >> 9).to(torch.float32) + 0.5) * 2.0**-23


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set to -inf what top-k, then top-p (on what is left), then min-p exclude. logits: float32 [n, vocab], scaled.

    top_k: int64 [n], 0 keeps all; top_p, min_p: float32 [n]. Entries equal to the last one that stays are kept by the
    order of a stable sort, so exactly top_k stay.
    """
    vocab_size = logits.shape[-1]
    needs_sort = (top_k > 0) & (top_k < vocab_size) | (top_p < 1.0)
    if bool(needs_sort.any()):
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(vocab_size, device=logits.device)
        k = torch.where(top_k > 0, top_k, vocab_size)
        values = values.masked_fill(ranks >= k[:, None], -torch.inf)
        probs = values.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # the mass of everything more likely
        values = values.masked_fill((before >= top_p[:, None]) & (top_p < 1.0)[:, None] & (ranks > 0), -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, values)
    if bool((min_p > 0).any()):
        floor = logits.amax(dim=-1, keepdim=True) + min_p[:, None].log()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """One token per row: int64 [n]; -1 where the logits hold NaN. logits: float32 [n, vocab]; the rest: [n].

    temperature 0 is greedy (the first of equal maxima). seed, position: int64; see the module's docstring.
    """
    best, greedy = logits.max(dim=-1)
    invalid = best.isnan() | best.isinf()
    tokens = greedy.clone()
    rows = torch.nonzero((temperature > 0) & ~invalid).flatten()
    if rows.numel():
        # Subtracting the maximum first keeps tiny temperatures finite.
        scaled = (logits[rows] - best[rows, None]) / temperature[rows, None]
        scaled = filter_logits(scaled, top_k[rows], top_p[rows], min_p[rows])
        row, index = torch.nonzero(scaled >= -_MAX_GUMBEL_SPREAD, as_tuple=True)
        u = philox_uniform(seed[rows][row], position[rows][row], index)
        noisy = torch.full_like(scaled, -torch.inf)
        noisy[row, index] = scaled[row, index] - torch.log(-torch.log(u))
        tokens[rows] = noisy.argmax(dim=-1)
    return tokens.masked_fill(invalid, -1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Dispatch; arguments and result as in ``sample_reference``."""
    return sample_reference(logits, temperature, top_k, top_p, min_p, seed, position)


def seed_to_int64(seed: int) -> int:
    """A seed in [0, 2**64) as the int64 with the same bits."""
    return int(np.uint64(seed).astype(np.int64))
