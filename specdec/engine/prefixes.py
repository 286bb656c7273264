"""Keys and values of prompts that have been read: what two texts begin with is computed once.

Texts are kept in blocks, each known by the block before it and its own tokens, so that shared beginnings are stored
once (the idea of vLLM's prefix cache). The block that was not used for the longest time goes first; a block is always
used together with all that come before it, so none is left behind without its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from specdec.tree_model.cache import RowStates
from specdec.tree_model.pages import PAGE, one_after_another

BLOCK = PAGE
"""Tokens of a block; what is shared is a multiple of it."""

_Key = tuple[int, tuple[int, ...]]
_NO_BLOCK = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    number: int
    states: RowStates


class PrefixCache:
    """States of texts' beginnings, least recently used first out.

    Args:
        max_tokens: most tokens that are kept.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._numbers = count(_NO_BLOCK + 1)

    @property
    def num_tokens(self) -> int:
        return BLOCK * len(self._blocks)

    def match(self, tokens: Sequence[int]) -> tuple[int, RowStates | None]:
        """How many of the first tokens are known, and their states."""
        known = list(self._known(tokens))
        self._touch([key for key, _ in known])
        if not known:
            return 0, None
        return BLOCK * len(known), one_after_another([block.states for _, block in known])

    def add(self, tokens: Sequence[int], states: RowStates) -> None:
        """Keep what is new of a text. Of a model with recurrent states nothing is: they have no beginning.

        Args:
            tokens: of a text from its beginning, without padding.
            states: of all of them; pages are kept, all else is copied.
        """
        if states.recurrent:
            return
        known = list(self._known(tokens))
        used = [key for key, _ in known]
        number = known[-1][1].number if known else _NO_BLOCK
        most = min(len(tokens), self.max_tokens) // BLOCK
        for start in range(BLOCK * len(known), BLOCK * most, BLOCK):
            stop = start + BLOCK
            block = _Block(next(self._numbers), states.part(start, stop))
            key = number, tuple(tokens[start:stop])
            self._blocks[key] = block
            used.append(key)
            number = block.number
        self._touch(used)
        self.shrink(self.max_tokens)

    def drop_oldest(self) -> None:
        """Forget the block that was not used for the longest time."""
        self._blocks.popitem(last=False)

    def shrink(self, num_tokens: int) -> None:
        """Forget what was not used for the longest time, until no more than this is left."""
        while self._blocks and self.num_tokens > num_tokens:
            self.drop_oldest()

    def _known(self, tokens: Sequence[int]) -> Iterator[tuple[_Key, _Block]]:
        number = _NO_BLOCK
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = number, tuple(tokens[start : start + BLOCK])
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            number = block.number

    def _touch(self, keys: Sequence[_Key]) -> None:
        """These blocks of one text have been used; its beginning counts as used last."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
