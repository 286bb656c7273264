"""What a drafter proposes: trees, and the distributions that they were drawn from.

Shape legend: B rows, M tokens of a layer, P tokens of all layers, T slots, V vocabulary, N some of the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trees.tree import TreeBatch
from trees.uploads import upload

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
        grown_indices: for each row the index of every node among the tokens of the layers that `Grower.grow` returned,
            -1 for a node that was in none. None says that node i was the i-th.
        parts: the drafts that were merged into this one (see `trees.merge`), in the order in which they are tested;
            they have the distributions then.
    """

    trees: TreeBatch
    q_BTV: Tensor | None = None
    q_layers: LayeredDistributions | None = None
    grown_indices: Sequence[Sequence[int]] | None = None
    parts: Sequence[Part] | None = None

    @property
    def is_drawn(self) -> bool:
        if self.parts is not None:
            return any(part.draft.is_drawn for part in self.parts)
        return self.q_BTV is not None or self.q_layers is not None

    def grown(self, row: int, path: Sequence[int], num_forwarded: int) -> list[int]:
        """Grown indices of a path's nodes that are among the first so many: nobody has forwarded the others."""
        indices = path if self.grown_indices is None else [self.grown_indices[row][node] for node in path]
        return [index for index in indices if 0 <= index < num_forwarded]

    def in_vocabulary(self, ids_V: Tensor, vocab_size: int) -> Draft:
        """The same draft over all of a vocabulary: it was grown from scores of some tokens, the others have no chance.

        Args:
            ids_V: int64, the tokens that the scores were of.
        """
        trees, q_BTV, q_layers = self.trees.with_tokens(ids_V), self.q_BTV, self.q_layers
        if q_BTV is not None:
            q_BTV = widened(q_BTV, ids_V, vocab_size, 0.0)
        if q_layers is not None:
            layers_BMV = [widened(scores_BMV, ids_V, vocab_size, -torch.inf) for scores_BMV in q_layers.layers_BMV]
            q_layers = replace(q_layers, layers_BMV=layers_BMV)
        return replace(self, trees=trees, q_BTV=q_BTV, q_layers=q_layers)

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
    """

    layers_BMV: Sequence[Tensor]
    layer_BT: np.ndarray
    column_BT: np.ndarray

    def at(self, depth: int, rows_N: Tensor, slots_N: Tensor) -> Tensor:
        """See `Draft.q_at`."""
        device = self.layers_BMV[0].device
        if device.type == "cpu":
            rows, slots = rows_N.numpy(), slots_N.numpy()
            cells = np.stack([self.layer_BT[rows, slots], rows, self.column_BT[rows, slots]], 1).tolist()
            return torch.stack([self.layers_BMV[layer][row, column] for layer, row, column in cells]).softmax(-1)
        return self._joined_BPV[rows_N, self._places_BT[rows_N, slots_N]].softmax(-1)

    @cached_property
    def _joined_BPV(self) -> Tensor:
        """All layers side by side, where the host must not be asked which one is wanted."""
        return torch.cat(list(self.layers_BMV), 1)

    @cached_property
    def _places_BT(self) -> Tensor:
        starts = np.cumsum([0, *(layer.shape[1] for layer in self.layers_BMV)])
        return upload(starts[self.layer_BT] + self.column_BT, self.layers_BMV[0].device)


def widened(narrow_BTV: Tensor, ids_V: Tensor, vocab_size: int, rest: float) -> Tensor:
    """Numbers of some of a vocabulary's tokens, int64 `ids_V`, among those of all; the others' are `rest`."""
    wide = narrow_BTV.new_full((*narrow_BTV.shape[:-1], vocab_size), rest)
    return wide.index_copy_(-1, ids_V.to(wide.device), narrow_BTV)
