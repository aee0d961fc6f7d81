"""A runner without a model whose tokens are a function of what it reads through the block tables.

It keeps a simulated KV cache of (token, position) entries. A sampled row gathers its context the way attention would,
checks that every entry is the sequence's own token, and derives the next token from all of it: a block that was shared,
freed or reused wrongly changes tokens or raises. So does a scored row. Like a GPU it answers later: tokens exist once
``wait`` is called.
"""

import hashlib
from array import array

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import Add, OutputItem, pack_tokens
from nanovllm_bento.engine.scheduler import Batch
from nanovllm_bento.sampling_params import SamplingParams

VOCAB = 50
EOS = 1


def next_token(context: list[int], seed: int = 0) -> int:
    """The fake model: any change in the context changes it. Ends (EOS) now and then."""
    digest = hashlib.blake2b(array("i", context).tobytes(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") % VOCAB


def fake_logprob(context: list[int], target: int) -> float:
    """The fake model's log-probability of a token after a context."""
    return -1.0 - next_token(context, seed=1000 + target)


class FakeInFlight:
    def __init__(self, runner: "FakeRunner", batch: Batch, plan: list) -> None:
        self.runner, self.batch, self.plan = runner, batch, plan
        self.tokens: list[int] | None = None
        self.scores: tuple[list[float], list[bool]] = ([], [])

    def wait(self) -> list[int]:
        self.runner.run_until(self)
        assert self.tokens is not None
        return self.tokens

    def read_scores(self) -> tuple[list[float], list[bool]]:
        assert self.tokens is not None, "scores are there after wait"
        return self.scores


class FakeRunner:
    dtype, device, vocab_size = "float32", "fake", VOCAB
    kv_cache_dtype, attention_backend = "float32", "fake"

    def __init__(self, num_blocks: int, block_size: int, max_model_len: int) -> None:
        self.num_blocks, self.block_size, self.max_model_len = num_blocks, block_size, max_model_len
        self.cache: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self.last_token: dict[int, int] = {}
        self.queue: list[FakeInFlight] = []
        self.num_computed_tokens = 0
        self.batches: list[Batch] = []
        self.num_to_capture = 0

    def capture_ahead(self) -> bool:
        assert not self.queue, "a step was in flight"
        self.num_to_capture -= 1
        return self.num_to_capture > 0

    def launch(self, batch: Batch) -> FakeInFlight:
        """Copies what the device would get now: later changes of the sequences must not reach it."""
        plan = []
        for seq, position in zip(batch.decode, batch.positions, strict=True):
            plan.append((seq.slot, list(seq.block_table), position, None, position, True, seq.sampling.seed, []))
        for c in batch.prefill:
            ids = list(c.seq.token_ids[c.start : c.end])
            assert len(ids) == c.end - c.start > 0
            targets = c.seq.targets(c.end - c.num_scored, c.end)
            assert len(targets) == c.num_scored <= len(ids)
            row = (c.seq.slot, list(c.seq.block_table), c.start, ids, c.store_from, c.samples, c.seq.sampling.seed)
            plan.append((*row, targets))
        assert [c for c in batch.prefill if c.num_scored] == batch.scored
        assert [p[0] for p in plan if p[5]] == [seq.slot for seq in batch.sampled]
        assert len({p[0] for p in plan}) == len(plan), "a slot has two rows"
        self.batches.append(batch)
        self.num_computed_tokens += batch.num_tokens
        flight = FakeInFlight(self, batch, plan)
        self.queue.append(flight)
        assert len(self.queue) <= 2, "more than one step was in flight at a launch"
        return flight

    def blocks_in_flight(self) -> set[int]:
        """Blocks that a launched step may still read or write."""
        return {block for flight in self.queue for row in flight.plan for block in row[1]}

    def run_until(self, flight: FakeInFlight) -> None:
        while flight.tokens is None:
            self._run(self.queue.pop(0))

    def _run(self, flight: FakeInFlight) -> None:
        size = self.block_size
        inputs = []
        for slot, table, start, ids, store_from, *_ in flight.plan:  # all rows store before any attends
            tokens = [self.last_token[slot]] if ids is None else ids
            inputs.append(tokens)
            for position, token in enumerate(tokens, start):
                where = table[position // size] * size + position % size
                if position >= store_from:
                    self.cache[where] = (token, position)
        flight.tokens = []
        for (slot, table, start, _, _, samples, seed, targets), tokens in zip(flight.plan, inputs, strict=True):
            end = start + len(tokens)
            context = []
            for position in range(end):
                entry = self.cache[table[position // size] * size + position % size]
                assert entry is not None and entry[1] == position, "attention read a block that is not this sequence's"
                context.append(entry[0])
            assert context[start:] == tokens, "a shared block does not hold these tokens"
            if samples:
                token = next_token(context, seed)
                self.last_token[slot] = token
                flight.tokens.append(token)
            for row, target in enumerate(targets, end - len(targets)):
                flight.scores[0].append(fake_logprob(context[: row + 1], target))
                flight.scores[1].append(next_token(context[: row + 1]) == target)


def expected_tokens(prompt: list[int], sampling: SamplingParams, outputs: list[int] | None = None) -> list[int]:
    """What a request must yield, whatever runs beside it."""
    context, result = prompt + (outputs or []), list(outputs or [])
    assert sampling.max_tokens is not None
    while len(result) < sampling.max_tokens:
        token = next_token(context, sampling.seed or 0)
        context = [*context, token]
        result.append(token)
        if token in (sampling.stop_token_ids or []) or (token == EOS and not sampling.ignore_eos):
            break
    return result


def expected_scores(prompt: list[int], num_scored: int) -> tuple[list[float], list[bool]]:
    """What scoring the last tokens of a prompt must yield, whatever runs beside it."""
    places = range(len(prompt) - num_scored, len(prompt))
    greedy = [next_token(prompt[:i]) == prompt[i] for i in places]
    return [fake_logprob(prompt[:i], prompt[i]) for i in places], greedy


def make_core(
    *, num_blocks: int = 64, block_size: int = 4, max_model_len: int = 200, hash_seed: int = 7, **config: object
) -> EngineCore:
    config.setdefault("max_num_seqs", 8)
    config.setdefault("max_num_batched_tokens", 32)
    settings = EngineConfig.create(env={}, model="fake", block_size=block_size, **config)
    runner = FakeRunner(num_blocks, block_size, min(max_model_len, num_blocks * block_size))
    return EngineCore(settings, runner, eos_token_ids=[EOS], hash_seed=hash_seed)


def add(
    core: EngineCore,
    request_id: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    outputs: list[int] | None = None,
    salt: str = "",
    priority: int = 0,
    deadline: float | None = None,
    **sampling: object,
) -> SamplingParams:
    params = SamplingParams(max_tokens=max_tokens, seed=sampling.pop("seed", 0), **sampling)
    core.add(
        Add(
            request_id,
            pack_tokens(prompt),
            params,
            output_token_ids=pack_tokens(outputs or []),
            cache_salt=salt,
            priority=priority,
            deadline=deadline,
        )
    )
    return params


def add_score(
    core: EngineCore,
    request_id: str,
    prompt: list[int],
    num_scored: int,
    *,
    salt: str = "",
    priority: int = 0,
    deadline: float | None = None,
) -> None:
    core.add(
        Add(
            request_id,
            pack_tokens(prompt),
            SamplingParams(seed=0),
            task="score",
            cache_salt=salt,
            priority=priority,
            deadline=deadline,
            num_scored=num_scored,
        )
    )


def check(core: EngineCore) -> None:
    """Every invariant: the block manager's own, and that no step in flight touches a block that is free."""
    core.check()
    if isinstance(core.runner, FakeRunner):
        free = core.block_manager.free.keys()
        assert not core.runner.blocks_in_flight() & free, "a step in flight reads a block that was freed"


def run(core: EngineCore, max_steps: int = 10_000) -> dict[str, list[OutputItem]]:
    """Step until nothing is left, checking every invariant after each step."""
    items: dict[str, list[OutputItem]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return items
        for _, item in core.step():
            items.setdefault(item.request_id, []).append(item)
        check(core)
    raise AssertionError("the engine does not come to an end")


def tokens_of(items: list[OutputItem]) -> list[int]:
    return [token for item in items for token in item.new_token_ids]
