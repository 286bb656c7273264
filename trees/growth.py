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

from trees.tree import ROOT, TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What a drafter proposes for a round.

    Args:
        trees: one tree a row.
        q_BTV: float32. Row t holds the distribution, after the user's processors, from which slot t's children
            were drawn in node order without replacement; rows of leaves are not read. None says that the trees
            are deterministic (no chance was involved): then the target alone decides.
    """

    trees: TreeBatch
    q_BTV: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """The newest nodes of every row, to be forwarded by the draft model.

    Args:
        tokens_BM: int64 token ids.
        parents_BM: int64 node indices of their parents, `ROOT` for children of the root.
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
        """Take the processed draft scores of the newest layer (M slots a row) and return the next layer."""

    @abstractmethod
    def finish(self) -> Draft:
        """The finished trees and the distributions that they were drawn from."""


class GrowthPolicy(ABC):
    """Decides the shape of the trees."""

    @abstractmethod
    def start(self, *, max_depths: Sequence[int], sample: bool, generator: torch.Generator | None = None) -> Grower:
        """Begin a round.

        Args:
            max_depths: for each row the depth past which nothing can be committed any more.
            sample: draw tokens from the draft distribution; False takes the likeliest ones.
            generator: source of randomness, None for torch's global one.
        """


@dataclass(frozen=True)
class Chain(GrowthPolicy):
    """A chain of `length` tokens (speculative sampling; Leviathan et al. 2023, Chen et al. 2023).

    Raises:
        ValueError: `length` is not a positive integer.
    """

    length: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"Chain(length={self.length!r}): length is a positive integer")

    def start(self, *, max_depths: Sequence[int], sample: bool, generator: torch.Generator | None = None) -> Grower:
        sizes = tuple(min(self.length, depth) for depth in max_depths)
        return _ChainGrower(sizes, sample, generator)


class _ChainGrower(Grower):
    def __init__(self, sizes: tuple[int, ...], sample: bool, generator: torch.Generator | None):
        self._sizes = sizes
        self._sample = sample
        self._generator = generator
        self._tokens: list[Tensor] = []
        self._q: list[Tensor] = []

    @property
    def hungry(self) -> bool:
        return len(self._tokens) < max(self._sizes)

    def grow(self, scores_BMV: Tensor) -> Layer:
        scores_BV = scores_BMV[:, 0]
        if self._sample:
            q_BV = scores_BV.float().softmax(-1)
            self._q.append(q_BV)
            token_B1 = torch.multinomial(q_BV, 1, generator=self._generator)
        else:
            token_B1 = scores_BV.argmax(-1, keepdim=True)
        parent = ROOT + len(self._tokens)
        self._tokens.append(token_B1)
        return Layer(tokens_BM=token_B1, parents_BM=torch.full_like(token_B1, parent))

    def finish(self) -> Draft:
        trees = TreeBatch.chains(torch.cat(self._tokens, 1), self._sizes)
        if not self._sample:
            return Draft(trees=trees)
        unread = torch.zeros_like(self._q[0])
        return Draft(trees=trees, q_BTV=torch.stack([*self._q, unread], 1))
