"""Engines of every shape on the fake device, for hypothesis: small caches, budgets and blocks, so that all happens."""

from typing import Any

from hypothesis import strategies as st


def _keywords(block_size: int, num_cache_tokens: int, **settings: Any) -> dict[str, Any]:
    return {"num_blocks": num_cache_tokens // block_size, "block_size": block_size, **settings}


core_shapes = st.builds(
    _keywords,
    schedule_mode=st.sampled_from(["two_phase", "mixed"]),
    max_num_batched_tokens=st.integers(9, 64),
    max_num_seqs=st.integers(1, 8),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_cache_tokens=st.integers(64, 160),
    enable_prefix_caching=st.booleans(),
)
"""Keywords of fake_runner.make_core."""
