"""Which characters of a text were drafted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.engine import RoundReport


class Origins:
    """Follows a text and the rounds that its tokens came from."""

    def __init__(self) -> None:
        self._newest: RoundReport | None = None
        self._fresh: list[RoundReport] = []
        self._num_rounds = 0
        self._place = 0
        """Of the next token, in its round."""
        self._begun: deque[tuple[int, bool]] = deque()
        """Where tokens start that have characters to tell, and whether they were drafted."""
        self._num_told = 0

    def add(self, start: int, rounds: Sequence[RoundReport]) -> None:
        """A token more, whose text starts at a character; the rounds of all tokens so far."""
        if self._newest is None or self._place == self._newest.num_tokens:
            self._newest, self._place = rounds[self._num_rounds], 0
            self._num_rounds += 1
            self._fresh.append(self._newest)
        self._begun.append((start, self._place < len(self._newest.path)))
        self._place += 1

    def rounds(self) -> list[RoundReport]:
        """Those that tokens have been added from since this was asked last."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def runs(self, num_characters: int) -> list[int]:
        """Lengths of what of the next characters was, by turns, the model's own and drafted; own ones come first."""
        runs, is_drafted = [0], False
        end = self._num_told + num_characters
        while self._num_told < end:
            while len(self._begun) > 1 and self._begun[1][0] <= self._num_told:
                self._begun.popleft()
            upto = min(end, self._begun[1][0]) if len(self._begun) > 1 else end
            if self._begun and self._begun[0][1] != is_drafted:
                is_drafted = not is_drafted
                runs.append(0)
            runs[-1] += upto - self._num_told
            self._num_told = upto
        return runs
