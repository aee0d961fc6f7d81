"""Runs a batch on the device: stages its inputs, calls the model, samples, and hands back tokens that may come later.

Per-slot state stays on the device between steps: the last token of each slot, so that a decode row reads its input
there and no step waits for the host. The host keeps block tables and sampling parameters per slot and updates the rows
that a batch names. ``launch`` never waits for the device; ``InFlight.wait`` does, for one event.
"""

import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.scheduler import Batch
from nanovllm_bento.errors import ConfigError
from nanovllm_bento.hub import ModelFiles
from nanovllm_bento.kernels.attention import select_backend
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.linear import best_cpu_dtype
from nanovllm_bento.layers.sampler import Sampler
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.loader import load_model

_CPU_CACHE_BYTES = 4 << 30


@dataclass(slots=True)
class InFlight:
    """A launched step. ``wait`` blocks until its tokens are on the host and returns one per row of batch.sampled."""

    batch: Batch
    tokens: torch.Tensor
    event: torch.cuda.Event | None

    def wait(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist()


class ModelRunner:
    """One device's model, KV cache and per-slot state.

    Raises ModelError if the model cannot be loaded, ConfigError if the settings do not fit it or the machine.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, files: ModelFiles) -> None:
        self.config, self.model_config = config, model_config
        self.torch_device = _choose_device(config.device)
        self.torch_dtype = _choose_dtype(config.dtype, model_config, self.torch_device)
        self.device, self.dtype = str(self.torch_device), str(self.torch_dtype).removeprefix("torch.")
        self.vocab_size = model_config.vocab_size
        self.block_size = config.block_size
        self.startup_seconds: dict[str, float] = {}
        self.max_model_len = self._max_model_len()

        started = time.perf_counter()
        self.model = load_model(
            model_config,
            files.path,
            dtype=self.torch_dtype,
            device=self.torch_device,
            load_format=config.load_format,
            seed=config.seed,
            max_positions=self.max_model_len,
        )
        self.backend = select_backend(
            config.attention_backend,
            head_dim=model_config.head_dim,
            dtype=self.torch_dtype,
            kv_dtype=self.torch_dtype,
            block_size=config.block_size,
            device=self.torch_device,
        )
        self.model.set_attention_backend(self.backend)
        self.startup_seconds["load_weights"] = time.perf_counter() - started

        self.num_blocks = self._num_blocks()
        shape = (self.num_blocks, config.block_size, model_config.num_key_value_heads, model_config.head_dim)
        self.kv_caches = [
            (_zeros(shape, self.torch_dtype, self.torch_device), _zeros(shape, self.torch_dtype, self.torch_device))
            for _ in range(model_config.num_hidden_layers)
        ]
        if config.max_model_len is None:
            self.max_model_len = min(self.max_model_len, self.num_blocks * config.block_size)

        max_blocks = -(-self.max_model_len // config.block_size)
        self.block_tables = np.zeros((config.max_num_seqs, max_blocks), np.int32)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.torch_device)
        self.sampler = Sampler(config.max_num_seqs, self.torch_device)

    def launch(self, batch: Batch) -> InFlight:
        """Enqueue one step. Its tokens feed the next launch on the device, whether or not they were waited for."""
        for seq in batch.admitted:
            self.sampler.set_slot(seq.slot, seq.sampling)
            self.block_tables[seq.slot, : len(seq.block_table)] = seq.block_table
        for seq in batch.grown:
            self.block_tables[seq.slot, len(seq.block_table) - 1] = seq.block_table[-1]
        with torch.inference_mode():
            return self._launch(batch)

    def _launch(self, batch: Batch) -> InFlight:
        size, num_decode = self.block_size, len(batch.decode)
        # Decode rows first: one token each.
        slots = [seq.slot for seq in batch.decode]
        positions = [np.array(batch.positions, np.int64)]
        slot_mapping = [self.block_tables[slots, positions[0] // size].astype(np.int64) * size + positions[0] % size]
        query_lens, seq_lens = [1] * num_decode, [p + 1 for p in batch.positions]
        prompt_ids: list[int] = []
        sampled_rows = list(range(num_decode))  # index of each sampled row's last token
        num_tokens = num_decode
        for chunk in batch.prefill:
            slot = chunk.seq.slot
            where = np.arange(chunk.start, chunk.end)
            mapping = self.block_tables[slot, where // size].astype(np.int64) * size + where % size
            mapping[where < chunk.store_from] = -1
            slots.append(slot)
            positions.append(where)
            slot_mapping.append(mapping)
            query_lens.append(chunk.end - chunk.start)
            seq_lens.append(chunk.end)
            prompt_ids += chunk.seq.token_ids[chunk.start : chunk.end]
            num_tokens += chunk.end - chunk.start
            if chunk.samples:
                sampled_rows.append(num_tokens - 1)

        all_positions = np.concatenate(positions)
        max_seq_len = max(seq_lens)
        meta = AttentionMetadata(
            query_start_loc=self._put(np.cumsum([0, *query_lens], dtype=np.int32)),
            seq_lens=self._put(np.array(seq_lens, np.int32)),
            block_table=self._put(self.block_tables[slots, : -(-max_seq_len // size)]),
            slot_mapping=self._put(np.concatenate(slot_mapping)),
            max_query_len=max(query_lens),
            max_seq_len=max_seq_len,
            num_decode_rows=num_decode,
        )
        self.backend.prepare(meta)
        input_ids = self._put(np.array(prompt_ids, np.int64))
        if num_decode:
            decode_ids = self.last_tokens[self._put(np.array(slots[:num_decode], np.int64))]
            input_ids = torch.cat([decode_ids, input_ids])
        hidden = self.model(input_ids, self._put(all_positions), self.kv_caches, meta)
        return self._sample(batch, hidden, np.array(sampled_rows, np.int64), all_positions)

    def _sample(self, batch: Batch, hidden: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> InFlight:
        if not batch.sampled:
            return InFlight(batch, torch.empty(0, dtype=torch.int64), None)
        if len(rows) < len(hidden):
            hidden = hidden[self._put(rows)]
        logits = self.model.compute_logits(hidden)
        new_positions = positions[rows] + 1
        banned = [
            (row, list(seq.stop_token_ids))
            for row, seq in enumerate(batch.sampled)
            if seq.sampling.min_tokens and new_positions[row] < seq.min_total_tokens and seq.stop_token_ids
        ]
        slots = np.array([seq.slot for seq in batch.sampled], np.int64)
        tokens = self.sampler(logits, slots, new_positions, banned)
        self.last_tokens[self._put(slots)] = tokens.clamp(min=0)
        if self.torch_device.type == "cpu":
            return InFlight(batch, tokens, None)
        on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return InFlight(batch, on_host, event)

    def _put(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.torch_device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def _max_model_len(self) -> int:
        limit, wanted = self.model_config.max_context, self.config.max_model_len
        if wanted is not None and wanted > limit:
            raise ConfigError(
                f"max_model_len={wanted} is above what the model was made for: {limit} tokens. Set it to that or less."
            )
        return limit if wanted is None else wanted

    def _num_blocks(self) -> int:
        config, mc = self.config, self.model_config
        if config.num_gpu_blocks_override is not None:
            return config.num_gpu_blocks_override
        token_bytes = 2 * mc.num_hidden_layers * mc.num_key_value_heads * mc.head_dim * self.torch_dtype.itemsize
        block_bytes = config.block_size * token_bytes
        if config.kv_cache_memory_bytes is not None:
            budget = config.kv_cache_memory_bytes
        elif self.torch_device.type == "cpu":
            budget = min(psutil.virtual_memory().available // 4, _CPU_CACHE_BYTES)
        else:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            budget = int(free - (1 - config.gpu_memory_utilization) * total)
        # More than every running sequence at its longest is never used.
        useful = config.max_num_seqs * -(-self.max_model_len // config.block_size)
        num_blocks = min(budget // block_bytes, useful)
        if num_blocks < 1:
            raise ConfigError(
                f"{budget} bytes of KV cache hold no block of {config.block_size} tokens ({block_bytes} bytes). "
                "Give it more memory (kv_cache_memory_bytes, gpu_memory_utilization) or choose a smaller block_size."
            )
        return int(num_blocks)


def _choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU here. Use device='cpu' or 'auto'.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _choose_dtype(name: str, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return best_cpu_dtype()
    dtype: torch.dtype = getattr(torch, model_config.dtype)
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU as pages that exist once they are written, so that a large cache costs nothing at start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
