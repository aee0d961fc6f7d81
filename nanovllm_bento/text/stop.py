"""Finds stop strings in a stream of text, character by character.

One Knuth-Morris-Pratt automaton a stop string (Knuth, Morris, Pratt 1977, section 2): a constant amortised cost a
character however long the stop string is, and its state is at once the length of the text that must be held back.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class StopMatch(NamedTuple):
    """``end``: index in the fed text just behind the match; ``stop``: the matched string."""

    end: int
    stop: str


class StopMatcher:
    """Searches for any of ``stops`` (none empty). The match that is complete first wins, of several the longest.

    So what is found does not depend on how the stream is cut into pieces.
    """

    __slots__ = ("_failures", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def num_held(self) -> int:
        """Characters at the end of the text fed so far that may be the start of a stop string."""
        return max(self._states)

    def feed(self, text: str, armed: bool = True) -> StopMatch | None:
        """Goes on with ``text``. Not armed, a match that ends in this text is passed over.

        After a match the matcher is done and must not be fed again.
        """
        match: StopMatch | None = None
        for i, stop in enumerate(self._stops):
            if not self._states[i] and stop[0] not in text:
                continue
            end = self._advance(i, text, armed)
            if end is not None and (match is None or end < match.end):
                match = StopMatch(end, stop)
        return match

    def _advance(self, i: int, text: str, armed: bool) -> int | None:
        stop, failure, state = self._stops[i], self._failures[i], self._states[i]
        for index, char in enumerate(text):
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
                if state == len(stop):
                    if armed:
                        return index + 1
                    state = failure[state - 1]
        self._states[i] = state
        return None


@lru_cache(maxsize=256)
def _failure_table(stop: str) -> list[int]:
    """Entry i: length of the longest proper prefix of ``stop`` that ends stop[: i + 1]. Nobody writes to it."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
