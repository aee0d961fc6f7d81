"""Rotary position embeddings (Su et al. 2021): the table of cosines and sines, with the usual context extensions."""

import math

import torch
from torch import Tensor, nn

from nanovllm_bento.layers.rope_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """table: float32 [num_positions, head_dim], cosines in the first half, sines after. ``finalize`` makes it."""

    table: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim

    def finalize(self, num_positions: int, device: torch.device) -> None:
        angles = torch.outer(
            torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(self.config, self.head_dim)
        )
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        if self.config.attention_factor != 1.0:
            table *= self.config.attention_factor
        self.table = table.to(device)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.type == "default":
        return plain
    if config.type == "linear":
        return plain / config.factor
    if config.type == "factors":
        return plain / torch.tensor(config.factors)
    if config.type == "llama3":
        # how many turns the training context holds: below low_freq_factor stretch, above high_freq_factor keep
        turns = config.original_max_position * plain / (2 * math.pi)
        keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
        return (1 - keep) * plain / config.factor + keep * plain
    return _yarn(config, head_dim, plain)


def _yarn(config: RopeConfig, head_dim: int, plain: Tensor) -> Tensor:
    """NTK-by-parts (YaRN, section 3.2): a ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dimension(turns: float) -> float:
        length = config.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return stretch * plain / config.factor + (1 - stretch) * plain
