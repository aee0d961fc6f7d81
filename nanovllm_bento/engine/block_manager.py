"""The KV cache as blocks: who holds which, and which full blocks can be shared by their content (the prefix cache).

Block i of a sequence holds the keys and values of its tokens [i * block_size, (i + 1) * block_size). A full block is
*published* under the hash of its tokens and everything before them; a later sequence that starts with the same tokens
takes the block instead of computing it. A block without references stays published, at the tail of an LRU list, until
its space is wanted. The idea is vLLM's automatic prefix caching; the memory is PagedAttention's (Kwon et al., 2023).

This file decides ownership only; it never touches a tensor.
"""

import secrets
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from nanovllm_bento.engine.sequence import Sequence


@dataclass(slots=True)
class Block:
    """ref_count: sequences that hold it. hash, tokens: set while published; tokens as int32 bytes."""

    id: int
    ref_count: int = 0
    hash: bytes | None = None
    tokens: bytes = b""


class BlockManager:
    """Allocates, shares and frees the ``num_blocks`` blocks of ``block_size`` tokens.

    hash_seed keys the hashes, so that nobody outside can craft a collision; a hit compares the block's tokens as well.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, hash_seed: int | None = None
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.hash_seed = secrets.randbits(64) if hash_seed is None else hash_seed
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self.published: dict[bytes, Block] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self.free)

    @property
    def num_used_blocks(self) -> int:
        return len(self.blocks) - len(self.free)

    def hash_blocks(self, seq: Sequence) -> None:
        """Extend seq.block_hashes and block_tokens to every full block of its known tokens; each is hashed once."""
        size, hashes, tokens = self.block_size, seq.block_hashes, seq.block_tokens
        start, end = len(hashes), len(seq.token_ids) // size
        if not self.enable_prefix_caching or start == end:
            return
        step, seed = 4 * size, self.hash_seed
        data = seq.token_ids[start * size : end * size].tobytes()
        parent = hashes[-1] if hashes else b"salt:" + seq.cache_salt.encode()
        for offset in range(0, len(data), step):
            block_tokens = data[offset : offset + step]
            parent = xxh3_128_digest(parent + block_tokens, seed)
            hashes.append(parent)
            tokens.append(block_tokens)

    def lookup(self, seq: Sequence) -> list[Block]:
        """The longest run of published blocks that seq starts with."""
        self.hash_blocks(seq)
        hits: list[Block] = []
        published = self.published
        for block_hash, tokens in zip(seq.block_hashes, seq.block_tokens, strict=True):
            block = published.get(block_hash)
            if block is None or block.tokens != tokens:
                break
            hits.append(block)
        return hits

    def allocate(self, seq: Sequence, *, reserve: int = 0) -> bool:
        """Give seq blocks for all its known tokens, shared ones first, and set num_computed_tokens to what those hold.

        Tokens whose logits are needed are computed although they are cached: the last one, to sample from it, and those
        that score the next. Returns False, with nothing changed, if fewer than ``reserve`` blocks would be left free.
        """
        assert not seq.block_table
        hits = self.lookup(seq)
        num_new = -(-len(seq.token_ids) // self.block_size) - len(hits)
        num_revived = sum(block.ref_count == 0 for block in hits)
        if num_new + num_revived + reserve > len(self.free):
            return False
        for block in hits:
            if block.ref_count == 0:
                del self.free[block.id]
            block.ref_count += 1
            seq.block_table.append(block.id)
        for _ in range(num_new):
            self.append_block(seq)
        num_hit_tokens = len(hits) * self.block_size
        seq.num_published_blocks = len(hits)
        seq.num_computed_tokens = min(num_hit_tokens, seq.max_cached_tokens)
        if self.enable_prefix_caching:
            self.num_queried_tokens += len(seq.token_ids)
            self.num_hit_tokens += seq.num_computed_tokens
        return True

    def append_block(self, seq: Sequence) -> int:
        """Take the least recently used free block for seq, forgetting what it cached; returns its id."""
        block_id, _ = self.free.popitem(last=False)
        block = self.blocks[block_id]
        if block.hash is not None:
            del self.published[block.hash]
            block.hash, block.tokens = None, b""
        block.ref_count = 1
        seq.block_table.append(block_id)
        return block_id

    def publish(self, seq: Sequence) -> None:
        """Make every full block of seq findable whose tokens are known and whose launch is scheduled."""
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if not self.enable_prefix_caching or num_full <= seq.num_published_blocks:
            return
        self.hash_blocks(seq)
        for i in range(seq.num_published_blocks, num_full):
            block_hash, block = seq.block_hashes[i], self.blocks[seq.block_table[i]]
            if block.hash is None and block_hash not in self.published:  # else an equal block is findable already
                block.hash, block.tokens = block_hash, seq.block_tokens[i]
                self.published[block_hash] = block
        seq.num_published_blocks = num_full

    def unpublish(self, seq: Sequence) -> None:
        """Make seq's blocks unfindable: what they hold cannot be trusted."""
        for block_id in seq.block_table:
            block = self.blocks[block_id]
            if block.hash is not None:
                del self.published[block.hash]
                block.hash, block.tokens = None, b""

    def release(self, seq: Sequence) -> None:
        """Drop seq's blocks. Unpublished ones are reused first; of published ones the end of a prefix goes first."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free[block_id] = None
                if block.hash is None:
                    self.free.move_to_end(block_id, last=False)
        seq.block_table.clear()
        seq.num_published_blocks = 0
        seq.num_computed_tokens = 0

    def check(self, holders: Iterable[Sequence]) -> None:
        """Raise AssertionError unless all invariants hold; ``holders`` are all sequences that hold blocks."""
        refs = [0] * len(self.blocks)
        for seq in holders:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq.request_id} holds a block twice"
            assert len(seq.block_table) * self.block_size >= seq.num_computed_tokens, f"{seq.request_id} lacks blocks"
            for block_id in seq.block_table:
                refs[block_id] += 1
        for block in self.blocks:
            assert block.ref_count == refs[block.id], f"block {block.id}: {block.ref_count} refs, {refs[block.id]} held"
            assert (block.ref_count == 0) == (block.id in self.free), f"block {block.id} is free and used, or neither"
            if block.hash is not None:
                assert self.published[block.hash] is block, f"block {block.id} is not what its hash leads to"
        assert self.num_free_blocks + self.num_used_blocks == len(self.blocks)
        assert len(self.published) == sum(block.hash is not None for block in self.blocks)
