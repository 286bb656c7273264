"""Texts that were written before, for drafters that copy."""

from __future__ import annotations

from collections.abc import Sequence

MOST_TOKENS = 16_384


class EarlierTexts:
    """The latest texts of a kind; rows that write another of the kind share them, and it grows while they do.

    Args:
        most_tokens: of which at most twice as many are kept: then only the latest half of that is.

    Attributes:
        texts: token ids, the oldest first.
        num_forgotten: of the texts before those.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS):
        self._most_tokens = most_tokens
        self._num_tokens = 0
        self.texts: list[list[int]] = []
        self.num_forgotten = 0

    def add(self, tokens: Sequence[int]) -> None:
        """A text more."""
        self.texts.append(list(tokens[: self._most_tokens]))
        self._num_tokens += len(self.texts[-1])
        if self._num_tokens <= 2 * self._most_tokens:
            return
        num_old = 0
        while self._num_tokens > self._most_tokens:
            self._num_tokens -= len(self.texts[num_old])
            num_old += 1
        del self.texts[:num_old]
        self.num_forgotten += num_old
