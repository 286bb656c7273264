"""How a draft model's tree grows: one layer of nodes for each forward of the draft model.

    grower = policy.start(round_)
    while grower.needs_scores:
        layer = grower.grow(scores of the newest layer)      # the root is the first layer
    draft = grower.finish()

A policy is frozen configuration; a grower is one round's state. While a *sampled* tree is grown, only values
known before a token is drawn may decide whether it is drawn (design rule: anything else is biased).

Shape legend: B rows, M tokens of a layer, T slots, V vocabulary, N some
of the slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trees.draft import Draft
from trees.token_source import TokenSource, TorchSource


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Nodes to be forwarded by the draft model, because the grower wants to know what follows them.

    The tokens of all layers of a round are numbered in order: their *grown indices*. A row that has fewer nodes in a
    layer than another repeats one of its own.

    Args:
        tokens_BM: int64 token ids.
        parents_BM: int64, grown indices of their parents, `ROOT` for children of the root.
    """

    tokens_BM: Tensor
    parents_BM: np.ndarray


class Grower(ABC):
    """One round's tree, layer by layer."""

    @property
    @abstractmethod
    def needs_scores(self) -> bool:
        """Whether scores of the newest layer are wanted; False once the trees are complete."""

    @abstractmethod
    def grow(self, scores_BMV: Tensor) -> Layer:
        """Take the processed draft scores of the newest layer (M tokens a row) and return the next layer.

        The layer is not meaningful once no scores are needed any more.

        Args:
            scores_BMV: float32 (or float64, which the trees' q then has too).
        """

    @abstractmethod
    def finish(self) -> Draft:
        """The finished trees and the distributions that they were drawn from."""


def _says_nothing() -> None:
    """The confidence of drafts that say none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """What is known when a round begins.

    Args:
        max_depths: for each row the depth past which nothing can be committed any more; one is positive.
        sample: draw tokens from the draft distribution; False takes the likeliest ones.
        generator: source of randomness, None for torch's global one.
        previous: the finished grower of the run's round before, for policies that learn from round to round.
            It may have grown for more rows.
        token_source: makes a layer's `TokenSource` of its scores [M, V]; called with `sample` and `generator`.
        confidence: what the draft says of the newest layer besides its scores: for every slot the chance that the token
            after it is accepted, float [B, M]; None: nothing, and what takes a chance takes it from the token.
    """

    max_depths: Sequence[int]
    sample: bool
    generator: torch.Generator | None = None
    previous: Grower | None = None
    token_source: Callable[..., TokenSource] = TorchSource
    confidence: Callable[[], Tensor | None] = _says_nothing


class GrowthPolicy(ABC):
    """Decides the shape of the trees."""

    @property
    def most_nodes(self) -> int | None:
        """That a row's tree may have, however deep it is; None if nothing but the depth bounds them."""
        return None

    @abstractmethod
    def start(self, round_: Round) -> Grower:
        """Begin a round."""
