"""Decides what each step computes: which sequences run, which wait, and who gives way when blocks run out.

A step has one token budget (max_num_batched_tokens) and at most max_num_seqs sequences run. ``two_phase`` keeps prefill
and decode steps apart, prefill first but at most max_consecutive_prefill_steps in a row while anything waits to decode;
``mixed`` takes all decode rows first and fills the rest of the budget with prefill. Both cut long prompts into chunks.

The scheduler runs one step ahead of the tokens: ``schedule`` may be called while the step before is still on the
device. A decode row then feeds a token that only the device knows. A sequence that turns out to have ended costs one
wasted row.

Order is strict: nothing ages. Under scheduling_policy="priority" a steady load of lower numbers holds back higher ones
for as long as it lasts (EngineStats.oldest_waiting_seconds tells), until a deadline ends them; equals are served in the
order of their arrival.
"""

import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from nanovllm_bento.config import EngineConfig
from nanovllm_bento.engine.block_manager import BlockManager
from nanovllm_bento.engine.sequence import Sequence


@dataclass(slots=True)
class PrefillChunk:
    """Tokens [start, end) of seq. Those before ``store_from`` sit in shared blocks and are not stored again.

    samples: whether it reaches the sequence's end, so that its last row yields a token. num_scored: so many of its last
    rows yield the log-probability of the token after them.
    """

    seq: Sequence
    start: int
    end: int
    store_from: int
    samples: bool
    num_scored: int = 0


@dataclass(slots=True)
class Batch:
    """One step. Rows: a decode row (one token at ``positions[i]``) per sequence in ``decode``, then the prefill chunks.

    sampled: sequences that get a token, in row order. scored: chunks with rows that score, in row order. admitted:
    sequences that got a slot and a block table in this step. grown: sequences whose block table got one more block in
    this step.
    """

    step: int
    decode: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    scored: list[PrefillChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.end - chunk.start for chunk in self.prefill)


class Scheduler:
    """Holds every unfinished sequence: waiting (a heap by priority and arrival), prefilling or decoding."""

    def __init__(self, config: EngineConfig, block_manager: BlockManager) -> None:
        assert config.max_num_batched_tokens is not None, "the core decides it"
        self.config, self.max_num_batched_tokens = config, config.max_num_batched_tokens
        self.block_manager = block_manager
        self.sequences: dict[str, Sequence] = {}
        self.waiting: list[tuple[tuple[int, int], Sequence]] = []
        self.deadlines: list[tuple[float, str]] = []  # a heap of those that have one; may hold requests that ended
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self.ended: list[tuple[int, Sequence]] = []  # (last step that may read its blocks, sequence)
        self.step = 0
        self.committed_step = 0
        self.num_arrivals = 0
        self.num_preemptions = 0
        self.num_consecutive_prefill_steps = 0

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def num_waiting(self) -> int:
        return len(self.sequences) - self.num_running

    def holders(self) -> Iterator[Sequence]:
        """Every sequence that may hold blocks (for the checker)."""
        yield from self.prefilling
        yield from self.decoding
        for _, seq in self.ended:
            yield seq

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; its request was checked to fit in the cache. Its arrival number is set here."""
        assert seq.request_id not in self.sequences
        self.num_arrivals += 1
        seq.arrival = self.num_arrivals
        self.sequences[seq.request_id] = seq
        heapq.heappush(self.waiting, (seq.order, seq))
        if seq.deadline < math.inf:
            heapq.heappush(self.deadlines, (seq.deadline, seq.request_id))
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Rebuild a heap once most of it has ended; so both stay small, at a constant cost per request."""
        if len(self.waiting) > 2 * self.num_waiting + 64:
            self.waiting = [entry for entry in self.waiting if entry[1].finish_reason is None]
            heapq.heapify(self.waiting)
        if len(self.deadlines) > 2 * len(self.sequences) + 64:
            alive = self.sequences.values()
            self.deadlines = [(seq.deadline, seq.request_id) for seq in alive if seq.deadline < math.inf]
            heapq.heapify(self.deadlines)

    def expire(self, now: float) -> list[Sequence]:
        """Abort the requests whose deadline is over at ``now``, a time.monotonic(); returns them."""
        expired = []
        while self.deadlines and self.deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self.deadlines)
            seq = self.sequences.get(request_id)
            if seq is not None and seq.deadline == deadline:
                self._end(seq, "abort")
                expired.append(seq)
        return expired

    def oldest_arrival(self, default: float) -> float:
        """time.monotonic() at which the request that waits longest arrived."""
        return min((s.arrived_at for _, s in self.waiting if s.finish_reason is None), default=default)

    def abort(self, request_id: str, reason: str = "abort") -> Sequence | None:
        """End a request now; its blocks are freed once no step in flight reads them. None if it is not running."""
        seq = self.sequences.get(request_id)
        if seq is not None:
            self._end(seq, reason)
        return seq

    # -- schedule ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Choose the next step. None: nothing can be computed until the step in flight is committed, or at all.

        Preemption needs a sequence's last token, so it happens only while no step is in flight.
        """
        if self.ended:
            self._free_ended()
        batch = Batch(self.step + 1)
        if self.config.schedule_mode == "mixed":
            if self.decoding and not self._schedule_decode(batch):
                return None
            self._schedule_prefill(batch)
        else:
            prefill_turn = (
                not self.decoding or self.num_consecutive_prefill_steps < self.config.max_consecutive_prefill_steps
            )
            if prefill_turn:
                self._schedule_prefill(batch)
            if not batch.prefill and self.decoding and not self._schedule_decode(batch):
                return None
            if not batch.decode and not batch.prefill and not prefill_turn:
                self._schedule_prefill(batch)  # all decoding sequences only wait for their last token
            self.num_consecutive_prefill_steps = self.num_consecutive_prefill_steps + 1 if batch.prefill else 0
        if not batch.decode and not batch.prefill:
            return None
        self.step = batch.step
        return batch

    def _schedule_decode(self, batch: Batch) -> bool:
        """Add a row for every decoding sequence; False if blocks lack and a step in flight must be committed first."""
        size = self.block_manager.block_size
        while True:
            rows: list[Sequence] = []
            positions: list[int] = []
            growing: list[Sequence] = []
            add_row, add_position = rows.append, positions.append
            for seq in self.decoding:
                position = seq.num_computed_tokens
                if position < seq.last_position:  # else its last token is on its way
                    add_row(seq)
                    add_position(position)
                    seq.num_computed_tokens = position + 1
                    if position % size == 0:
                        growing.append(seq)
            if len(growing) <= self.block_manager.num_free_blocks:
                break
            for seq in rows:
                seq.num_computed_tokens -= 1
            if self.step != self.committed_step:
                return False
            self._preempt(max((*self.prefilling, *self.decoding), key=lambda seq: seq.order))
        for seq in growing:
            self.block_manager.append_block(seq)
        batch.decode, batch.positions, batch.sampled, batch.grown = rows, positions, rows.copy(), growing
        return True

    def _schedule_prefill(self, batch: Batch) -> None:
        """Spend what is left of the budget on prompts: those begun first, then waiting ones in order."""
        budget = self.max_num_batched_tokens - len(batch.decode)
        for seq in list(self.prefilling):
            if budget == 0:
                return
            budget -= self._add_chunk(batch, seq, budget)
        while budget > 0 and self.free_slots:
            newcomer = self._next_waiting()
            if newcomer is None:
                return
            # Leave running sequences some room to grow, or the newcomer is preempted at once.
            reserve = max(1, len(self.block_manager.blocks) // 100) if self.num_running else 0
            if not self.block_manager.allocate(newcomer, reserve=reserve):
                return
            heapq.heappop(self.waiting)
            newcomer.slot = self.free_slots.pop()
            if newcomer.num_preemptions == 0:
                newcomer.num_cached_tokens = newcomer.num_computed_tokens
                newcomer.scheduled_at = time.monotonic()
            self.prefilling.append(newcomer)
            batch.admitted.append(newcomer)
            budget -= self._add_chunk(batch, newcomer, budget)

    def _next_waiting(self) -> Sequence | None:
        while self.waiting and self.waiting[0][1].finish_reason is not None:
            heapq.heappop(self.waiting)  # aborted while it waited
        return self.waiting[0][1] if self.waiting else None

    def _add_chunk(self, batch: Batch, seq: Sequence, budget: int) -> int:
        start = seq.num_computed_tokens
        end = min(len(seq.token_ids), start + budget)
        is_last = end == len(seq.token_ids)
        store_from = seq.num_published_blocks * self.block_manager.block_size
        chunk = PrefillChunk(seq, start, end, store_from, samples=is_last and not seq.continuation)
        batch.prefill.append(chunk)
        seq.num_computed_tokens = end
        self.block_manager.publish(seq)  # equal prompts of this very step find what this chunk writes
        if seq.continuation and end > seq.score_from:
            chunk.num_scored = end - seq.score_from
            seq.score_from = end
            batch.scored.append(chunk)
        if is_last:
            self.prefilling.remove(seq)
            self.decoding.append(seq)  # one that is scored has no row there, and ends when its scores are read
        if chunk.samples:
            batch.sampled.append(seq)
        return end - start

    def _preempt(self, seq: Sequence) -> None:
        """Take seq's blocks and queue it again; its full blocks stay findable while nobody needs the space."""
        assert seq.num_inflight == 0
        (self.decoding if seq in self.decoding else self.prefilling).remove(seq)
        self._free(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        heapq.heappush(self.waiting, (seq.order, seq))

    # -- commit -----------------------------------------------------------------------------------------------------

    def commit(self, batch: Batch, tokens: list[int]) -> list[tuple[Sequence, int]]:
        """Take the tokens of a finished step, one per row of batch.sampled; steps are committed in order.

        Returns the sequences that got a token, with it; those that ended have a finish_reason. A negative token stands
        for logits that were not numbers and ends its sequence with "error".
        """
        assert batch.step == self.committed_step + 1
        self.committed_step = batch.step
        if self.ended:
            self._free_ended()
        committed = []
        for row in zip(batch.sampled, tokens, strict=True):
            seq, token = row
            if seq.finish_reason is not None:
                continue  # ended while this row was in flight
            committed.append(row)
            if token < 0:
                self._end(seq, "error")
                continue
            token_ids = seq.token_ids
            position = len(token_ids)
            token_ids.append(token)
            if token in seq.stop_token_ids:  # not sampled before min_tokens
                seq.stop_reason = None if token in seq.eos_token_ids else token
                self._end(seq, "stop")
            elif position == seq.last_position:
                self._end(seq, "length")
        return committed

    def commit_scores(self, batch: Batch, logprobs: list[float], is_greedy: list[bool]) -> list[Sequence]:
        """Take the scores of a step, one per scored row, after its ``commit``. Returns the sequences that are done.

        One whose scores are not finite ends with "error".
        """
        done, start = [], 0
        for chunk in batch.scored:
            rows = slice(start, start + chunk.num_scored)
            start, seq = rows.stop, chunk.seq
            if seq.finish_reason is not None:
                continue
            seq.logprobs += logprobs[rows]
            seq.is_greedy += is_greedy[rows]
            if len(seq.logprobs) == len(seq.continuation):
                seq.token_ids.append(seq.continuation[-1])
                self._end(seq, "stop" if math.isfinite(sum(seq.logprobs)) else "error")
                done.append(seq)
        return done

    def fail(self, batch: Batch) -> list[Sequence]:
        """Give up a batch that could not be launched: its sequences end with "error". Returns them.

        It is the newest step, and every step before it is committed.
        """
        assert batch.step == self.step == self.committed_step + 1
        self.committed_step = batch.step
        for seq in batch.decode:
            if seq.finish_reason is not None:
                seq.num_computed_tokens -= 1  # it ended with the step before; this row was never computed
        sequences = [*batch.decode, *(chunk.seq for chunk in batch.prefill)]
        failed = [seq for seq in sequences if seq.finish_reason is None]
        for seq in failed:
            self._end(seq, "error")
        self._free_ended()
        return failed

    def _end(self, seq: Sequence, reason: str) -> None:
        seq.finish_reason = reason
        del self.sequences[seq.request_id]
        if seq.slot < 0:
            return  # it waited, and holds nothing
        (self.decoding if seq in self.decoding else self.prefilling).remove(seq)
        # A row of it may be in flight; an ending found at commit knows, an abort (perhaps amid its prompt) does not.
        found_at_commit = reason in ("stop", "length")
        if found_at_commit and seq.num_inflight == 0:
            self.ended.append((self.committed_step, seq))  # so that clients learn of it before its blocks are freed
        elif self.step == self.committed_step:
            self._free(seq)
        else:
            self.ended.append((self.step, seq))

    def _free_ended(self) -> None:
        """Free ended sequences that no step in flight reads any more."""
        still_read = []
        for step, seq in self.ended:
            if step <= self.committed_step:
                self._free(seq)
            else:
                still_read.append((step, seq))
        self.ended = still_read

    def _free(self, seq: Sequence) -> None:
        if seq.finish_reason == "error":
            self.block_manager.unpublish(seq)  # they may hold NaN, or were never written
        else:
            self.block_manager.publish(seq)  # what it decoded, all at once: cheaper than block by block
        self.block_manager.release(seq)
        self.free_slots.append(seq.slot)
        seq.slot = -1
