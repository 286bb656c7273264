"""Combs: chains of likeliest tokens, and beside each the next likely ones as leaves.

A small exit is often wrong about the likeliest token and right about the first few. To verify one node more costs the
target little, while another draft step costs the exit its whole self: so only the likeliest token is drafted from. No
chance is involved, so any such tree is lossless.

Shape legend: B rows, K likeliest tokens, S columns of an exit's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.control.exits import ExitChoice
from specdec.drafters.base import Outcome
from trees import ROOT, Draft, Layer, Leaf, TreeBatch, comb, comb_places

MAX_SIBLINGS = 3
"""Of a node of the chain. One of the shipped exit's first four tokens is right in 80 % of cases, the first in 57 %."""


_DECAY = 0.97


class Comb(NamedTuple):
    """A draft whose rows begin with a chain. lengths: of the chain of each row; its leaves come after it."""

    draft: Draft
    lengths: Sequence[int]

    def along(self, row: int, path: Sequence[int]) -> list[int]:
        """The part of an accepted path that lies on the row's chain."""
        return [node for node in path if node < self.lengths[row]]


class SiblingStatistics:
    """What leaves bring and how many there are, decayed.

    Attributes:
        rescue: share of chains, of those that were refused somewhere, whose place a leaf took.
        number: leaves for each token of a chain.
    """

    rescue, number = 0.25, 1.5  # what is believed before anything is known

    def __init__(self) -> None:
        self._rescued, self._refused = 4 * self.rescue, 4.0
        self._leaves, self._tokens = 4 * self.number, 4.0

    def observe(self, comb: Comb, outcome: Outcome) -> None:
        """Learn from a round."""
        rescued = refused = leaves = tokens = 0
        for row, (path, length) in enumerate(zip(outcome.paths, comb.lengths, strict=True)):
            num_along = len(comb.along(row, path))
            refused += num_along < length
            rescued += len(path) > num_along
            leaves += comb.draft.trees.sizes[row] - length
            tokens += length
        self._rescued, self._refused = _DECAY * self._rescued + rescued, _DECAY * self._refused + refused
        self._leaves, self._tokens = _DECAY * self._leaves + leaves, _DECAY * self._tokens + tokens
        self.rescue, self.number = self._rescued / max(self._refused, 1e-9), self._leaves / max(self._tokens, 1e-9)


NO_SIBLINGS = SiblingStatistics()
NO_SIBLINGS.rescue = NO_SIBLINGS.number = 0.0


@dataclass(slots=True)
class _Row:
    """limit: most tokens of the chain. reach: product of the exit's probabilities along it."""

    limit: int
    chain: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    reach: float = 1.0
    is_open: bool = True

    def add(self, tokens: Sequence[int], probs: Sequence[float], choice: ExitChoice) -> None:
        """Take the likeliest token, as the chain's next, and those beside it that are likely enough."""
        slot = len(self.chain)
        beside = zip(tokens[1:], probs[1:], strict=True)
        self.leaves += [Leaf(token, prob, slot) for token, prob in beside if self.reach * prob >= choice.sibling]
        self.chain.append(tokens[0])
        self.probs.append(probs[0])
        self.reach *= probs[0]
        self.is_open = len(self.chain) < self.limit and probs[0] >= choice.threshold


class CombGrower:
    """Grows the combs of one round.

    Args:
        choice: its length and thresholds.
        max_depths: see `DraftSession.propose`; one is positive.
    """

    def __init__(self, choice: ExitChoice, max_depths: Sequence[int]):
        self._choice = choice
        self._rows = [_Row(limit=min(choice.length, depth)) for depth in max_depths]
        for row in self._rows:
            row.is_open = row.limit > 0
        self._newest_B1: Tensor
        self._length = 0

    @property
    def is_open(self) -> bool:
        """Whether scores after the newest tokens of the chains are wanted."""
        return any(row.is_open for row in self._rows)

    @property
    def newest(self) -> Layer:
        """What the exit has to pass next, the chains' newest tokens; rows that have ended go along."""
        parents_B1 = np.full(self._newest_B1.shape, self._length - 1 + ROOT)
        return Layer(tokens_BM=self._newest_B1, parents_BM=parents_B1)

    def grow(self, tokens_BK: Tensor, probs_BK: Tensor) -> None:
        """Add the likeliest tokens, best first, after the newest ones."""
        self._newest_B1 = tokens_BK[:, :1]
        self._length += 1
        for row, tokens, probs in zip(self._rows, tokens_BK.tolist(), probs_BK.tolist(), strict=True):
            if row.is_open:
                row.add(tokens, probs, self._choice)

    def finish(self, device: torch.device) -> Comb:
        combs = [comb(row.chain, row.probs, row.leaves) for row in self._rows]
        draft = Draft(trees=TreeBatch.stack(combs, device), places=comb_places(combs))
        return Comb(draft, [len(row.chain) for row in self._rows])
