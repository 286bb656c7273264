"""A suffix automaton that grows token by token and knows where each repeated suffix stood last.

Blumer et al. 1985. Every state stands for a set of substrings that end at the same places; its suffix link leads
to the longest suffix that also ends elsewhere. So the link of the state of the whole text is the longest suffix
that has occurred before. Appending a token costs amortised O(1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_MAX_RECENCY_STEPS = 64
"""How far up the suffix links an append refreshes `_recent`. Only in a text with that many nested repeats can a
match be reported at an older place than its latest one; the match itself stays the longest."""


class Match(NamedTuple):
    """An earlier occurrence of a suffix: its length, and the position of the token that followed it."""

    length: int
    next: int


class SuffixAutomaton:
    """Finds the longest suffix of a growing text that occurred before.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self._transitions: list[dict[int, int]] = [{}]
        self._links = [-1]
        self._lengths = [0]
        self._recent = [-1]
        self._last = 0
        self._match = Match(0, 0)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        position = len(self.tokens)
        self.tokens.append(token)
        new = self._add_state({}, self._lengths[self._last] + 1, -1, position)
        state = self._last
        while state != -1 and token not in self._transitions[state]:
            self._transitions[state][token] = new
            state = self._links[state]
        self._links[new] = 0 if state == -1 else self._suffix_state(state, token)
        self._last = new
        self._note_match(self._links[new], position)

    def longest_match(self) -> Match:
        """The longest suffix of the text that occurred earlier, at its latest earlier place; length 0 if none."""
        return self._match

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Match another text token by token: from a state and matched length to the next ones.

        Start with `(0, 0)`. The result names the longest suffix of the other text that occurs in this one.
        """
        while state and token not in self._transitions[state]:
            state = self._links[state]
            length = self._lengths[state]
        if token not in self._transitions[state]:
            return 0, 0
        return self._transitions[state][token], length + 1

    def position_after(self, state: int) -> int:
        """Position of the token after the latest occurrence of a state's substrings."""
        return self._recent[state] + 1

    def _add_state(self, transitions: dict[int, int], length: int, link: int, recent: int) -> int:
        self._transitions.append(transitions)
        self._lengths.append(length)
        self._links.append(link)
        self._recent.append(recent)
        return len(self._links) - 1

    def _suffix_state(self, state: int, token: int) -> int:
        """The state of the longest known suffix, split off from a longer one if it has to be."""
        target = self._transitions[state][token]
        if self._lengths[target] == self._lengths[state] + 1:
            return target
        clone = self._add_state(
            dict(self._transitions[target]),
            self._lengths[state] + 1,
            self._links[target],
            self._recent[target],
        )
        self._links[target] = clone
        while state != -1 and self._transitions[state].get(token) == target:
            self._transitions[state][token] = clone
            state = self._links[state]
        return clone

    def _note_match(self, state: int, position: int) -> None:
        self._match = Match(self._lengths[state], self._recent[state] + 1)
        for _ in range(_MAX_RECENCY_STEPS):
            if state <= 0:
                return
            self._recent[state] = position
            state = self._links[state]
