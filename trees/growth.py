"""How a draft model's tree grows: one layer of nodes for each forward of the draft model.

    grower = policy.start(round_)
    while grower.hungry:
        layer = grower.grow(scores of the newest layer)      # the root is the first layer
    draft = grower.finish()

A policy is frozen configuration; a grower is one round's state. While a *sampled* tree is grown, only values
known before a token is drawn may decide whether it is drawn (design rule: anything else is biased).

Shape legend: B rows, M tokens of a layer, T slots, V vocabulary, N some
of the slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from trees.tree import TreeBatch
from trees.urn import TokenSource, TorchSource

LEFT_OUT = -2
"""In a merged draft stands for a node of a source that there was no room for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What a drafter proposes for a round.

    Args:
        trees: one tree a row.
        q_BTV: float32. Row t holds the distribution, after the user's processors, from which slot t's children
            were drawn in node order without replacement; rows of leaves are not read. Without distributions the trees
            are deterministic (no chance was involved): then the target alone decides.
        q_layers: the same without a copy of every distribution, for drafts that were grown.
        places: for each row the place of every node among the tokens of the layers that `Grower.grow` returned,
            -1 for a node that was in none. None says that node i was the i-th.
        parts: the drafts that were merged into this one (see `trees.merge`), in the order in which they are tested;
            they have the distributions then.
    """

    trees: TreeBatch
    q_BTV: Tensor | None = None
    q_layers: LayeredDistributions | None = None
    places: Sequence[Sequence[int]] | None = None
    parts: Sequence[Part] | None = None

    @property
    def is_drawn(self) -> bool:
        if self.parts is not None:
            return any(part.draft.is_drawn for part in self.parts)
        return self.q_BTV is not None or self.q_layers is not None

    def q_at(self, depth: int, rows_N: Tensor, slots_N: Tensor) -> Tensor:
        """Copies of the distributions of some slots, [N, V]; not meaningful for leaves and slots of other depths."""
        if self.q_layers is not None:
            return self.q_layers.at(depth, rows_N, slots_N)
        assert self.q_BTV is not None, "a deterministic draft has no distributions, a merged one has several"
        return self.q_BTV[rows_N, slots_N]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One source of a merged draft.

    Args:
        draft: as its source made it.
        nodes: for each row the merged node of every node, or `LEFT_OUT`. What is left out of a drawn tree are later
            siblings and whole subtrees.
    """

    draft: Draft
    nodes: Sequence[Sequence[int]]

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return not any(LEFT_OUT in row for row in self.nodes)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayeredDistributions:
    """The distributions of a draft, as the scores that its layers were grown from.

    Args:
        layers_BMV: one tensor for each layer.
        layer_BT: int64 on the host, the layer that has a slot's scores; any for a leaf.
        column_BT: int64 on the host, where they stand in it.
        norm_BT: float64 on the host, the logarithm of the sum of their e^x; any for a leaf. None if nobody knows it.
    """

    layers_BMV: Sequence[Tensor]
    layer_BT: np.ndarray
    column_BT: np.ndarray
    norm_BT: np.ndarray | None = None

    def at(self, depth: int, rows_N: Tensor, slots_N: Tensor) -> Tensor:
        """See `Draft.q_at`."""
        device = self.layers_BMV[0].device
        if device.type == "cpu":
            rows, slots = rows_N.numpy(), slots_N.numpy()
            places = np.stack([self.layer_BT[rows, slots], rows, self.column_BT[rows, slots]], 1).tolist()
            return torch.stack([self.layers_BMV[layer][row, column] for layer, row, column in places]).softmax(-1)
        return self._joined_BPV[rows_N, self._places_BT[rows_N, slots_N]].softmax(-1)

    @cached_property
    def _joined_BPV(self) -> Tensor:
        """All layers side by side, where the host must not be asked which one is wanted."""
        return torch.cat(list(self.layers_BMV), 1)

    @cached_property
    def _places_BT(self) -> Tensor:
        starts = np.cumsum([0, *(layer.shape[1] for layer in self.layers_BMV)])
        return torch.from_numpy(starts[self.layer_BT] + self.column_BT).to(self.layers_BMV[0].device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Nodes to be forwarded by the draft model, because the grower wants to know what follows them.

    The tokens of all layers of a round are numbered in order: their *places*. A row that has fewer nodes in a
    layer than another repeats one of its own.

    Args:
        tokens_BM: int64 token ids.
        parents_BM: int64, places of their parents, `ROOT` for children of the root.
        depths_BM, seen_BMT: see `GrowingTrees`; None leaves it to that to work them out.
    """

    tokens_BM: Tensor
    parents_BM: np.ndarray
    depths_BM: np.ndarray | None = None
    seen_BMT: np.ndarray | None = None


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


_Grower = TypeVar("_Grower", bound=Grower)


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """What is known when a round begins.

    Args:
        max_depths: for each row the depth past which nothing can be committed any more; one is positive.
        sample: draw tokens from the draft distribution; False takes the likeliest ones.
        generator: source of randomness, None for torch's global one.
        previous: the finished grower of the run's round before, for policies that learn from round to round.
            It may have grown for more rows.
        open_urn: makes a layer's `TokenSource` of its scores [M, V]; called with `sample` and `generator`.
        stand_ins: growers that are to be taken for those of this package, and do the same.
    """

    max_depths: Sequence[int]
    sample: bool
    generator: torch.Generator | None = None
    previous: Grower | None = None
    open_urn: Callable[..., TokenSource] = TorchSource
    stand_ins: Mapping[type[Grower], type[Grower]] = field(default_factory=dict)

    def grower(self, kind: type[_Grower]) -> type[_Grower]:
        """A kind of grower, or what stands in for it."""
        return cast(type[_Grower], self.stand_ins.get(kind, kind))


class GrowthPolicy(ABC):
    """Decides the shape of the trees."""

    @abstractmethod
    def start(self, round_: Round) -> Grower:
        """Begin a round."""
