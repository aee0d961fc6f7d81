"""StopMatcher finds what plain searching finds, however the text is cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.text.stop import StopMatch, StopMatcher

TEXT = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> StopMatch | None:
    found = [StopMatch(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    return min(found, key=lambda match: (match.end, -len(match.stop)), default=None)


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS, st.data())
def test_the_first_complete_match_is_found_however_the_text_is_cut(text, stops, data):
    expected = first_match(text, stops)
    matcher, fed, match = StopMatcher(stops), 0, None
    while fed < len(text) and match is None:
        size = data.draw(st.integers(1, 8))
        match = matcher.feed(text[fed : fed + size])
        if match is not None:
            match = StopMatch(fed + match.end, match.stop)
        fed += size
    assert match == expected


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS)
def test_the_longest_possible_start_of_a_stop_string_is_held(text, stops):
    matcher = StopMatcher(stops)
    if matcher.feed(text) is None:
        starts = {stop[:size] for stop in stops for size in range(len(stop))}
        assert matcher.num_held == max(len(start) for start in starts if text.endswith(start))


def test_of_matches_complete_at_the_same_place_the_longest_wins():
    assert StopMatcher(["c", "abc", "bc"]).feed("xabc") == StopMatch(4, "abc")


def test_a_match_complete_while_not_armed_is_passed_over_but_may_begin_there():
    matcher = StopMatcher(["aba"])
    assert matcher.feed("xaba", armed=False) is None
    assert matcher.num_held == 1
    assert matcher.feed("ba") == StopMatch(2, "aba")


def test_a_long_stop_string_costs_no_more_than_its_characters():
    matcher = StopMatcher(["a" * 100_000 + "b"])
    for _ in range(200):
        assert matcher.feed("a" * 1000) is None
    assert matcher.num_held == 100_000
    assert matcher.feed("b") == StopMatch(1, "a" * 100_000 + "b")
