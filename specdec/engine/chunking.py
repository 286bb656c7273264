"""How much of the waiting prompts is read between two rounds: as much as costs little more than a round.

Rows that decode wait for the chunk, and the prompt waits for their rounds. Where a round takes r seconds and a chunk c,
their tokens come (r + c) / r times as far apart, and the prompt takes (r + c) / c times as long as alone: neither can
be had for nothing. What a token costs depends on model, machine, context and company, so both are measured, not set.
"""

from __future__ import annotations

from collections import deque
from statistics import median

LEAST = 16
"""Tokens of a chunk, at least: below, a forward costs as much as one of fewer, and the prompt never gets done."""
_TILE = 8
"""Rows that pass over the weights together: chunks are a multiple of it."""
_SHARE = 1.5
"""Seconds of a chunk, in rounds: tokens come 2.5 times as far apart, a prompt takes 1.7 times as long as alone."""
_ROUNDS = 9
"""Whose median says what a round takes."""
_CHUNKS = 3
"""Whose median says what a token takes: few, for it grows with what has been read."""


class ChunkSizer:
    """Sizes chunks by what rounds and chunks before have taken.

    Args:
        most: tokens of a chunk.
    """

    def __init__(self, most: int):
        self._most = most
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self._rates: deque[float] = deque(maxlen=_CHUNKS)

    def size(self, *, is_decoding: bool) -> int:
        """Tokens to read next.

        Args:
            is_decoding: whether anyone waits for a round.
        """
        if not is_decoding:
            return self._most
        least = min(LEAST, self._most)
        if not self._rounds or not self._rates:
            return least
        num_affordable = int(_SHARE * median(self._rounds) / max(median(self._rates), 1e-9))
        return max(least, min(self._most, num_affordable // _TILE * _TILE))

    def note_round(self, seconds: float) -> None:
        """A round has taken this, without the chunk before it."""
        self._rounds.append(seconds)

    def note_chunk(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of one prompt have been read at once."""
        if num_tokens:
            self._rates.append(seconds / num_tokens)
