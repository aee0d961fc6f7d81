"""The prefix cache: what it finds and saves on two synthetic sets, and TTFT of a long prompt, cold and cached."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tqdm import tqdm

from nanovllm_bento.bench.roofline import ModelCost
from nanovllm_bento.bench.workloads import MAX_TOKEN_ID, Conversations
from nanovllm_bento.engine.core import EngineCore
from nanovllm_bento.engine.messages import Add, pack_tokens
from nanovllm_bento.errors import EngineError
from nanovllm_bento.sampling_params import SamplingParams

GOALS = {"multi-turn": {"hit_rate": 0.78, "prefill_saved": 0.70}}
"""To beat, as shares of the prompt tokens."""


@contextmanager
def prefix_caching(core: EngineCore, enabled: bool) -> Iterator[None]:
    """An idle engine with its prefix cache on or off for a while. Only bookkeeping knows of it, no kernel does."""
    assert not core.has_work
    manager = core.block_manager
    before, manager.enable_prefix_caching = manager.enable_prefix_caching, enabled
    try:
        yield
    finally:
        manager.enable_prefix_caching = before


@dataclass(slots=True)
class _Run:
    """What one run over a set gave. Tokens and FLOPs of prompts: as asked, and as computed."""

    seconds: float = 0.0
    hit_tokens: int = 0
    queried_tokens: int = 0
    prefilled_tokens: int = 0
    output_tokens: int = 0
    prefill_flops: int = 0
    ttft: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        ordered = sorted(self.ttft)
        return {
            "seconds": round(self.seconds, 3),
            "prefilled_tokens": self.prefilled_tokens,
            "output_tok_s": round(self.output_tokens / self.seconds, 1),
            "ttft_median_ms": round(statistics.median(ordered) * 1e3, 2),
            "ttft_p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))] * 1e3, 2),
        }


def prefix_row(core: EngineCore, conversations: Conversations, cost: ModelCost) -> dict[str, Any]:
    """A set run with the cache off, then on (and empty at first).

    hit_rate: hits / queries, in tokens, by the engine's own count. prefill_saved: 1 - prompt tokens computed with it on
    / off, counted from the batches, so recomputation after a preemption counts. prefill_flops_saved: the same in FLOPs,
    where a token far back in a long context costs more attention.
    """
    off = _run(core, conversations, cost, enabled=False)
    on = _run(core, conversations, cost, enabled=True)
    return {
        **conversations.describe(),
        "hit_rate": round(on.hit_tokens / on.queried_tokens, 4),
        "prefill_saved": round(1 - on.prefilled_tokens / off.prefilled_tokens, 4),
        "prefill_flops_saved": round(1 - on.prefill_flops / off.prefill_flops, 4),
        "speedup": round(off.seconds / on.seconds, 3),
        "off": off.as_dict(),
        "on": on.as_dict(),
        "goal": GOALS.get(conversations.name),
    }


def _run(core: EngineCore, conversations: Conversations, cost: ModelCost, *, enabled: bool) -> _Run:
    """All conversations at once, each going on to its next turn when its answer is complete."""
    run = _Run()
    before = core.stats
    said = [list(conversations.system) for _ in conversations.user_turns]
    turn = [0] * len(said)
    asked: dict[str, tuple[int, float]] = {}  # request -> (conversation, when), until its first token
    salt = f"{conversations.name}-{time.monotonic_ns()}"  # finds nothing of an earlier run
    limit = core.info.vocab_size

    def ask(c: int) -> None:
        said[c] += [token % limit for token in conversations.user_turns[c][turn[c]]]
        request_id = f"{c}-{turn[c]}"
        sampling = SamplingParams(
            temperature=conversations.temperature,
            max_tokens=conversations.answer_lens[c][turn[c]],
            ignore_eos=True,
            seed=1000 * c + turn[c],
        )
        asked[request_id] = (c, time.perf_counter())
        core.add(Add(request_id, pack_tokens(said[c]), sampling, cache_salt=salt))

    for c in range(len(said)):
        said[c] = [token % limit for token in said[c]]
    label = f"{conversations.name}, cache {'on' if enabled else 'off'}"
    num_requests = sum(map(len, conversations.user_turns))
    with prefix_caching(core, enabled), tqdm(total=num_requests, desc=label, unit="req", leave=False) as progress:
        started = time.perf_counter()
        for c in range(len(said)):
            ask(c)
        while core.has_work:
            outputs = core.step()
            launched = core.in_flight
            for chunk in launched.batch.prefill if launched is not None else ():
                run.prefilled_tokens += chunk.end - chunk.start
                run.prefill_flops += cost.prefill(chunk.end, chunk.start)
            now = time.perf_counter()
            for seq, item in outputs:
                if item.finish_reason == "error":
                    raise EngineError(item.error)
                c = int(item.request_id.partition("-")[0])
                if item.request_id in asked:
                    run.ttft.append(now - asked.pop(item.request_id)[1])
                said[c] += item.new_token_ids
                run.output_tokens += len(item.new_token_ids)
                if seq.finish_reason is not None:
                    progress.update()
                    turn[c] += 1
                    if turn[c] < len(conversations.user_turns[c]):
                        ask(c)
        run.seconds = time.perf_counter() - started
    run.hit_tokens = core.stats.prefix_cache_hits - before.prefix_cache_hits
    run.queried_tokens = core.stats.prefix_cache_queries - before.prefix_cache_queries
    return run


def ttft_row(core: EngineCore, *, prompt_len: int = 4096, repeat: int = 7) -> dict[str, Any]:
    """Milliseconds from handing a prompt to an idle engine to its first token: new prompts, then the same again.

    The prompt is a whole number of blocks, at most ``prompt_len`` tokens and what max_model_len leaves; so asked again
    it is cached in full and the engine computes its last token alone.
    """
    info = core.info
    length = min(prompt_len, info.max_model_len - 2, info.num_cache_tokens - 2) // info.block_size * info.block_size
    random = Random(prompt_len)
    limit = min(MAX_TOKEN_ID, info.vocab_size - 1)
    cold, cached = [], []
    with prefix_caching(core, True):
        _first_token(core, [random.randint(0, limit) for _ in range(length)])  # shapes seen for the first time
        for _ in range(repeat):
            prompt = [random.randint(0, limit) for _ in range(length)]
            cold.append(_first_token(core, prompt))
            cached.append(_first_token(core, prompt))
    if cached[0][1] != length - 1 or cold[0][1] != 0:
        raise RuntimeError(f"of {length} prompt tokens {cold[0][1]} were cached at first, and then {cached[0][1]}")
    row: dict[str, Any] = {"prompt_tokens": length, "repeat": repeat}
    row["max_num_batched_tokens"] = core.config.max_num_batched_tokens
    for name, runs in (("cold", cold), ("cached", cached)):
        times = [seconds for seconds, _ in runs]
        row[f"{name}_ms"] = round(statistics.median(times) * 1e3, 3)
        row[f"{name}_min_ms"] = round(min(times) * 1e3, 3)
    return row


def _first_token(core: EngineCore, prompt: list[int]) -> tuple[float, int]:
    """(seconds to the first token, prompt tokens found in the cache) of one request; the engine is idle after it."""
    packed = pack_tokens(prompt)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
    started = time.perf_counter()
    core.add(Add(f"ttft-{started}", packed, sampling))
    while True:
        outputs = core.step()
        if outputs:
            seconds = time.perf_counter() - started
            break
    while core.has_work:
        core.step()
    return seconds, outputs[0][1].num_cached_tokens
