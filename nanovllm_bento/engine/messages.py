"""What API workers and the engine process say to each other: msgspec structs, encoded as msgpack.

Token ids travel as little-endian int32 bytes, so that a long prompt costs a copy and not a loop. The ``epoch`` rises at
each engine start; a message of an older epoch is dropped.
"""

import struct

import msgspec

from nanovllm_bento.sampling_params import SamplingParams


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """worker → engine: announce this client and its process; the engine answers with Ready, at once or when it is.

    The engine ends the client's requests when that process ends.
    """

    pid: int


class Add(msgspec.Struct, tag="add", array_like=True):
    """worker → engine: run a request. ``output_token_ids`` are tokens it already has (after a restart).

    sampling: resolved (seed and max_tokens are set). cache_salt: prefix-cache blocks are shared within one salt only.
    priority: lower runs earlier. task: only "generate" so far. deadline: None so far. An engine that cannot do what is
    asked answers with an item whose finish_reason is "error".
    """

    request_id: str
    prompt_token_ids: bytes
    sampling: SamplingParams
    output_token_ids: bytes = b""
    task: str = "generate"
    cache_salt: str = ""
    priority: int = 0
    deadline: float | None = None


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """worker → engine: stop these requests; nothing more is said of them."""

    request_ids: list[str]


class EngineInfo(msgspec.Struct, frozen=True):
    """What a caller must know of a ready engine to check and resolve requests."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    eos_token_ids: list[int]
    max_num_seqs: int
    scheduling_policy: str
    dtype: str
    device: str
    startup_seconds: dict[str, float]
    kv_cache_dtype: str = ""
    attention_backend: str = ""

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that the whole KV cache holds."""
        return self.num_blocks * self.block_size


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """engine → worker: the engine serves; its process is ``pid``."""

    epoch: int
    pid: int
    info: EngineInfo


class OutputItem(msgspec.Struct, array_like=True):
    """New tokens of one request. finish_reason: None, "stop", "length", "abort" or "error" (``error`` says why).

    stop_reason: the stop token id that ended it, None at an end-of-sequence token.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: list[dict[int, float]] | None = None
    error: str | None = None


class StepOutput(msgspec.Struct, tag="step", array_like=True):
    """engine → worker: what one step gave to this worker's requests."""

    epoch: int
    step: int
    items: list[OutputItem]


class EngineStats(msgspec.Struct, array_like=True):
    """State and totals since start; tokens, blocks and requests."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Heartbeat(msgspec.Struct, tag="heartbeat", array_like=True):
    """engine → worker: alive, sent at least once per heartbeat interval."""

    epoch: int
    stats: EngineStats


class EngineArgs(msgspec.Struct):
    """What the engine's process is told on its standard input (JSON). config: keywords of EngineConfig."""

    config: dict[str, object]
    folder: str
    epoch: int
    owner_pid: int
    hash_seed: int
    heartbeat_interval: float


ToEngine = Hello | Add | Abort
ToWorker = Ready | StepOutput | Heartbeat

encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)


def pack_tokens(token_ids: list[int]) -> bytes:
    """Token ids as little-endian int32 bytes (a third of the time that array or numpy take from a list)."""
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of pack_tokens."""
    return list(struct.unpack(f"<{len(data) // 4}i", data))
