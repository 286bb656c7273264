"""A suffix automaton that grows token by token and knows how often each substring occurred, and where first and last.

Blumer et al. 1985. Every state stands for a set of substrings that end at the same positions; its suffix link leads
to the longest suffix that also ends elsewhere. So the link of the state of the whole text is the longest suffix
that has occurred before. Appending a token costs amortised O(1).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

_MAX_REFRESHED = 64
"""How far up the suffix links an append refreshes `_recent` and `_counts`. Only in a text with that many nested repeats
can a match be reported at an older position than its latest one, or a count be too small; matches stay the longest."""


class Match(NamedTuple):
    """An earlier occurrence of a suffix: its length, and the position of the token that followed it."""

    length: int
    next: int


class Context(NamedTuple):
    """A substring, named by its state and its length."""

    state: int
    length: int


NOWHERE = Context(0, 0)
"""The empty substring."""


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
        self._first = [-1]
        self._counts = [0]
        self._last = 0
        self._match = Match(0, 0)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        position = len(self.tokens)
        self.tokens.append(token)
        new = self._add_state({}, self._lengths[self._last] + 1, -1, position, position, 1)
        state = self._last
        while state != -1 and token not in self._transitions[state]:
            self._transitions[state][token] = new
            state = self._links[state]
        self._links[new] = 0 if state == -1 else self._suffix_state(state, token)
        self._last = new
        self._note_occurrence(self._links[new], position)

    def longest_match(self) -> Match:
        """The longest suffix of the text that occurred earlier, at its latest earlier position; length 0 if none."""
        return self._match

    def known_suffix(self) -> Context:
        """The suffix that `longest_match` is about."""
        state = max(0, self._links[self._last])
        return Context(state, self._lengths[state])

    def step(self, context: Context, token: int) -> Context:
        """Match another text token by token.

        Start with `NOWHERE`. The result names the longest suffix of the other text that occurs in this one.
        """
        state, length = context
        while state and token not in self._transitions[state]:
            state = self._links[state]
            length = self._lengths[state]
        if token not in self._transitions[state]:
            return NOWHERE
        return Context(self._transitions[state][token], length + 1)

    def followers(self, state: int, limit: int) -> dict[int, int]:
        """The tokens that occur after a state's substrings, those seen first (at most `limit`), and their states."""
        return dict(islice(self._transitions[state].items(), limit))

    def count(self, state: int) -> int:
        """How often a state's substrings occur."""
        return self._counts[state]

    def shorter(self, state: int) -> Context:
        """The longest suffix of a state's substrings that has occurred elsewhere too."""
        link = self._links[state]
        return Context(link, self._lengths[link])

    def position_after(self, state: int) -> int:
        """Position of the token after the latest occurrence of a state's substrings."""
        return self._recent[state] + 1

    def first_position_after(self, state: int) -> int:
        """Position of the token after the first occurrence of a state's substrings."""
        return self._first[state] + 1

    def _add_state(
        self, transitions: dict[int, int], length: int, link: int, recent: int, first: int, count: int
    ) -> int:
        self._transitions.append(transitions)
        self._lengths.append(length)
        self._links.append(link)
        self._recent.append(recent)
        self._first.append(first)
        self._counts.append(count)
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
            self._first[target],
            self._counts[target],
        )
        self._links[target] = clone
        while state != -1 and self._transitions[state].get(token) == target:
            self._transitions[state][token] = clone
            state = self._links[state]
        return clone

    def _note_occurrence(self, state: int, position: int) -> None:
        self._match = Match(self._lengths[state], self._recent[state] + 1)
        for _ in range(_MAX_REFRESHED):
            if state <= 0:
                return
            self._recent[state] = position
            self._counts[state] += 1
            state = self._links[state]
