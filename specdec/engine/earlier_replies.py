"""Replies that requests of a kind have had, for the drafts of the next one."""

from __future__ import annotations

from collections import OrderedDict

from specdec.decoding.earlier import EarlierTexts
from specdec.engine.request import Generation

_MOST_KINDS = 64
"""The one that was not asked for for the longest time is forgotten first."""


class EarlierReplies:
    """The latest replies of the latest kinds."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, EarlierTexts] = OrderedDict()

    def of(self, kind: str) -> EarlierTexts:
        """Those of a kind, to which others will be added."""
        texts = self._kinds.setdefault(kind, EarlierTexts())
        self._kinds.move_to_end(kind)
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        return texts

    def add(self, generation: Generation) -> None:
        """A reply that has ended, if its request names a kind."""
        if generation.request.kind and generation.error is None:
            self.of(generation.request.kind).add(generation.tokens)
