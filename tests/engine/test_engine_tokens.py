"""A real (tiny) model in the whole engine: tokens depend on the request alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny_engines import assert_tokens_depend_on_the_request_alone, roomy_and_tight
from tests.engine.tiny_models import make_tiny

requests = st.lists(
    st.tuples(
        st.lists(st.integers(3, 6), min_size=1, max_size=60), st.integers(1, 40), st.sampled_from([0.0, 0.0, 0.8])
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return roomy_and_tight(make_tiny("qwen3", tmp_path_factory.mktemp("tiny")), "cpu")


@settings(max_examples=15)
@given(requests=requests)
def test_not_on_the_batch_the_schedule_chunks_the_prefix_cache_or_preemption(engines, requests):
    assert_tokens_depend_on_the_request_alone(*engines, requests)


def test_the_tight_engines_do_preempt_and_share(engines):
    prompt = list(range(3, 40))
    others = [(list(range(100 + i, 137 + i)), 40, 0.0) for i in range(3)]
    assert_tokens_depend_on_the_request_alone(*engines, [(prompt, 40, 0.0), ([*prompt, 7], 40, 0.8), *others])
    for core in engines[1]:
        assert core.stats.num_preemptions > 0 and core.stats.prefix_cache_hits > 0
