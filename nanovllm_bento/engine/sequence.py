"""One request inside the engine: its tokens, how far it is computed, and the KV blocks it holds."""

from dataclasses import dataclass, field

from nanovllm_bento.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Positions and counts are in tokens.

    token_ids: the prompt and every committed output token. num_computed_tokens: tokens whose keys and values are
    written by steps launched so far; a decoding sequence has computed all but its last token, which may still be on the
    device. packed_tokens: the tokens it came with as int32 bytes, if at hand. block_hashes, block_tokens: chained hash
    and packed tokens of each full block, made once.
    last_position: place of the last token it may have; that one is never fed back. min_total_tokens: tokens before
    which it cannot end at a stop token. stop_token_ids: ids that end it; those of ``eos_token_ids`` among them give no
    stop_reason.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    client_id: bytes = b""
    cache_salt: str = ""
    packed_tokens: bytes = b""
    priority: int = 0
    arrival: int = 0

    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    block_tokens: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None

    last_position: int = field(init=False)
    min_total_tokens: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.sampling.max_tokens is not None and self.sampling.seed is not None, "sampling must be resolved"
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
    def order(self) -> tuple[int, int]:
        """Who goes first: lower runs earlier; the highest is preempted first."""
        return (self.priority, self.arrival)
