"""How a draft model's tree grows: one layer of nodes for each forward of the draft model.

    grower = policy.start(...)
    while grower.hungry:
        layer = grower.grow(scores of the newest layer)      # the root is the first layer
    draft = grower.finish()

A policy is frozen configuration; a grower is one round's state. While a *sampled* tree is grown, only values
known before a token is drawn may decide whether it is drawn (design rule: anything else is biased).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trees.tree import TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What a drafter proposes for a round.

    Args:
        trees: one tree a row.
        q_BTV: float32. Row t holds the distribution, after the user's processors, from which slot t's children
            were drawn in node order without replacement; rows of leaves are not read. None says that the trees
            are deterministic (no chance was involved): then the target alone decides.
        places: for each row the place of every node among the tokens of the layers that `Grower.grow` returned,
            -1 for a node that was in none. None says that node i was the i-th.
    """

    trees: TreeBatch
    q_BTV: Tensor | None = None
    places: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Nodes to be forwarded by the draft model, because the grower wants to know what follows them.

    The tokens of all layers of a round are numbered in order: their *places*. A row that has fewer nodes in a
    layer than another repeats one of its own.

    Args:
        tokens_BM: int64 token ids.
        parents_BM: int64 places of their parents, `ROOT` for children of the root.
    """

    tokens_BM: Tensor
    parents_BM: Tensor


class Grower(ABC):
    """One round's tree, layer by layer."""

    @property
    @abstractmethod
    def hungry(self) -> bool:
        """Whether scores of the newest layer are wanted; False once the trees are complete."""

    @abstractmethod
    def grow(self, scores_BMV: Tensor) -> Layer:
        """Take the processed draft scores of the newest layer (M tokens a row) and return the next layer.

        The layer is not meaningful once the grower is no longer hungry.

        Args:
            scores_BMV: float32 (or float64, which the trees' q then has too).
        """

    @abstractmethod
    def finish(self) -> Draft:
        """The finished trees and the distributions that they were drawn from."""


class GrowthPolicy(ABC):
    """Decides the shape of the trees."""

    @abstractmethod
    def start(
        self,
        *,
        max_depths: Sequence[int],
        sample: bool,
        generator: torch.Generator | None = None,
        previous: Grower | None = None,
    ) -> Grower:
        """Begin a round.

        Args:
            max_depths: for each row the depth past which nothing can be committed any more; one is positive.
            sample: draw tokens from the draft distribution; False takes the likeliest ones.
            generator: source of randomness, None for torch's global one.
            previous: the finished grower of the run's round before, for policies that learn from round to round.
                It may have grown for more rows.
        """
