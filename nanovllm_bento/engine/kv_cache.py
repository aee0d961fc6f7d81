"""How much KV cache there is room for, and its tensors.

On a GPU the room is what gpu_memory_utilization leaves beside the weights, the largest step's activations (measured by
running it) and the CUDA graphs; on a CPU a share of free memory. Only sizes and allocation; who owns which block is the
block manager's business.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.errors import ConfigError

_CPU_CACHE_BYTES = 4 << 30
GRAPH_BYTES = 320 << 20
"""Kept free beside the largest step's pool: CUDA graphs' own bookkeeping, and what libraries allocate late.

119 graphs of prompts of Qwen3-0.6B took 128 MiB on an H100; there may be 192, and those of decode steps."""

MAX_BLOCKS = 1 << 19
"""Blocks that are made unasked, at most (8 million tokens of block_size 16): each costs the host some bookkeeping."""

KVCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on the GPU when the cache was sized. activations: the largest step's peak; graphs: kept for CUDA graphs."""

    total: int
    free: int
    weights: int
    activations: int
    graphs: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What a block holds on this rank: keys and values of ``block_size`` tokens in all layers."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def allocate(num_blocks: int, layout: Layout, device: torch.device) -> list[KVCache]:
    """(k_cache, v_cache) of each layer, [num_blocks, block_size, num_kv_heads, head_dim], all zero.

    Raises ConfigError if the device has no room for them.
    """
    shape, dtype = (num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim), layout.dtype
    try:
        return [(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(layout.num_layers)]
    except torch.OutOfMemoryError:
        wanted = num_blocks * layout.block_bytes
        raise ConfigError(
            f"a KV cache of {num_blocks} blocks ({_gib(wanted)}) does not fit the GPU's free memory. Lower "
            "num_gpu_blocks_override, kv_cache_memory_bytes or gpu_memory_utilization."
        ) from None


def num_blocks_that_fit(
    config: EngineConfig,
    layout: Layout,
    max_model_len: int,
    device: torch.device,
    measure: Callable[[], MemoryUse],
) -> int:
    """How many blocks to allocate. ``measure`` runs the largest step and is called only where its answer matters.

    Raises ConfigError, naming what the memory goes to and what would fit, if there is no room.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    per_block = layout.block_bytes
    blocks_per_seq = -(-max_model_len // config.block_size)
    use = None
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif device.type == "cpu":
        budget = min(psutil.virtual_memory().available // 4, _CPU_CACHE_BYTES)
    else:
        use = measure()
        kept_free = int(use.total * (1 - config.gpu_memory_utilization))
        budget = use.free - kept_free - use.activations - use.graphs
    num_blocks = budget // per_block
    if config.kv_cache_memory_bytes is None:
        # Without a prefix cache, more than every running sequence at its longest is never used.
        most = MAX_BLOCKS if config.enable_prefix_caching else config.max_num_seqs * blocks_per_seq
        num_blocks = min(num_blocks, most)
    wanted_len = 1 if config.max_model_len is None else config.max_model_len
    if num_blocks < -(-wanted_len // config.block_size):
        raise ConfigError(_no_room(config, per_block, budget, num_blocks, use))
    return int(num_blocks)


def _no_room(config: EngineConfig, per_block: int, budget: int, num_blocks: int, use: MemoryUse | None) -> str:
    parts = []
    if use is not None:
        parts.append(
            f"beside {_gib(use.weights)} of weights {_gib(use.free)} of the GPU's {_gib(use.total)} are free; with "
            f"gpu_memory_utilization={config.gpu_memory_utilization}, {_gib(use.activations)} for a step of "
            f"{config.max_num_batched_tokens} tokens and {_gib(use.graphs)} for CUDA graphs, {_gib(max(budget, 0))} of "
            "KV cache are left"
        )
    else:
        parts.append(f"{budget} bytes of KV cache are what there is")
    if num_blocks < 1:
        parts.append(f"which hold no block of {config.block_size} tokens ({per_block} bytes)")
    else:
        fits = num_blocks * config.block_size
        parts.append(f"which hold {fits} tokens: max_model_len={config.max_model_len} does not fit, {fits} would")
    remedy = "Raise gpu_memory_utilization" if use is not None else "Raise kv_cache_memory_bytes"
    return f"{', '.join(parts)}. {remedy}, or lower max_model_len, block_size, max_num_seqs or max_num_batched_tokens."


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU as pages that exist once they are written, so that a large cache costs nothing at start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
