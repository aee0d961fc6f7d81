"""What API workers and the engine process say to each other: msgspec structs, encoded as msgpack.

One message a frame. A worker sends those of one turn of its event loop as the frames of one ZeroMQ message.

Token ids travel as little-endian int32 bytes, so that a long prompt costs a copy and not a loop. The ``epoch`` rises at
each engine start; a message of an older epoch is dropped.
"""

import struct
import sys
from array import array
from typing import Annotated, Literal

import msgspec

from nanovllm_bento.sampling_params import SamplingParams


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """worker → engine: announce this client and its process; the engine answers with Ready, at once or when it is.

    The engine ends the client's requests when that process ends.
    """

    pid: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class Add(msgspec.Struct, tag="add", array_like=True):
    """worker → engine: run a request. ``output_token_ids`` are tokens it already has (after a restart).

    sampling: resolved (seed and max_tokens are set). cache_salt: prefix-cache blocks are shared within one salt only.
    priority: lower runs earlier. deadline: time.time() by which the request must have finished; one that has not ends
    with an item of error_code "deadline_exceeded". An engine that cannot do what is asked answers with an item whose
    finish_reason is "error".

    task: "generate", or "score": the log-probabilities of the prompt's last ``num_scored`` tokens, in one item. Nothing
    is sampled, and ``sampling`` has no effect.
    """

    request_id: str
    prompt_token_ids: bytes
    sampling: SamplingParams
    output_token_ids: bytes = b""
    task: str = "generate"
    cache_salt: str = ""
    priority: int = 0
    deadline: float | None = None
    num_scored: int = 0


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

    stop_reason: the stop token id that ended it, None at an end-of-sequence token. scheduled_at: time.monotonic() of
    the step that first computed something of the request. error_code: what kind of error, one of the constants below.

    Of a score, in its only item: logprobs, the natural logarithm of each scored token's probability, and is_greedy,
    whether that token was the most likely one.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: list[float] | None = None
    error: str | None = None
    scheduled_at: float = 0.0
    is_greedy: list[bool] | None = None
    error_code: str | None = None


INVALID_REQUEST = "invalid_request"
DEADLINE_EXCEEDED = "deadline_exceeded"
ENGINE_FAULT = "engine_fault"


class StepOutput(msgspec.Struct, tag="step", array_like=True):
    """engine → worker: what one step gave to this worker's requests."""

    epoch: int
    step: int
    items: list[OutputItem]


ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of EngineStats.iteration_tokens, in tokens; those of vLLM."""


class EngineStats(msgspec.Struct, array_like=True):
    """State and totals since start; tokens, blocks and requests.

    iteration_tokens: steps by the number of tokens they computed, one count per bound of ITERATION_TOKENS_BUCKETS (not
    cumulative) and one for all above; iteration_tokens_sum: those tokens. oldest_waiting_seconds: how long the request
    that waits longest does so. epoch: the engine's, set by the client that receives them.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    iteration_tokens: list[int] = msgspec.field(default_factory=lambda: [0] * (len(ITERATION_TOKENS_BUCKETS) + 1))
    iteration_tokens_sum: int = 0
    oldest_waiting_seconds: float = 0.0
    epoch: int = 0


class Heartbeat(msgspec.Struct, tag="heartbeat", array_like=True):
    """engine → worker: alive, sent at least once per heartbeat interval."""

    epoch: int
    stats: EngineStats


class EngineArgs(msgspec.Struct):
    """What the engine's process is told on its standard input (JSON). config: keywords of EngineConfig.

    drain_timeout: seconds that running requests get to finish after SIGTERM.
    """

    config: dict[str, object]
    folder: str
    epoch: int
    owner_pid: int
    hash_seed: int
    heartbeat_interval: float
    drain_timeout: float = 30.0
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


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


def token_array(data: bytes) -> "array[int]":
    """What pack_tokens made, as an array: four bytes a token and no loop. Raises ValueError for half a token."""
    tokens = array("i", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
