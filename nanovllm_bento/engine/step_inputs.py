"""What the device must know of one step, as plain arrays.

The runner of rank 0 makes it of a Batch; every tensor-parallel rank executes it. Two forms: a DecodeStep has one token
a row and runs as a CUDA graph, reading from the device all that is known there; a TokenStep names every token. Between
steps the ranks may capture a graph together (CaptureStep).
"""

from array import array

import msgspec
import numpy as np

from nanovllm_bento.engine.cuda_graphs import PromptShape
from nanovllm_bento.engine.scheduler import Batch

Array = np.ndarray


class StepInputs(msgspec.Struct, array_like=True, kw_only=True):
    """What both forms have about sampling.

    new_slots: int32 [n, 8], sampling parameters of the slots given to new sequences (kernels.sample.slot_words).
    banned: int64 [m], row * vocab_size + token id of what must not be sampled (ends before min_tokens). filtered:
    whether any row asks for top-k, top-p or min-p.
    """

    new_slots: Array
    banned: Array
    filtered: bool


class DecodeStep(StepInputs, tag=1, array_like=True, kw_only=True):
    """One token a row, for the CUDA graph of ``graph_size`` rows.

    rows: int32 [num_sampled, 3], as kernels.decode_inputs takes them: slot, position, block of the new key and value
    (-1: not stored). entering, tables, tokens: int32 [k] slots of prompts that join as such rows, their block tables
    [k, width], and the tokens to feed [k].
    """

    graph_size: int
    rows: Array
    entering: Array
    tables: Array
    tokens: Array


class TokenStep(StepInputs, tag=2, array_like=True, kw_only=True):
    """Any step: decode rows first, one token each, whose input is their slot's last token; then chunks of prompts.

    row_slots: int32 [num_rows]. query_start_loc: int32 [num_rows + 1]. seq_lens: int32 [num_rows]. tables: int32
    [num_rows, width]. prompt_ids: int32 [num_tokens - num_decode]. positions, slot_mapping: int64 [num_tokens].
    sampled: int64 [num_sampled], the token whose logits each samples from. slots, new_positions: int32 [num_sampled],
    who samples, and the place of the new token in its sequence. scored: int64 [2, n], tokens whose logits
    score, and what they score.
    """

    num_decode: int
    row_slots: Array
    query_start_loc: Array
    seq_lens: Array
    tables: Array
    prompt_ids: Array
    positions: Array
    slot_mapping: Array
    sampled: Array
    slots: Array
    new_positions: Array
    scored: Array
    max_query_len: int
    max_seq_len: int

    @property
    def whole_prompts(self) -> bool:
        """Whether there are no decode rows, and no row has a context before this step."""
        return not self.num_decode and bool((np.diff(self.query_start_loc) == self.seq_lens).all())


class CaptureStep(msgspec.Struct, tag=3, array_like=True):
    """No step, but the graph of prompts of that shape, which later steps will need."""

    shape: PromptShape


def _pack(value: Array) -> tuple[str, tuple[int, ...], bytes]:
    return value.dtype.str, value.shape, value.tobytes()


def _unpack(kind: type, packed: tuple[str, tuple[int, ...], bytes]) -> Array:
    dtype, shape, data = packed
    return np.frombuffer(bytearray(data), dtype).reshape(shape)  # torch wants arrays that may be written to


encoder = msgspec.msgpack.Encoder(enc_hook=_pack)
decoder = msgspec.msgpack.Decoder(DecodeStep | TokenStep | CaptureStep, dec_hook=_unpack)


class StepBuilder:
    """Keeps every slot's block table on the host and makes StepInputs of batches."""

    def __init__(self, block_size: int, max_num_seqs: int, max_blocks: int, vocab_size: int) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)

    def update_tables(self, batch: Batch) -> None:
        """Take up the blocks that the batch's sequences got. Once for each batch, before either form is made of it."""
        for seq in batch.admitted:
            self.block_tables[seq.slot, : len(seq.block_table)] = seq.block_table
        for seq in batch.grown:
            self.block_tables[seq.slot, len(seq.block_table) - 1] = seq.block_table[-1]

    def fits_decode(self, batch: Batch, fuses_decode: bool) -> bool:
        """Whether a batch can be a DecodeStep: one token a row, be it of a prompt whose other tokens are cached."""
        chunks = batch.prefill
        if any(c.end - c.start > 1 or not c.samples for c in chunks):
            return False
        # A fused kernel stores a row's key while other rows attend: no row may share a block that this step fills.
        fills = len(chunks) > 1 and any(c.end > c.store_from and c.end % self.block_size == 0 for c in chunks)
        return not (fills and fuses_decode)

    def decode_step(self, batch: Batch, slots: Array, graph_size: int, new_slots: Array, filtered: bool) -> DecodeStep:
        """slots: int32 [num_sampled], those of batch.sampled."""
        positions = np.array([*batch.positions, *(chunk.start for chunk in batch.prefill)], np.int32)
        blocks = self.block_tables[slots, positions // self.block_size]
        entering = tokens = np.empty(0, np.int32)
        tables = np.empty((0, 0), np.int32)
        if batch.prefill:
            blocks[len(batch.decode) :][[chunk.start < chunk.store_from for chunk in batch.prefill]] = -1
            entering = np.array([chunk.seq.slot for chunk in batch.prefill], np.int32)
            width = -(-max(chunk.end for chunk in batch.prefill) // self.block_size)
            tables = self.block_tables[entering, :width]
            tokens = np.array([chunk.seq.token_ids[chunk.start] for chunk in batch.prefill], np.int32)
        return DecodeStep(
            new_slots=new_slots,
            banned=self._banned(batch, positions + 1),
            filtered=filtered,
            graph_size=graph_size,
            rows=np.stack((slots, positions, blocks), axis=1),
            entering=entering,
            tables=tables,
            tokens=tokens,
        )

    def token_step(self, batch: Batch, slots: Array, new_slots: Array, filtered: bool) -> TokenStep:
        """slots: int32 [num_sampled], those of batch.sampled."""
        size, num_decode = self.block_size, len(batch.decode)
        row_slots = [seq.slot for seq in batch.decode]
        positions = [np.array(batch.positions, np.int64)]
        slot_mapping = [
            self.block_tables[row_slots, positions[0] // size].astype(np.int64) * size + positions[0] % size
        ]
        query_lens, seq_lens = [1] * num_decode, [p + 1 for p in batch.positions]
        prompt_ids = array("i")
        sampled = list(range(num_decode))
        scored: list[int] = []
        targets: list[int] = []
        num_tokens = num_decode
        for chunk in batch.prefill:
            slot = chunk.seq.slot
            where = np.arange(chunk.start, chunk.end)
            mapping = self.block_tables[slot, where // size].astype(np.int64) * size + where % size
            mapping[where < chunk.store_from] = -1
            row_slots.append(slot)
            positions.append(where)
            slot_mapping.append(mapping)
            query_lens.append(chunk.end - chunk.start)
            seq_lens.append(chunk.end)
            prompt_ids += chunk.seq.token_ids[chunk.start : chunk.end]
            num_tokens += chunk.end - chunk.start
            if chunk.samples:
                sampled.append(num_tokens - 1)
            elif chunk.num_scored:
                scored += range(num_tokens - chunk.num_scored, num_tokens)
                targets += chunk.seq.targets(chunk.end - chunk.num_scored, chunk.end)
        all_positions = np.concatenate(positions)
        new_positions = (all_positions[sampled] + 1).astype(np.int32)
        max_seq_len = max(seq_lens)
        return TokenStep(
            new_slots=new_slots,
            banned=self._banned(batch, new_positions),
            filtered=filtered,
            num_decode=num_decode,
            row_slots=np.array(row_slots, np.int32),
            query_start_loc=np.cumsum([0, *query_lens], dtype=np.int32),
            seq_lens=np.array(seq_lens, np.int32),
            tables=self.block_tables[row_slots, : -(-max_seq_len // size)],
            prompt_ids=np.frombuffer(prompt_ids, np.int32) if prompt_ids else np.empty(0, np.int32),
            positions=all_positions,
            slot_mapping=np.concatenate(slot_mapping),
            sampled=np.array(sampled, np.int64),
            slots=slots,
            new_positions=new_positions,
            scored=np.array([scored, targets], np.int64),
            max_query_len=max(query_lens),
            max_seq_len=max_seq_len,
        )

    def _banned(self, batch: Batch, new_positions: Array) -> Array:
        flat = [
            row * self.vocab_size + token
            for row, seq in enumerate(batch.sampled)
            if seq.sampling.min_tokens and new_positions[row] < seq.min_total_tokens
            for token in seq.stop_token_ids
        ]
        return np.array(flat, np.int64)
