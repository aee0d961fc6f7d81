"""One request inside the engine: its tokens, how far it is computed, and the KV blocks it holds."""

import math
from array import array
from dataclasses import dataclass, field

from nanovllm_bento.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Positions and counts are in tokens.

    token_ids: the prompt and every committed output token, as int32: a waiting request costs little more than that.
    num_computed_tokens: tokens whose keys and values are written by steps launched so far; a decoding sequence has
    computed all but its last token, which may still be on the device. block_hashes, block_tokens: chained hash and
    packed tokens of each full block, made once.
    last_position: place of the last token it may have; that one is never fed back. min_total_tokens: tokens before
    which it cannot end at a stop token. stop_token_ids: ids that end it; those of ``eos_token_ids`` among them give no
    stop_reason. arrived_at, scheduled_at, deadline: time.monotonic() of its arrival, of the step that first computed
    something of it, and by which it must have finished.

    continuation: the tokens to score, for a request that asks for their log-probabilities instead of new ones. The last
    of them is never fed, so it is not in token_ids: the token at position p is scored by the row at p - 1. score_from:
    the first row that no launched step has scored. logprobs, is_greedy: of the tokens scored so far.
    """

    request_id: str
    token_ids: "array[int]"
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    client_id: bytes = b""
    cache_salt: str = ""
    priority: int = 0
    arrival: int = 0
    arrived_at: float = 0.0
    deadline: float = math.inf
    continuation: list[int] = field(default_factory=list)

    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_at: float = 0.0
    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    block_tokens: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[float] = field(default_factory=list)
    is_greedy: list[bool] = field(default_factory=list)

    score_from: int = field(init=False)
    last_position: int = field(init=False)
    min_total_tokens: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.sampling.max_tokens is not None and self.sampling.seed is not None, "sampling must be resolved"
        self.score_from = len(self.token_ids) - len(self.continuation)
        self.last_position = self.num_prompt_tokens + self.sampling.max_tokens - 1
        self.min_total_tokens = self.num_prompt_tokens + self.sampling.min_tokens
        stops = frozenset(self.sampling.stop_token_ids or ())
        self.stop_token_ids = stops if self.sampling.ignore_eos else stops | self.eos_token_ids

    @property
    def num_inflight(self) -> int:
        """Sampled tokens that are not committed yet: launched by a step whose tokens have not been read."""
        return max(0, self.num_computed_tokens + 1 - len(self.token_ids))

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may come from the prefix cache; the others' logits are needed."""
        return self.score_from if self.continuation else len(self.token_ids) - 1

    def targets(self, start: int, end: int) -> list[int]:
        """The tokens of the continuation that rows [start, end) score."""
        first = self.num_prompt_tokens - len(self.continuation)
        return self.continuation[start - first : end - first]

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower runs earlier; the highest is preempted first."""
        return (self.priority, self.arrival)
