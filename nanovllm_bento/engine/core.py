"""The engine's heart: takes requests as token ids, runs the step loop, gives tokens back. Knows no process, no text.

One step is in flight while the next is prepared: ``step`` schedules and launches batch N + 1, then waits for the tokens
of batch N. The same code runs on a GPU, which answers later, and on a CPU, which has answered when launch returns.
"""

import logging
import math
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.block_manager import BlockManager
from nanovllm_bento.engine.messages import (
    DEADLINE_EXCEEDED,
    ENGINE_FAULT,
    ITERATION_TOKENS_BUCKETS,
    Add,
    EngineInfo,
    EngineStats,
    OutputItem,
    pack_tokens,
    token_array,
)
from nanovllm_bento.engine.model_runner import ModelRunner, check_split, choose_device, connect
from nanovllm_bento.engine.ranks import Ranks
from nanovllm_bento.engine.request import check_score, resolve_request
from nanovllm_bento.engine.scheduler import Batch, Scheduler
from nanovllm_bento.engine.sequence import Sequence
from nanovllm_bento.errors import (
    ConfigError,
    DeviceMemoryError,
    EngineDeadError,
    InvalidRequestError,
    NanoVLLMError,
)
from nanovllm_bento.hub import eos_token_ids, load_config_dict, resolve_model
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.models.config import ModelConfig
from nanovllm_bento.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAN = "The model's logits were not numbers (NaN)."
_STEP_TOKENS = {"cuda": 8192, "cpu": 2048}
"""max_num_batched_tokens where it is not given."""
_NO_SAMPLING = SamplingParams(max_tokens=1, seed=0)
"""Of a sequence that is scored: it ends where a first token would be."""


class InFlight(Protocol):
    """A launched step, whose tokens come later."""

    batch: Batch

    def wait(self) -> list[int]:
        """One token per row of batch.sampled, once they are there."""

    def read_scores(self) -> tuple[list[float], list[bool]]:
        """After ``wait``, of each row of batch.scored: log-probability of the next token, and whether it is greedy."""


class Runner(Protocol):
    """What the core needs of a model runner (tests bring their own)."""

    num_blocks: int
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    kv_cache_dtype: str
    attention_backend: str

    def launch(self, batch: Batch) -> InFlight:
        """Enqueue a step. Raises DeviceMemoryError, with nothing enqueued that matters, if the device has no room."""

    def capture_ahead(self) -> bool:
        """Prepare something that makes a later step faster; it may take as long as a step. Whether more may be left."""


class EngineCore:
    """Schedules requests onto a runner. ``hash_seed`` keys the prefix cache (None: random)."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        eos_token_ids: list[int],
        hash_seed: int | None = None,
        startup_seconds: dict[str, float] | None = None,
        ranks: Ranks | None = None,
        leave: Callable[[], None] | None = None,
    ) -> None:
        config = _with_step_size(config)
        self.config, self.runner, self.ranks, self.leave = config, runner, ranks, leave
        self.block_manager = BlockManager(
            runner.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            hash_seed=hash_seed,
        )
        self.scheduler = Scheduler(config, self.block_manager)
        self.in_flight: InFlight | None = None
        self.failure: str | None = None
        """What broke a step off, which cannot be undone nor done again: nothing more can be computed."""
        self.may_capture = True  # whether capture_ahead may have anything to do
        eos_token_ids = [token for token in eos_token_ids if 0 <= token < runner.vocab_size]  # others cannot be sampled
        self.eos_token_ids = frozenset(eos_token_ids)
        self.totals: Counter[str] = Counter()
        self.iteration_tokens = [0] * (len(ITERATION_TOKENS_BUCKETS) + 1)
        self.info = EngineInfo(
            max_model_len=runner.max_model_len,
            vocab_size=runner.vocab_size,
            block_size=config.block_size,
            num_blocks=runner.num_blocks,
            eos_token_ids=eos_token_ids,
            max_num_seqs=config.max_num_seqs,
            scheduling_policy=config.scheduling_policy,
            dtype=runner.dtype,
            device=runner.device,
            startup_seconds={} if startup_seconds is None else startup_seconds,
            kv_cache_dtype=runner.kv_cache_dtype,
            attention_backend=runner.attention_backend,
        )
        if config.max_model_len is not None and config.max_model_len > self.info.num_cache_tokens:
            raise ConfigError(
                f"max_model_len={config.max_model_len} does not fit the KV cache of {self.info.num_cache_tokens} "
                "tokens. Lower it or give the cache more memory (kv_cache_memory_bytes, gpu_memory_utilization)."
            )

    @classmethod
    def from_model(
        cls,
        config: EngineConfig,
        *,
        hash_seed: int | None = None,
        on_rank_failure: Callable[[NanoVLLMError], None] = lambda error: None,
        **rank_options: Any,
    ) -> Self:
        """Load config.model and be ready to run; with tensor_parallel_size above 1 start the other ranks (``close``).

        on_rank_failure: called from another thread when one of them fails; whatever this rank does then raises that
        failure too, at the latest when its GPU no longer waits for the other. rank_options: further ones of ``Ranks``.

        Raises ModelError or ConfigError, and RankError.
        """
        started = time.perf_counter()
        files = resolve_model(config.model, config.revision)
        model_config = ModelConfig.from_dict(load_config_dict(files))
        eos = eos_token_ids(files)
        seconds = {"resolve_model": time.perf_counter() - started}
        config = _with_step_size(config)
        size = config.tensor_parallel_size
        ranks, group, publish, runner = None, SINGLE, None, None
        if size > 1:
            check_split(model_config, size)
            device = choose_device(config.device, size - 1).type
            groups: list[ParallelGroup] = []

            def failed(error: NanoVLLMError) -> None:
                on_rank_failure(error)
                for connected in groups:
                    connected.close()  # else the GPU waits for that rank for ever, and this process for the GPU

            ranks = Ranks(config, size, device=device, on_failure=failed, **rank_options)  # type: ignore[arg-type]
            publish = ranks.publish
        try:
            if ranks is not None:
                group = connect(config, model_config, 0, size, ranks.store, ranks.check)
                groups.append(group)
            runner = ModelRunner(config, model_config, files, group, publish)
            seconds |= runner.startup_seconds
            leave = None if ranks is None else partial(_leave, ranks, group, runner)
            core = cls(
                config,
                runner,
                eos_token_ids=eos,
                hash_seed=hash_seed,
                startup_seconds=seconds,
                ranks=ranks,
                leave=leave,
            )
            started = time.perf_counter()
            core._warm_up()
        except BaseException as error:
            if ranks is None:
                raise
            cause = None if isinstance(error, NanoVLLMError) else ranks.cause()
            _leave(ranks, group, runner)
            if cause is None:
                raise
            raise type(cause)(str(cause)) from error
        if ranks is not None:
            ranks.watch_steps()
        seconds["warm_up"] = time.perf_counter() - started
        return core

    def close(self) -> None:
        """End the other ranks; the engine cannot be used afterwards. May be called again."""
        if self.leave is not None:
            self.leave()

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self.scheduler.sequences) or self.in_flight is not None or bool(self.scheduler.ended)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=self.scheduler.num_running,
            num_requests_waiting=self.scheduler.num_waiting,
            num_blocks_used=self.block_manager.num_used_blocks,
            num_blocks=self.info.num_blocks,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.block_manager.num_queried_tokens,
            prefix_cache_hits=self.block_manager.num_hit_tokens,
            prompt_tokens=self.totals["prompt_tokens"],
            generation_tokens=self.totals["generation_tokens"],
            iteration_tokens=self.iteration_tokens.copy(),
            iteration_tokens_sum=self.totals["iteration_tokens"],
            oldest_waiting_seconds=(now := time.monotonic()) - self.scheduler.oldest_arrival(default=now),
        )

    def add(self, request: Add, client_id: bytes = b"") -> Sequence:
        """Queue a request.

        Raises InvalidRequestError, with nothing changed, if it cannot be served as asked, and EngineDeadError after a
        step that was broken off.
        """
        self._check_alive()
        if request.request_id in self.scheduler.sequences:
            raise InvalidRequestError(f"A request {request.request_id!r} is running already.", param="request_id")
        try:
            token_ids, outputs = token_array(request.prompt_token_ids), token_array(request.output_token_ids)
        except ValueError:
            raise InvalidRequestError("Token ids are not whole int32 numbers.", param="prompt") from None
        sampling, continuation = self._resolve(request, token_ids)
        num_prompt_tokens = len(token_ids)
        if continuation:
            token_ids.pop()
        if request.priority != 0 and self.config.scheduling_policy != "priority":
            raise InvalidRequestError(
                "priority needs an engine with scheduling_policy='priority'; this one is first come, first served.",
                param="priority",
            )
        assert sampling.max_tokens is not None
        if len(outputs) >= sampling.max_tokens:
            raise InvalidRequestError(f"The request has all its {sampling.max_tokens} output tokens already.")
        now = time.monotonic()
        seq = Sequence(
            request_id=request.request_id,
            token_ids=token_ids + outputs,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            eos_token_ids=self.eos_token_ids,
            client_id=client_id,
            cache_salt=request.cache_salt,
            priority=request.priority,
            arrived_at=now,
            deadline=math.inf if request.deadline is None else now + request.deadline - time.time(),
            continuation=continuation,
        )
        self.scheduler.add(seq)
        self.totals["prompt_tokens"] += num_prompt_tokens
        return seq

    def _resolve(self, request: Add, token_ids: "array[int]") -> tuple[SamplingParams, list[int]]:
        """A request's sampling parameters with nothing left open, and the tokens to score, if it is for that."""
        if request.deadline is not None and not math.isfinite(request.deadline):
            raise InvalidRequestError(f"deadline must be a finite time, got {request.deadline}.", param="deadline")
        if request.task == "score":
            if request.output_token_ids:
                raise InvalidRequestError("A score has no output tokens.")
            check_score(token_ids, request.num_scored, self.info)
            return _NO_SAMPLING, list(token_ids[-request.num_scored :])
        if request.task != "generate" or request.num_scored or request.sampling.n != 1:
            raise InvalidRequestError("The engine takes task='generate' (with n=1) or 'score'.")
        return resolve_request(token_ids, request.sampling, self.info), []

    def abort(self, request_id: str) -> None:
        """End a request; nothing more is returned of it. Unknown (ended) ones are ignored."""
        self.scheduler.abort(request_id)

    def step(self) -> list[tuple[Sequence, OutputItem]]:
        """Launch the next step, then collect the one before it. Returns what became known, maybe nothing.

        Raises what another rank has failed with, RankError as a rule. Whatever is raised, nothing more can be computed
        then, and the next call raises EngineDeadError.
        """
        self._check_alive()
        try:
            return self._naming_the_cause(self._step)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise EngineDeadError(f"The engine cannot go on after what broke off a step ({self.failure}).")

    def capture_ahead(self) -> None:
        """Use a moment without work to make a later step faster, while ``may_capture``. It may take as long as a step.

        Raises what ``step`` does of other ranks.
        """
        assert not self.has_work
        try:
            self.may_capture = self._naming_the_cause(self.runner.capture_ahead)
        except Exception:
            if self.ranks is not None:
                raise  # they may be in the middle of it
            self.may_capture = False
            logger.warning("no more is captured ahead of the steps that need it", exc_info=True)

    def _naming_the_cause(self, run: Callable[[], T]) -> T:
        """``run()``. Raises, instead of what a broken collective raises, what the other rank has failed with."""
        try:
            return run()
        except EngineDeadError:
            raise
        except Exception as error:
            cause = None if self.ranks is None else self.ranks.cause()
            if cause is None:
                raise
            raise type(cause)(str(cause)) from error

    def _step(self) -> list[tuple[Sequence, OutputItem]]:
        expired = self.scheduler.expire(time.monotonic()) if self.scheduler.deadlines else []
        batch = self.scheduler.schedule()
        launched, failure = None, None
        if batch is not None:
            num_tokens = batch.num_tokens
            self.iteration_tokens[bisect_left(ITERATION_TOKENS_BUCKETS, num_tokens)] += 1
            self.totals["iteration_tokens"] += num_tokens
            try:
                launched = self.runner.launch(batch)
            except DeviceMemoryError as error:
                failure = error
        collected, self.in_flight = self.in_flight, launched
        outputs = [] if collected is None else self._commit(collected)
        if failure is not None:
            assert batch is not None
            outputs += [_failed(seq, ENGINE_FAULT, str(failure)) for seq in self.scheduler.fail(batch)]
        for seq in expired:
            state = f"after {seq.num_output_tokens} tokens" if seq.scheduled_at else "while it waited"
            outputs.append(_failed(seq, DEADLINE_EXCEEDED, f"The request's deadline passed {state}."))
        return outputs

    def _commit(self, collected: InFlight) -> list[tuple[Sequence, OutputItem]]:
        outputs = []
        batch = collected.batch
        for seq, token in self.scheduler.commit(batch, collected.wait()):
            if token < 0:
                outputs.append(_failed(seq, ENGINE_FAULT, _NAN))
                continue
            item = OutputItem(
                seq.request_id,
                [token],
                seq.finish_reason,
                seq.stop_reason,
                seq.num_cached_tokens,
                None,
                None,
                seq.scheduled_at,
            )
            outputs.append((seq, item))
        self.totals["generation_tokens"] += len(outputs)
        if batch.scored:
            outputs += map(_scored, self.scheduler.commit_scores(batch, *collected.read_scores()))
        return outputs

    def check(self) -> None:
        """Raise AssertionError unless every invariant of the block manager holds (tests call it after each step)."""
        self.block_manager.check(self.scheduler.holders())
        assert self.scheduler.num_running + len(self.scheduler.ended) <= self.config.max_num_seqs
        assert len(self.scheduler.free_slots) + self.scheduler.num_running + len(self.scheduler.ended) == (
            self.config.max_num_seqs
        )

    def _warm_up(self) -> None:
        """Run one short request, so that the first real one does not pay for set-up. The cache keeps no trace."""
        prompt, num_outputs = [0, 0, 0], 2  # a prompt step, and a decode step
        if min(self.info.max_model_len, self.info.num_cache_tokens) < len(prompt) + num_outputs:
            return
        enabled, self.block_manager.enable_prefix_caching = self.block_manager.enable_prefix_caching, False
        self.add(Add("warm-up", pack_tokens(prompt), SamplingParams(max_tokens=num_outputs, ignore_eos=True, seed=0)))
        while self.has_work:
            self.step()
        self.block_manager.enable_prefix_caching = enabled
        self.totals.clear()
        self.iteration_tokens = [0] * len(self.iteration_tokens)


def _leave(ranks: Ranks, group: ParallelGroup, runner: ModelRunner | None) -> None:
    """Leave the group, then end the others. The graphs go first: NCCL's end waits for those that hold its kernels."""
    if runner is not None:
        runner.drop_graphs()
    group.close()
    ranks.close()


def _failed(seq: Sequence, code: str, why: str) -> tuple[Sequence, OutputItem]:
    return seq, OutputItem(seq.request_id, [], "error", error=why, scheduled_at=seq.scheduled_at, error_code=code)


def _scored(seq: Sequence) -> tuple[Sequence, OutputItem]:
    if seq.finish_reason == "error":
        return _failed(seq, ENGINE_FAULT, _NAN)
    item = OutputItem(
        seq.request_id,
        [],
        seq.finish_reason,
        num_cached_tokens=seq.num_cached_tokens,
        logprobs=seq.logprobs,
        scheduled_at=seq.scheduled_at,
        is_greedy=seq.is_greedy,
    )
    return seq, item


def _with_step_size(config: EngineConfig) -> EngineConfig:
    """config with max_num_batched_tokens decided."""
    if config.max_num_batched_tokens is not None:
        return config
    default = _STEP_TOKENS[choose_device(config.device).type]
    return config.model_copy(update={"max_num_batched_tokens": max(default, 2 * config.max_num_seqs)})
