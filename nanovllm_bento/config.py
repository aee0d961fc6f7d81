"""Every setting, from one validated source: EngineConfig for the engine, ServiceConfig for the HTTP side.

Precedence: keyword > command line > environment (``NANOVLLM_<NAME>``, e.g. NANOVLLM_MAX_NUM_SEQS) > default. The
command line passes its options as keywords, so ``create(**keywords)`` covers both. Settings carry vLLM's names. A leaf:
imports neither torch nor transformers.
"""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanovllm_bento.errors import ConfigError

ENV_PREFIX = "NANOVLLM_"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def create(cls, *, env: Mapping[str, str] | None = None, **keywords: Any) -> Self:
        """Build from keywords over environment over defaults.

        Keywords set to None count as not given. Raises ConfigError for an unknown keyword or a value out of range.
        """
        env = os.environ if env is None else env
        for name in keywords:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(cls.model_fields))}."
                raise ConfigError(f"unknown argument {name!r} for {cls.__name__}.{hint}")
        values = {n: env[ENV_PREFIX + n.upper()] for n in cls.model_fields if env.get(ENV_PREFIX + n.upper())}
        from_env = {name: f"{ENV_PREFIX}{name.upper()}" for name in values}
        for name, value in keywords.items():
            if value is not None:
                values[name] = value
                from_env.pop(name, None)
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            first = e.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            where = f" (from {from_env[name]})" if name in from_env else ""
            what = f"{name}={first['input']!r}{where}: " if name else ""
            raise ConfigError(f"{what}{first['msg'].removeprefix('Value error, ')}") from None


class EngineConfig(_Settings):
    """Settings of one engine. Sizes in tokens unless named otherwise."""

    model: str = Field("Qwen/Qwen3-0.6B", min_length=1)
    """A local folder, a .gguf file, a Hub id, a BentoML model tag (name:version) or "demo"."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on a GPU; on a CPU bfloat16 where the CPU multiplies it natively, else float32."""
    seed: int = Field(0, ge=0)
    """Seed of random weights (load_format="dummy"); requests carry their own."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights from the config alone, for benchmarks."""

    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus output; None takes the model's own limit (less if the KV cache holds less)."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences that run at the same time, at most."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Tokens in one step, at most; None: 8192 on a GPU, 2048 on a CPU (at least what max_num_seqs needs)."""
    schedule_mode: Literal["two_phase", "mixed"] = "two_phase"
    """two_phase: a step is all prefill or all decode; mixed: decode first, the rest of the budget is prefill."""
    max_consecutive_prefill_steps: int = Field(8, ge=1)
    """two_phase: prefill steps in a row while anything waits to decode, at most."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """priority: a lower number runs earlier."""

    block_size: int = Field(16, ge=1, le=1024)
    """Tokens in a KV cache block."""
    enable_prefix_caching: bool = True
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """auto: the model's dtype; fp8_e4m3: half the bytes, with a scale per layer."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    """Bytes of KV cache; None: from gpu_memory_utilization, on a CPU a quarter of free memory, 4 GiB at most."""
    num_gpu_blocks_override: int | None = Field(None, ge=1)
    """Number of KV blocks, instead of one computed from memory (tests)."""

    tensor_parallel_size: int = Field(1, ge=1, le=8)
    data_parallel_size: int = Field(1, ge=1)
    enforce_eager: bool = False
    """No CUDA graphs."""
    attention_backend: Literal["auto", "flash_attn", "triton", "torch"] = "auto"
    """auto: the fastest that works here (``nanovllm-bento doctor`` says which and why)."""
    batch_invariant: bool = False
    """GPU: a request's tokens are bit-equal whatever else runs and however it was chunked, at some cost in speed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)} is not supported yet; only 1 is.")
        if self.max_num_batched_tokens is None:
            return self
        if self.schedule_mode == "mixed" and self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be above max_num_seqs={self.max_num_seqs} "
                "in mixed mode, or prefill could starve."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_num_seqs="
                f"{self.max_num_seqs}: a decode step has one token per running sequence."
            )
        return self


class ServiceConfig(_Settings):
    """Settings of the HTTP side."""

    served_model_name: str | None = None
    """Name in /v1/models and in requests; None: the engine's model name."""
    stream_interval: int = Field(1, ge=1)
    """Steps joined in one chunk of a stream (the first and the last are never held back)."""
    engine_start_timeout: float = Field(600.0, gt=0)
    """Seconds an engine may take to get ready."""
    engine_heartbeat_interval: float = Field(1.0, gt=0)
    engine_heartbeat_timeout: float = Field(120.0, gt=0)
    """Seconds without any message of the engine after which it counts as hung; longer than its longest step."""
    engine_max_restarts: int = Field(3, ge=0)
    """Restarts after faults within ten minutes, at most; then the service stays not ready."""
    max_waiting_requests: int = Field(2048, ge=1)
    """Open requests of one worker beyond which new ones get 429."""
    generate_batch_max_size: int = Field(32, ge=1)
    generate_batch_max_latency_ms: int = Field(120_000, ge=1)
    """BentoML sheds what would wait longer than this (503), so it lies above the longest permitted batch."""
    workers: int = Field(1, ge=1)
    """API worker processes."""
    ipc_dir: str | None = None
    """Folder of the sockets between workers and engine; None: one in the runtime folder, named after the service."""
