"""Choosing tokens from logits: temperature, top-k, top-p, min-p, then the Gumbel-max trick with counter-based noise.

The noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) keyed by the request's
seed: vocabulary entry v at a position of its sequence takes output word v % 4 of counter (v // 4, position, 0, 0). So a
request's tokens depend on its logits and its seed alone: not on the batch, its row, or whether it was preempted.

The token is argmax(logit / temperature + gumbel(noise)), which draws from the softmax exactly (Gumbel 1954). Below a
temperature of 1e-5 it is the first of the largest logits, without noise, and filters have no effect.

Here: the PyTorch reference and the dispatch; sample_triton.py says how the GPU does it without a sort.
"""

from collections.abc import Callable

import numpy as np
import torch

from nanovllm_bento.kernels.launch import use_pdl

MIN_TEMPERATURE = 1e-5
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
# u is in [2^-24, 1 - 2^-24], so gumbel(u) is in [-2.82, 16.64].
_MAX_GUMBEL_SPREAD = 19.5

# A slot's parameters, as rows of one table that host and device share: on the device int32 [max_num_seqs, 8]. `slot` is
# the row's own number, so that an upload of some rows says where they go.
SLOT_DTYPE = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("seed", "i8"), ("slot", "i8")]
)


def new_slot_table(max_num_seqs: int) -> np.ndarray:
    """Greedy parameters for every slot: SLOT_DTYPE [max_num_seqs]."""
    table = np.zeros(max_num_seqs, SLOT_DTYPE)
    table["top_p"] = 1.0
    table["slot"] = np.arange(max_num_seqs)
    return table


def slot_words(rows: np.ndarray) -> torch.Tensor:
    """Rows of a slot table (SLOT_DTYPE [n], contiguous) as the device holds them: int32 [n, 8], the same memory."""
    return torch.from_numpy(rows.view(np.int32).reshape(len(rows), -1))


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10's four output words. All int64: seed's 64 bits are the key, of the counters the low 32 count."""
    c0, c1, c2, c3 = c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1  # 64-bit wrap-around keeps all bits; shifts are masked
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def noise(seed: torch.Tensor, position: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Uniform float32 [n, 4] in (0, 1) of entries 4 * group + (0, 1, 2, 3): a word's top 23 bits, centred.

    seed (its 64 bits), position, group: int64 [n].
    """
    zero = torch.zeros_like(group)
    words = torch.stack(philox(seed, group, position, zero, zero), dim=-1)
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def filter_logits(
    logits: torch.Tensor,
    inverse_temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Set to -inf what top-k, then top-p (on what is left), then min-p exclude. logits: float32 [n, vocab].

    inverse_temperature, top_p, min_p: float32 [n]; top_k: int [n], 0 keeps all. An entry passes top-p if the mass of
    everything before it is below top_p. Equal logits come in the order of their ids, so exactly top_k pass.
    """
    vocab_size = logits.shape[-1]
    best, inverse = logits.amax(dim=-1, keepdim=True), inverse_temperature[:, None]
    floor = torch.where(min_p > 0, min_p, 0).log()[:, None]  # for logits relative to the best; -inf keeps all
    needs_sort = (top_k > 0) & (top_k < vocab_size) | (top_p < 1.0)
    if bool(needs_sort.any()):
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(vocab_size, device=logits.device)
        k = torch.where(top_k > 0, top_k, vocab_size)
        values = values.masked_fill(ranks >= k[:, None], -torch.inf)
        probs = ((values - best) * inverse).softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        values = values.masked_fill((before >= top_p[:, None]) & (top_p < 1.0)[:, None] & (ranks > 0), -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, values)
    if bool((min_p > 0).any()):
        logits = logits.masked_fill((logits - best) * inverse < floor, -torch.inf)
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
    """One token per row: int64 [n]; -1 where logits hold NaN or the largest, over temperature, is not finite.

    logits: float32 [n, vocab]; the rest [n]: seed, position int64, top_k int, others float32. The module says the rule.
    """
    best, greedy = logits.max(dim=-1)
    sampled = temperature >= MIN_TEMPERATURE
    inverse = torch.where(sampled, temperature.reciprocal(), 1.0)
    invalid = ~(best * inverse).isfinite()
    tokens = greedy.clone()
    rows = torch.nonzero(sampled & ~invalid).flatten()
    if rows.numel():
        inverse = inverse[rows]
        scaled = filter_logits(logits[rows], inverse, top_k[rows], top_p[rows], min_p[rows]) * inverse[:, None]
        scaled = torch.nn.functional.pad(scaled, (0, -scaled.shape[-1] % 4), value=-torch.inf).view(len(rows), -1, 4)
        # As the noise is bounded, entries too far below the best cannot win: noise for the other groups alone.
        in_reach = (scaled >= (best[rows] * inverse - _MAX_GUMBEL_SPREAD)[:, None, None]).any(dim=-1)
        row, group = torch.nonzero(in_reach, as_tuple=True)
        u = noise(seed[rows][row], position[rows][row], group)
        noisy = torch.full_like(scaled, -torch.inf)
        noisy[row, group] = scaled[row, group] - torch.log(-torch.log(u))
        tokens[rows] = noisy.flatten(1).argmax(dim=-1)
    return tokens.masked_fill(invalid, -1)


def sample_rows_reference(
    logits: torch.Tensor, slot_params: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """``sample_rows`` in PyTorch; it reads each row's parameters, so it needs no ``filtered``."""
    words = slot_params[slots.clamp(min=0).long()]
    floats, longs = words.view(torch.float32), words.view(torch.int64)
    tokens = sample_reference(
        logits.float(), floats[:, 0], words[:, 3], floats[:, 1], floats[:, 2], longs[:, 2], positions
    )
    return tokens.masked_fill(slots < 0, 0)


def sample_rows(
    logits: torch.Tensor,
    slot_params: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    filtered: bool,
    out: torch.Tensor | None = None,
    last_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row: int64 [n], as ``sample_reference``; 0 in padding rows. A CUDA graph can hold it.

    logits: bf16, fp16 or float32 [n, vocab], rows contiguous. slot_params: int32 [max_num_seqs, 8] (``slot_words``).
    slots: int32 or int64 [n], negative for a padding row. positions: int64 [n], the new token's place in its sequence.
    filtered: whether any row may ask for top-k, top-p or min-p; else they are ignored. out: for the result.
    last_tokens: int64 [max_num_seqs]; each row's token also goes there, to its slot: 0 for -1, nothing of padding rows.
    """
    if logits.device.type == "cpu":
        tokens = sample_rows_reference(logits, slot_params, slots, positions)
        store_last_tokens_reference(tokens, slots, last_tokens)
        return tokens if out is None else out.copy_(tokens)
    from nanovllm_bento.kernels import sample_triton

    if out is None:
        out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return sample_triton.sample_rows(
        logits, slot_params, slots, positions, out, last_tokens, filtered=filtered, pdl=use_pdl(logits.device)
    )


def store_last_tokens_reference(tokens: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor | None) -> None:
    if last_tokens is not None:
        used = slots >= 0
        last_tokens[slots[used].long()] = tokens[used].clamp(min=0)


def sample_shards(
    logits: torch.Tensor,
    num_entries: int,
    first: int,
    slot_params: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
    ranks: int,
    last_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sample_rows`` without filters where each rank has a shard of the vocabulary: nothing but the best of each is
    exchanged, since the largest noisy logit is the largest of the shards'. A CUDA graph can hold it.

    logits: [n, at least num_entries], of tokens first to first + num_entries; as wide on all ranks. first: a multiple
    of 4. gather: [n, m] -> [n, ranks * m], the ranks' columns side by side. The same tokens on every rank.
    last_tokens, out: as ``sample_rows``.
    """
    best = best_of_shard(logits, num_entries, first, slot_params, slots, positions, ranks)
    n = len(best)
    best = join_shards(gather(best.view(n, -1)), ranks)
    if logits.device.type == "cpu":
        tokens = choose_among_reference(best).masked_fill(slots < 0, 0)
        store_last_tokens_reference(tokens, slots, last_tokens)
        return tokens if out is None else out.copy_(tokens)
    from nanovllm_bento.kernels import sample_triton

    if out is None:
        out = torch.empty(n, dtype=torch.int64, device=logits.device)
    return sample_triton.choose_among(best, slot_params, slots, out, last_tokens, pdl=use_pdl(logits.device))


def best_of_shard(
    logits: torch.Tensor,
    num_entries: int,
    first: int,
    slot_params: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    ranks: int,
) -> torch.Tensor:
    """float32 [n, 2, splits]: the largest noisy logits of parts of a shard (NaN where logits are not numbers), and
    their tokens, which float32 holds exactly up to 2^24. Anything in padding rows."""
    if logits.device.type == "cpu":
        return best_of_shard_reference(logits[:, :num_entries], first, slot_params, slots, positions)
    from nanovllm_bento.kernels import sample_triton

    return sample_triton.scan_shard(
        logits, num_entries, first, slot_params, slots, positions, ranks, pdl=use_pdl(logits.device)
    )


def join_shards(gathered: torch.Tensor, ranks: int) -> torch.Tensor:
    """gathered: [n, ranks * 2 * splits], each rank's ``best_of_shard`` of a row after the other's.

    Returns [n, 2, ranks * splits], contiguous.
    """
    n = len(gathered)
    return gathered.view(n, ranks, 2, -1).transpose(1, 2).contiguous().view(n, 2, -1)


def best_of_shard_reference(
    logits: torch.Tensor, first: int, slot_params: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One part for the whole shard: [n, 2, 1]."""
    n, num_entries = logits.shape
    if not num_entries:
        return torch.tensor([[-torch.inf], [0.0]]).expand(n, 2, 1)
    words = slot_params[slots.clamp(min=0).long()]
    temperature, seeds = words.view(torch.float32)[:, 0], words.view(torch.int64)[:, 2]
    sampled = temperature >= MIN_TEMPERATURE
    scores = logits.float() * torch.where(sampled, temperature.reciprocal(), 1.0)[:, None]
    invalid = scores.isnan().any(dim=-1) | (scores == torch.inf).any(dim=-1)
    ids = torch.arange(first, first + num_entries)
    for row in torch.nonzero(sampled & ~invalid).flatten().tolist():
        u = noise(seeds[row].expand(num_entries), positions[row].expand(num_entries), ids // 4)
        scores[row] -= torch.log(-torch.log(u.gather(1, (ids % 4)[:, None])[:, 0]))
    best, index = scores.max(dim=-1)
    return torch.stack((best.masked_fill(invalid, torch.nan), (index + first).float()), dim=1)[:, :, None]


def choose_among_reference(best: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the token of the largest score, of equal ones the lowest; -1 where there is NaN, or nothing finite."""
    scores, tokens = best[:, 0], best[:, 1]
    top = scores.amax(dim=-1)  # NaN if any is
    chosen = torch.where(scores == top[:, None], tokens, torch.inf).amin(dim=-1)
    return torch.where(top.isfinite(), chosen, -1.0).long()


def ban_tokens(logits: torch.Tensor, flat_indices: torch.Tensor) -> None:
    """Set logits to -inf in place. logits: [n, vocab], contiguous; flat_indices: int64 [m], row * vocab + token id."""
    logits.view(-1).index_fill_(0, flat_indices, -torch.inf)


def seed_to_int64(seed: int) -> int:
    """A seed in [0, 2**64) as the int64 with the same bits."""
    return int(np.uint64(seed).astype(np.int64))
