"""Every setting, from one validated source: EngineConfig for the engine, ServiceConfig for the HTTP side.

Precedence: keyword > command line > environment (``NANOVLLM_<NAME>``, e.g. NANOVLLM_MAX_NUM_SEQS) > default. The
command line passes its options as keywords, so ``create(**keywords)`` covers both. Settings carry vLLM's names. A leaf:
imports neither torch nor transformers.
"""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

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
    """Ranks that share the model, each a process with a device of its own (docs/parallelism.md)."""
    enable_expert_parallel: bool = False
    """Mixtures of experts only: each rank holds whole experts instead of a part of every one."""
    tensor_parallel_timeout: float = Field(30.0, gt=0)
    """Seconds without any progress of a tensor-parallel rank, while a step waits for it, after which it counts as hung
    and the engine ends. Not while the engine starts."""
    data_parallel_size: int = Field(1, ge=1)
    enforce_eager: bool = False
    """No CUDA graphs."""
    attention_backend: Literal["auto", "flash_attn", "triton", "torch"] = "auto"
    """auto: the fastest that works here (``nanovllm-bento doctor`` says which and why)."""
    batch_invariant: bool = False
    """GPU: a request's tokens are bit-equal whatever else runs and however it was chunked, at some cost in speed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data_parallel_size > 1:
            raise ValueError(f"data_parallel_size={self.data_parallel_size} is not supported yet; only 1 is.")
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
    stream_interval: int | None = Field(None, ge=1)
    """Tokens joined in one chunk of a stream (the first and the last are never held back). None: one, and while the
    worker is busy those of a moment (max_stream_delay_ms). What comes while a client reads slowly is joined anyway."""
    max_stream_delay_ms: float = Field(40.0, ge=0)
    """Longest moment whose tokens are joined in one chunk when stream_interval is None and the worker is busy."""
    engine_module: str = "nanovllm_bento.engine.worker"
    """Python module that is run as the engine's process; nanovllm_bento.bench.fake_engine answers without a model."""
    engine_start_timeout: float = Field(600.0, gt=0)
    """Seconds an engine may take to get ready."""
    engine_heartbeat_interval: float = Field(1.0, gt=0)
    engine_heartbeat_timeout: float = Field(120.0, gt=0)
    """Seconds without any message of the engine after which it counts as hung; longer than its longest step."""
    engine_max_restarts: int = Field(3, ge=0)
    """Restarts after faults within ten minutes, at most; then the service stays not ready."""
    engine_max_resumes: int = Field(2, ge=0)
    """Restarts of the engine through which one request goes on; at the next it ends with an error."""
    worker_max_restarts: int = Field(3, ge=0)
    """API workers that are replaced within ten minutes when they end without being told to; after that the service ends
    with exit code 1."""
    end_on_failure: bool | None = None
    """End with exit code 1 once no engine will come, instead of answering 503 with the reason; None: in a container."""
    shutdown_grace_seconds: float = Field(20.0, ge=0)
    """After SIGTERM: time for running requests to finish before they end with an error."""
    bentoml_instruments: bool = False
    """BentoML's own tracing, access log and metrics, on the routes of the OpenAI API too. They cost about 0.5 ms a
    request and 25 µs a chunk."""
    max_waiting_requests: int = Field(2048, ge=1)
    """Open requests of one worker beyond which new ones get 429."""

    # generate_batch and score, which BentoML's adaptive batching serves: one batch at a time in each worker
    generate_batch_max_size: int = Field(32, ge=2)
    """Prompts in one batch; BentoML wants at least 2."""
    generate_batch_max_latency_ms: int | None = Field(None, ge=1)
    """BentoML sheds (503) what it thinks will wait longer than this. None: more than batch_max_calls calls can."""
    generate_batch_max_tokens: int = Field(1024, ge=1)
    """max_tokens of one item, at most: the whole batch waits for its longest one."""
    score_max_size: int = Field(32, ge=2)
    """Continuations in one batch."""
    score_max_latency_ms: int | None = Field(None, ge=1)
    """As generate_batch_max_latency_ms."""
    score_max_tokens: int = Field(8192, ge=2)
    """Context and continuation of one item, at most."""
    batch_max_seconds: float = Field(300.0, gt=0)
    """Time of one batch; items that are not done by then end with an error, so that the next batch can begin."""
    batch_max_calls: int = Field(256, ge=1)
    """Calls of each of the two that are open in one worker, beyond which new ones get 429."""
    batch_max_items: int = Field(256, ge=1)
    """Items of one call."""

    workers: int | None = Field(None, ge=1)
    """API worker processes. None: with a GPU one for every four CPU cores, at most 4; else 1, as the engine needs the
    cores."""
    ipc_dir: str | None = None
    """Folder of the sockets between workers and engine, of this service alone; None: one in the runtime folder, named
    after the service."""

    # Who may ask, and how much (docs/security.md)
    api_keys: SecretStr | None = None
    """Keys that clients send as "Authorization: Bearer KEY": name:key[:priority] or key alone, separated by commas."""
    api_keys_file: str | None = None
    """A file of such keys, one a line or as JSON; read again when it changes. No keys at all: everybody may ask."""
    api_key_open_paths: str = "/health,/healthz,/livez,/readyz"
    """Paths that need no key, separated by commas."""
    max_concurrency_per_key: int | None = Field(None, ge=1)
    """Sequences that one key may have open over all workers; None: its share of each worker's max_waiting_requests."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Of one key over all workers; a whole minute's worth may come at once."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Prompt and output tokens of one key over all workers."""
    prefix_cache_isolation: Literal["key", "none"] = "key"
    """key: cached prompt prefixes are shared only among requests of the same key (of one name); none: among all."""
    cors_allow_origins: str = ""
    """Origins whose web pages may call this service, separated by commas, or *. Empty: none but its own."""
    max_body_bytes: int = Field(16 * 2**20, ge=1)
    """Longest request body; more is 413."""
    max_messages: int = Field(4096, ge=1)
    """Messages of one conversation."""
    max_prompt_chars: int | None = Field(None, ge=1)
    """Characters of one prompt; None: those of max_model_len times the vocabulary's longest token."""
    max_stop_strings: int = Field(16, ge=1)
    """Stop strings of one request."""
    max_stop_chars: int = Field(256, ge=1)
    """Characters of one stop string."""

    metrics_prefix: str = Field("nanovllm:", pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
    """Begins every name at /metrics; "vllm:" for routers and dashboards that were made for vLLM."""
    otlp_traces_endpoint: str | None = None
    """Where traces go, with their path (http://collector:4318/v1/traces); None: what OTEL_EXPORTER_OTLP_* say, or no
    traces."""
    log_format: Literal["text", "json"] = "text"
    """json: one JSON object a line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = False
    """One line for each finished request."""
    log_prompts: bool = False
    """The access log holds the text of prompts. Never logged otherwise."""

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        for name in ("generate_batch_max_latency_ms", "score_max_latency_ms"):
            value = getattr(self, name)
            if value is not None and value < 1000 * self.batch_max_seconds:
                raise ValueError(
                    f"{name}={value} must be at least 1000 * batch_max_seconds={self.batch_max_seconds:g}, or BentoML "
                    "sheds what a permitted batch keeps waiting."
                )
        return self
