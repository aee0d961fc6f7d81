"""Runs a batch on the device: stages its inputs, calls the model, samples, and hands back tokens that may come later.

Per-slot state stays on the device between steps: the last token of each slot, its block table and its sampling
parameters. So a decode step on a GPU is a CUDA graph, after one small copy (a slot, a position and a block per row) if
its rows are not those of the step before, one token later; a step of prompts names its tokens, and is a graph too once
its size has been seen; all else, and everything on a CPU, runs eagerly. ``launch`` never waits for the device;
``InFlight.wait`` does, for one event.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine import kv_cache
from nanovllm_bento.engine.cuda_graphs import DecodeGraphs, GraphPool, PromptGraphs, PromptShape
from nanovllm_bento.engine.kv_scales import set_kv_scales
from nanovllm_bento.engine.prompt_buffers import PromptBuffers, put
from nanovllm_bento.engine.scheduler import Batch
from nanovllm_bento.engine.step_inputs import CaptureStep, DecodeStep, StepBuilder, TokenStep, decoder, encoder
from nanovllm_bento.errors import ConfigError, DeviceMemoryError
from nanovllm_bento.hub import ModelFiles, load_config_dict, resolve_model
from nanovllm_bento.kernels import shared_memory
from nanovllm_bento.kernels.attention import select_backend
from nanovllm_bento.kernels.attention.base import AttentionMetadata
from nanovllm_bento.kernels.decode_inputs import DecodeInputs, decode_inputs
from nanovllm_bento.kernels.launch import use_pdl
from nanovllm_bento.kernels.linear import best_cpu_dtype
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup, split_heads
from nanovllm_bento.layers.sampler import Sampler, score_rows
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.models.loader import load_model

_PROMPT_SIZES = (64, 1024)
"""Between a decode step's tokens and the largest step's, which are run at start anyway."""
KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn}
_GPU_SCORE_BYTES, _CPU_SCORE_BYTES = 2**28, 2**26
"""Bytes of float32 logits that are made at a time to score prompt tokens."""


@dataclass(slots=True)
class InFlight:
    """A launched step. ``wait`` blocks until its tokens are on the host and returns one per row of batch.sampled."""

    batch: Batch
    tokens: Tensor
    event: torch.cuda.Event | None
    scores: Tensor | None = None

    def wait(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist()

    def read_scores(self) -> tuple[list[float], list[bool]]:
        """After ``wait``, of each row of batch.scored: log-probability of the next token, and whether it is greedy."""
        assert self.scores is not None
        logprobs, is_greedy = self.scores
        return logprobs.tolist(), is_greedy.bool().tolist()


class ModelRunner:
    """One device's model, KV cache and per-slot state.

    group: this rank of a tensor-parallel engine; every rank makes a runner of the same config. publish: of rank 0,
    brings a step's inputs, as bytes, to the other ranks, which ``execute`` them.

    Raises ModelError if the model cannot be loaded, ConfigError if the settings do not fit it or the machine.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        files: ModelFiles,
        group: ParallelGroup = SINGLE,
        publish: Callable[[bytes], None] | None = None,
    ) -> None:
        self.config, self.model_config = config, model_config
        self.group, self.publish = group, publish
        self.torch_device = choose_device(config.device, group.rank)
        self.on_gpu = self.torch_device.type == "cuda"
        self.torch_dtype = _choose_dtype(config.dtype, model_config, self.torch_device)
        self.device, self.dtype = self.torch_device.type, str(self.torch_dtype).removeprefix("torch.")
        self.kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, self.torch_dtype)
        self.kv_cache_dtype = str(self.kv_dtype).removeprefix("torch.")
        self.vocab_size = model_config.vocab_size
        self.block_size = config.block_size
        self.score_rows = max(1, (_GPU_SCORE_BYTES if self.on_gpu else _CPU_SCORE_BYTES) // (4 * self.vocab_size))
        self.startup_seconds: dict[str, float] = {}
        self.max_model_len = self._max_model_len()

        heads = split_heads(model_config.num_attention_heads, model_config.num_key_value_heads, group)
        self.num_kv_heads = heads.num_kv_heads
        shape = shared_memory.Shape(
            model_config.hidden_size, model_config.head_dim, heads.num_kv_heads, self.kv_dtype.itemsize
        )
        measured = group.size == 1 and not model_config.num_experts and not config.batch_invariant
        self.memory_shape = shape if measured and self.on_gpu and use_pdl(self.torch_device) else None
        if config.batch_invariant and not self.on_gpu:
            raise ConfigError("batch_invariant=True needs a GPU; on a CPU float32 comes close (dtype='float32').")
        started = time.perf_counter()
        if self.on_gpu:
            torch.cuda.init()
            torch.cuda.set_device(self.torch_device)
            torch.zeros(1, device=self.torch_device)
            if self.memory_shape is not None:
                shared_memory.watch()
            started = self._phase("cuda_context", started)
        self.backend = select_backend(
            config.attention_backend,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=model_config.head_dim,
            dtype=self.torch_dtype,
            kv_dtype=self.kv_dtype,
            block_size=config.block_size,
            device=self.torch_device,
            batch_invariant=config.batch_invariant,
            overlapping=self.memory_shape in shared_memory.CHOSEN_WITH_ATTENTION,
        )
        self.attention_backend = self.backend.name
        started = self._phase("attention_backend", started)
        self.model = load_model(
            model_config,
            files.path,
            dtype=self.torch_dtype,
            device=self.torch_device,
            load_format=config.load_format,
            seed=config.seed,
            max_positions=self.max_model_len,
            group=group,
            expert_parallel=config.enable_expert_parallel,
        )
        if self.kv_dtype == torch.float8_e4m3fn:
            set_kv_scales(self.model, model_config, self.torch_dtype, self.torch_device)
        shard = self.model.lm_head.shard
        self.vocab = shard.start, shard.stop
        self.model.set_attention_backend(self.backend)
        if config.batch_invariant:
            self.model.set_batch_invariant()
        started = self._phase("load_weights", started)

        layout = kv_cache.Layout(
            model_config.num_hidden_layers, config.block_size, self.num_kv_heads, model_config.head_dim, self.kv_dtype
        )
        num_blocks = kv_cache.num_blocks_that_fit(config, layout, self.max_model_len, self.torch_device, self._measure)
        self.num_blocks = group.minimum(num_blocks, self.torch_device)  # a block is a block on every rank
        self.kv_caches = kv_cache.allocate(self.num_blocks, layout, self.torch_device)
        if config.max_model_len is None:
            self.max_model_len = min(self.max_model_len, self.num_blocks * config.block_size)
        started = self._phase("kv_cache", started)
        if self.on_gpu:
            self._load_kernels()
            started = self._phase("kernels", started)

        max_blocks = -(-self.max_model_len // config.block_size)
        self.builder = StepBuilder(config.block_size, config.max_num_seqs, max_blocks, self.vocab_size)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.torch_device)
        self.sampler = Sampler(config.max_num_seqs, self.torch_device)
        self.copied: torch.cuda.Event | None = None  # the last copy of tokens to the host
        if self.on_gpu:
            self.copies = torch.cuda.Stream(self.torch_device)
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self.to_capture: deque[PromptShape] = deque()
        if self._uses_graphs:
            self._make_graphs(max_blocks)
            self._phase("cuda_graphs", started)

    def launch(self, batch: Batch) -> InFlight:
        """Enqueue one step. Its tokens feed the next launch on the device, whether or not they were waited for."""
        inputs = self._inputs(batch)
        if self.publish is not None:
            self.publish(encoder.encode(inputs))
        try:
            tokens, scores = self.execute(inputs)
        except torch.OutOfMemoryError:
            if self.group.size > 1:
                raise  # the other ranks are in the middle of this step: it cannot begin again
            tokens = None  # and let go of the tensors that the exception holds
        if tokens is None:
            torch.cuda.empty_cache()  # what steps of other sizes left behind may be enough
            try:
                tokens, scores = self.execute(inputs)  # writes once more what the first try may have written
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    f"The GPU has no memory left for a step of {batch.num_tokens} tokens. Lower gpu_memory_utilization "
                    "or max_num_batched_tokens, or end what else uses this GPU."
                ) from error
        return self._to_host(batch, tokens, scores)

    def _inputs(self, batch: Batch) -> DecodeStep | TokenStep:
        for seq in batch.admitted:
            self.sampler.set_slot(seq.slot, seq.sampling)
        self.builder.update_tables(batch)
        slots = np.array([seq.slot for seq in batch.sampled], np.int32)
        new_slots, filtered = self.sampler.take_changes(), self.sampler.needs_filter(slots)
        if self.graphs is not None and self.builder.fits_decode(batch, self.backend.fuses_decode):
            size = self.graphs.find(len(batch.sampled))
            if size is not None:
                return self.builder.decode_step(batch, slots, size, new_slots, filtered)
        return self.builder.token_step(batch, slots, new_slots, filtered)

    def execute(self, inputs: DecodeStep | TokenStep) -> tuple[Tensor, Tensor | None]:
        """Enqueue a step: its tokens, int64 [num_sampled], and scores (see ``_score``), on the device.

        Raises torch.OutOfMemoryError; the step may then be tried again.
        """
        with torch.inference_mode():
            self.sampler.apply(inputs.new_slots)
            if isinstance(inputs, DecodeStep):
                return self._replay(inputs), None
            return self._run_tokens(inputs)

    def capture_ahead(self) -> bool:
        """Capture one graph of prompts that no step has needed yet. Returns whether more may be left.

        For when there is nothing to do: it takes the host some tens of milliseconds, and the device a step's time.
        """
        graphs = self.prompt_graphs
        while graphs is not None and self.to_capture:
            shape = self.to_capture.popleft()
            if shape not in graphs:
                if self.publish is not None:
                    self.publish(encoder.encode(CaptureStep(shape)))
                self.capture(shape)
                return True
        return False

    def capture(self, shape: PromptShape) -> None:
        """``capture_ahead`` of that shape, on every rank. Raises torch.OutOfMemoryError."""
        assert self.prompt_graphs is not None
        with torch.inference_mode():
            self.prompts.clear()
            self.prompt_graphs.run(shape)

    def drop_graphs(self) -> None:
        """Let go of all CUDA graphs; from now on steps run eagerly."""
        self.graphs = self.prompt_graphs = None

    # -- decode by CUDA graph ---------------------------------------------------------------------------------------

    def _make_graphs(self, max_blocks: int) -> None:
        config, device = self.config, self.torch_device
        self.device_tables = torch.zeros(config.max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self.static = DecodeInputs.allocate(config.max_num_seqs, max_blocks, device)
        self.static_rows = torch.full((config.max_num_seqs, 3), -1, dtype=torch.int32, device=device)
        self.known_rows = np.full((config.max_num_seqs, 3), -1, np.int32)  # what static_rows hold
        self.query_starts = torch.arange(config.max_num_seqs + 1, dtype=torch.int32, device=device)
        # Not in the graphs' pool, where the next step would write while the tokens are copied to the host.
        self.tokens = torch.empty(config.max_num_seqs, dtype=torch.int64, device=device)
        num_logits = self.model.lm_head.shard.length
        self.logits = torch.empty(config.max_num_seqs, num_logits, dtype=self.torch_dtype, device=device)
        pool = GraphPool()
        self.graphs = DecodeGraphs(
            pool,
            config.max_num_seqs,
            self._decode_logits,
            self._decode_tokens,
            within=self._divided_memory,
            must_fit=self.group.size > 1,
        )
        with torch.inference_mode():
            self.graphs.capture()
        if self.backend.captures_prefill:
            num_tokens = config.max_num_batched_tokens
            assert num_tokens is not None
            self.prompt_graphs = PromptGraphs(
                pool, num_tokens, config.max_num_seqs, self.max_model_len, self.block_size, self._prompt_logits
            )
            self.prompts = PromptBuffers(num_tokens, self.prompt_graphs.max_num_rows, max_blocks, device)
            whole, cached = self.backend.reads_whole_prompts, config.enable_prefix_caching
            self.to_capture.extend(self.prompt_graphs.likely(whole=whole, later_turns=cached))

    def _divided_memory(self, size: int) -> AbstractContextManager[None]:
        """What is in force while the decode graph of ``size`` rows is captured."""
        if self.memory_shape is None or not self.backend.fuses_decode:
            return nullcontext()
        return shared_memory.prefer(shared_memory.choose_percent(size, self.memory_shape))

    def _decode_logits(self, size: int) -> Tensor:
        """The captured part up to this rank's logits of the first ``size`` static rows."""
        rows = self.static.rows(size)
        decode_inputs(self.static_rows[:size], self.device_tables, self.last_tokens, rows, self.block_size)
        meta = AttentionMetadata(
            query_start_loc=self.query_starts[: size + 1],
            seq_lens=rows.seq_lens,
            block_table=rows.block_table,
            slot_mapping=rows.slot_mapping,
            max_query_len=1,
            max_seq_len=self.max_model_len,
            num_decode_rows=size,
        )
        self.backend.prepare(meta)
        hidden = self.model(rows.input_ids, rows.positions, self.kv_caches, meta)
        return self.model.own_logits(hidden, self.logits[:size])

    def _decode_tokens(self, logits: Tensor, filtered: bool) -> Tensor:
        """The captured part from the logits on: int64 [size]; they also become their slots' last tokens."""
        rows, out = self.static.rows(len(logits)), self.tokens[: len(logits)]
        return self._sample(logits, rows.slots, rows.next_positions, filtered, out)

    def _sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, filtered: bool, out: Tensor | None = None
    ) -> Tensor:
        """Tokens from this rank's part of the logits, int64 [n]; they also become their slots' last tokens.

        Filters need all of the logits in one place.
        """
        if self.group.size > 1 and not filtered:
            return self.sampler.sample_shards(logits, self.vocab, slots, positions, self.group, self.last_tokens, out)
        if self.group.size > 1:
            logits = self.model.lm_head.gather(logits)
        return self.sampler.sample_device(logits, slots, positions, filtered, self.last_tokens, out)

    def _ban(self, logits: Tensor, banned: np.ndarray) -> None:
        """``Sampler.ban`` of indices into whole rows, in this rank's part of the logits."""
        if self.group.size > 1 and len(banned):
            rows, tokens = np.divmod(banned, self.vocab_size)
            start, stop = self.vocab
            mine = (tokens >= start) & (tokens < stop)
            banned = rows[mine] * logits.shape[1] + tokens[mine] - start
        self.sampler.ban(logits, banned)

    def _replay(self, inputs: DecodeStep) -> Tensor:
        assert self.graphs is not None
        graph, count = self.graphs[inputs.graph_size], len(inputs.rows)
        if len(inputs.entering):  # prompts that join as decode rows: what the device does not know of them
            slots = self._put(inputs.entering.astype(np.int64))
            self.device_tables[:, : inputs.tables.shape[1]].index_copy_(0, slots, self._put(inputs.tables))
            self.last_tokens.index_copy_(0, slots, self._put(inputs.tokens.astype(np.int64)))
        rows = np.full((graph.size, 3), -1, np.int32)
        rows[:count] = inputs.rows
        known = self.known_rows[: graph.size]
        if not np.array_equal(rows, known):
            self.static_rows[: graph.size].copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
            known[:] = rows
        graph.forward.replay()
        known[:count, 1] += 1  # as decode_inputs does on the device
        self._ban(graph.logits, inputs.banned)
        sample, tokens = graph.sample[inputs.filtered]
        if self.copied is not None:  # the tokens that this overwrites
            torch.cuda.current_stream().wait_event(self.copied)
        sample.replay()
        return tokens[:count]

    # -- steps with prompt tokens, and all steps of a CPU -----------------------------------------------------------

    def _run_tokens(self, inputs: TokenStep) -> tuple[Tensor, Tensor | None]:
        slots = self._put(inputs.row_slots.astype(np.int64))
        tables = self._put(inputs.tables)
        if self.graphs is not None:
            self.device_tables[:, : tables.shape[1]].index_copy_(0, slots, tables)  # what later decode steps read
        scores = None
        wanted = np.searchsorted(inputs.query_start_loc[1:], inputs.sampled, side="right")  # rows that sample
        shape = self._prompt_shape(inputs)
        if shape is not None:
            assert self.prompt_graphs is not None
            self.prompts.fill(inputs, shape, tables)
            logits = self.prompt_graphs.run(shape)
            every = len(wanted) == len(inputs.seq_lens)
            logits = logits[: len(wanted)] if every else logits[self._put(wanted)]
        else:
            hidden = self._hidden(inputs, slots, tables)
            if inputs.scored.size:
                scores = self._score(hidden, self._put(inputs.scored))
                wanted = inputs.sampled
            if len(wanted) < len(hidden):
                hidden = hidden[self._put(wanted)]
            logits = self.model.own_logits(hidden) if len(hidden) else hidden
        if not len(inputs.sampled):
            return torch.empty(0, dtype=torch.int64), scores
        self._ban(logits, inputs.banned)
        sampled = self.sampler.put_rows(inputs.slots, inputs.new_positions)
        return self._sample(logits, sampled[0], sampled[1], inputs.filtered), scores

    def _prompt_shape(self, inputs: TokenStep) -> PromptShape | None:
        """The bucket of the graph that can run a step: prompts alone, nothing scored."""
        if self.prompt_graphs is None or inputs.num_decode or inputs.scored.size:
            return None
        whole = self.backend.reads_whole_prompts and inputs.whole_prompts
        return self.prompt_graphs.shape(len(inputs.positions), len(inputs.seq_lens), inputs.max_seq_len, whole)

    def _prompt_logits(self, shape: PromptShape) -> Tensor:
        """The captured part of a step of prompts: this rank's logits of each static row's last token."""
        num_tokens, num_rows, num_blocks, whole = shape
        prompts = self.prompts
        ids, positions, slot_mapping = prompts.tokens[:, :num_tokens]
        meta = AttentionMetadata(
            query_start_loc=prompts.query_start_loc[: num_rows + 1],
            seq_lens=prompts.seq_lens[:num_rows],
            block_table=prompts.tables[:num_rows, :num_blocks],
            slot_mapping=slot_mapping,
            max_query_len=num_tokens,
            max_seq_len=num_blocks * self.block_size,
            num_decode_rows=0,
            whole_prompts=whole,
        )
        self.backend.prepare(meta)
        hidden = self.model(ids, positions, self.kv_caches, meta, last_only=True)
        return self.model.own_logits(hidden, self.logits[:num_rows])

    def _hidden(self, inputs: TokenStep, slots: Tensor, tables: Tensor) -> Tensor:
        """Hidden states of a step, launched kernel by kernel: of all tokens if any is scored, else each row's last."""
        meta = AttentionMetadata(
            query_start_loc=self._put(inputs.query_start_loc),
            seq_lens=self._put(inputs.seq_lens),
            block_table=tables,
            slot_mapping=self._put(inputs.slot_mapping),
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
            num_decode_rows=inputs.num_decode,
            whole_prompts=inputs.whole_prompts,
        )
        self.backend.prepare(meta)
        input_ids = self._put(inputs.prompt_ids.astype(np.int64))
        if inputs.num_decode:
            input_ids = torch.cat([self.last_tokens[slots[: inputs.num_decode]], input_ids])
        positions, last_only = self._put(inputs.positions), not inputs.scored.size
        hidden: Tensor = self.model(input_ids, positions, self.kv_caches, meta, last_only=last_only)
        return hidden

    def _score(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """float32 [2, n]: log-probability of each target, and 1 where no token is more likely.

        scored: int64 [2, n], rows of hidden and their targets. A few at a time, so that their logits stay small.
        """
        pieces = zip(scored[0].split(self.score_rows), scored[1].split(self.score_rows), strict=True)
        return torch.cat([score_rows(self.model.compute_logits(hidden[r]), t) for r, t in pieces], dim=1)

    def _to_host(self, batch: Batch, tokens: Tensor, scores: Tensor | None) -> InFlight:
        if not self.on_gpu or (scores is None and not len(tokens)):
            return InFlight(batch, tokens, None, scores)
        # On a stream of its own, so that the next step does not wait for it.
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            tokens = self._copy(tokens) if len(tokens) else tokens
            scores = None if scores is None else self._copy(scores)
            event = torch.cuda.Event()
            event.record()
        self.copied = event
        return InFlight(batch, tokens, event, scores)

    def _copy(self, values: Tensor) -> Tensor:
        """Enqueue a copy to pinned memory in the stream of copies."""
        values.record_stream(self.copies)
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _put(self, values: np.ndarray) -> Tensor:
        return put(values, self.torch_device)

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _measure(self) -> kv_cache.MemoryUse:
        """Run the largest steps there can be, with a cache that one layer's worth of blocks stands in for."""
        config, device = self.config, self.torch_device
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        weights = torch.cuda.memory_allocated(device)
        num_tokens = config.max_num_batched_tokens
        assert num_tokens is not None
        longest = min(num_tokens, self.max_model_len)
        lens = [longest] * (num_tokens // longest) + ([num_tokens % longest] if num_tokens % longest else [])
        try:
            prefill = self._peak(lambda: self._dummy_step(lens, min(len(lens), config.max_num_seqs)))
            decode = self._peak(lambda: self._dummy_step([1] * config.max_num_seqs, config.max_num_seqs))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step of max_num_batched_tokens={num_tokens} tokens with max_num_seqs={config.max_num_seqs} does "
                f"not fit the GPU beside the model's weights ({weights / 2**30:.2f} GiB); {free / 2**30:.2f} GiB were "
                "free. Lower max_num_batched_tokens or max_num_seqs, or use a smaller model."
            ) from error
        torch.cuda.empty_cache()
        graphs = 0
        if self._uses_graphs:
            graphs = max(decode, prefill if self.backend.captures_prefill else 0) + kv_cache.GRAPH_BYTES
        # A prefill step may sample max_num_seqs rows while all its hidden states are there.
        hidden = num_tokens * self.model_config.hidden_size * self.torch_dtype.itemsize
        return kv_cache.MemoryUse(total, free, weights, max(prefill, decode + hidden), graphs)

    def _dummy_step(self, lens: list[int], num_sampled: int, *, last_only: bool = False) -> None:
        size = self.block_size
        width = -(-max(lens) // size)
        shape = (width, size, self.num_kv_heads, self.model_config.head_dim)
        cache = [torch.zeros(shape, dtype=self.kv_dtype, device=self.torch_device) for _ in range(2)]
        decode = max(lens) == 1
        meta = AttentionMetadata(
            query_start_loc=self._put(np.cumsum([0, *lens], dtype=np.int32)),
            seq_lens=self._put(np.array(lens, np.int32)),
            block_table=self._put(np.tile(np.arange(width, dtype=np.int32), (len(lens), 1))),
            slot_mapping=self._put(np.full(sum(lens), -1, np.int64)),
            max_query_len=max(lens),
            max_seq_len=max(lens),
            num_decode_rows=len(lens) if decode else 0,
        )
        self.backend.prepare(meta)
        ids = self._put(np.zeros(sum(lens), np.int64))
        positions = self._put(np.concatenate([np.arange(n) for n in lens]))
        caches = [(cache[0], cache[1])] * self.model_config.num_hidden_layers
        hidden = self.model(ids, positions, caches, meta, last_only=last_only)
        logits = self.model.compute_logits(hidden[:num_sampled])
        sampler = Sampler(num_sampled, self.torch_device)
        last_tokens = self._put(np.zeros(num_sampled, np.int64))
        sampler(logits, np.arange(num_sampled), np.zeros(num_sampled, np.int64), last_tokens=last_tokens)
        del logits
        num_scored = min(len(hidden), self.score_rows)
        self._score(hidden, self._put(np.stack([np.arange(num_scored), np.zeros(num_scored, np.int64)])))

    def _load_kernels(self) -> None:
        """Run prompts of several sizes once. Kernels are chosen by the number of tokens, and compiled or loaded when
        first called, which may take seconds: not while a client waits."""
        most = min(self.config.max_num_batched_tokens or 0, self.max_model_len)
        try:
            with torch.inference_mode():
                for num_tokens in _PROMPT_SIZES:
                    if num_tokens <= most:
                        self._dummy_step([num_tokens], 1)
                        self._dummy_step([num_tokens], 1, last_only=True)
        except torch.OutOfMemoryError:  # who has set the cache's size may have left no room; steps will say so
            if self.group.size > 1:
                raise  # the other ranks are in the middle of this step

    def _peak(self, step: Callable[[], None]) -> int:
        """Bytes that ``step`` needs at most beyond what was allocated before."""
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        with torch.inference_mode():
            step()
        torch.cuda.synchronize(self.torch_device)
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def _phase(self, name: str, started: float) -> float:
        """Note a start-up phase's seconds; returns now."""
        if self.on_gpu:
            torch.cuda.synchronize(self.torch_device)
        now = time.perf_counter()
        self.startup_seconds[name] = now - started
        return now

    @property
    def _uses_graphs(self) -> bool:
        return self.on_gpu and not self.config.enforce_eager and self.backend.capturable

    def _max_model_len(self) -> int:
        limit, wanted = self.model_config.max_context, self.config.max_model_len
        if wanted is not None and wanted > limit:
            raise ConfigError(
                f"max_model_len={wanted} is above what the model was made for: {limit} tokens. Set it to that or less."
            )
        return limit if wanted is None else wanted


class RankExecutor:
    """A tensor-parallel rank other than 0: does on its device what rank 0 does on its own."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.startup_seconds = runner, runner.startup_seconds

    def execute(self, payload: memoryview) -> None:
        """Enqueue a step of rank 0's runner, given as what that one published."""
        inputs = decoder.decode(payload)
        if isinstance(inputs, CaptureStep):
            self.runner.capture(inputs.shape)
        else:
            self.runner.execute(inputs)


def rank_executor(config: EngineConfig, rank: int, size: int, store: Path) -> RankExecutor:
    """The executor of rank ``rank`` (see rank_worker.py): meets the others in ``store`` and loads its part."""
    files = resolve_model(config.model, config.revision)
    model_config = ModelConfig.from_dict(load_config_dict(files))
    group = connect(config, model_config, rank, size, store)
    return RankExecutor(ModelRunner(config, model_config, files, group))


def check_split(model_config: ModelConfig, size: int) -> None:
    """Raises ConfigError if the model cannot be split over ``size`` ranks."""
    split_heads(model_config.num_attention_heads, model_config.num_key_value_heads, ParallelGroup(0, size))


def connect(
    config: EngineConfig,
    model_config: ModelConfig,
    rank: int,
    size: int,
    store: Path,
    check: Callable[[], None] = lambda: None,
) -> ParallelGroup:
    """Meet the other ranks. check: called while waiting for them; it may raise. Raises ConfigError if this machine
    lacks the rank's device."""
    device = choose_device(config.device, rank)
    if device.type == "cpu":  # the ranks share this machine's cores
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    row_bytes = model_config.hidden_size * _choose_dtype(config.dtype, model_config, device).itemsize
    return ParallelGroup.connect(
        rank, size, store, device, max_row_bytes=row_bytes, batch_invariant=config.batch_invariant, check=check
    )


def choose_device(name: str, rank: int = 0) -> torch.device:
    """The device that setting ``device`` names, of a rank; raises ConfigError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU here. Use device='cpu' or 'auto'.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size needs a GPU for each rank, and there is none for rank {rank}: torch sees "
            f"{torch.cuda.device_count()}."
        )
    return torch.device("cuda", rank)


def _choose_dtype(name: str, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return best_cpu_dtype()
    dtype: torch.dtype = getattr(torch, model_config.dtype)
    return torch.bfloat16 if dtype == torch.float32 else dtype
