"""How much of a waiting prompt is read between two rounds, or in the forward of one: what costs about a round.

Rows that decode wait for the chunk, and the prompt waits for their rounds. Where a round takes r seconds and a chunk c
more, their tokens come (r + c) / r times as far apart, and the prompt takes (r + c) / c times as long as alone: neither
can be had for nothing. What a token costs depends on model, machine, context and company: it is measured, not set.
"""

from __future__ import annotations

from collections import deque
from statistics import median

LEAST = 4
"""Tokens of a chunk, at least. Eight take 2.5 rounds where a token is dear (AVX2)."""
_SHARE = 1.7
"""Seconds of a chunk, in rounds: tokens come 2.7 times as far apart, a prompt takes 1.6 times as long as alone."""
_ROUNDS = 9
"""Whose median says what a round takes."""
_CHUNKS = 5
"""Whose median says what a token takes: few, for it grows with what has been read."""
_GROWTH = 1.5
"""Most that a chunk may be larger than the one before: small ones are too short to be timed well."""
_MOST_ALONG = 16
"""Rounds with a chunk before one without, which shows what rounds take by now."""


class ChunkSizer:
    """Sizes chunks by what rounds and chunks before have taken.

    Args:
        most: tokens of a chunk.
    """

    def __init__(self, most: int):
        self._most = most
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self._rates: deque[float] = deque(maxlen=_CHUNKS)
        self._last = most
        self._num_along = 0

    def size(self, *, is_decoding: bool) -> int:
        """Tokens to read next; 0 for a round without any.

        Args:
            is_decoding: whether anyone waits for a round.
        """
        if not is_decoding:
            return self._most
        if self._num_along >= _MOST_ALONG or not self._rounds:
            return 0
        least = min(LEAST, self._most)
        if not self._rates:
            return least
        rate = max(median(self._rates), 1e-9)
        num_affordable = min(_SHARE * median(self._rounds) / rate, _GROWTH * self._last, self._most)
        return max(least, int(num_affordable))

    def update_round(self, seconds: float) -> None:
        """A round has taken this, without a chunk."""
        self._rounds.append(seconds)
        self._num_along = 0

    def update_chunk(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of one prompt have been read at once."""
        if num_tokens:
            self._rates.append(seconds / num_tokens)
            self._last = num_tokens

    def update_along(self, num_tokens: int, seconds: float) -> float:
        """A round in whose forward so many tokens were read has taken this; returns what they have added."""
        added = max(seconds - median(self._rounds), 0.0)
        self.update_chunk(num_tokens, added)
        self._num_along += 1
        return added
