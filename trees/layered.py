"""Growing trees of any shape: what static and dynamic policies share.

Children of a layer's slots are taken in batches, and the policy says which of them it wants, from what was known before
each was taken. The book-keeping is on the host (numpy), the distributions stay on the device.

Shape legend: B rows, M tokens of a layer, N slots that take children, K children in a batch, L of these that are
tokens, V vocabulary, T slots of a finished tree, F = B * T, S some of these.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from trees.growth import Draft, Grower, Layer
from trees.tree import ROOT, TokenTree, TreeBatch
from trees.urn import Urn

_NODE = np.dtype(
    [
        ("row", np.int64),
        ("parent", np.int64),  # index among all nodes of all rows, or ROOT
        ("rank", np.int64),  # number of earlier siblings
        ("depth", np.int64),
        ("token", np.int64),
        ("prob", np.float64),  # q of the token after its parent
        ("value", np.float64),  # what was known of the node before its token was taken
        ("reach", np.float64),  # product of the probabilities on the path, this token's included
        ("place", np.int64),  # see Draft.places
    ]
)

_SLOT = np.dtype(
    [
        ("node", np.int64),  # index among all nodes of all rows, or ROOT
        ("row", np.int64),
        ("index", np.int64),  # in the layer, all rows flattened
        ("depth", np.int64),
        ("reach", np.float64),
        ("bound", np.float64),  # no next child has a greater value
    ]
)


def batch_size(batch: int) -> int:
    """How many tokens of a slot to take at once; there are more batches only where all of them were wanted."""
    return 8 << min(batch, 3)


class LayeredGrower(Grower):
    """Grows every tree layer by layer.

    The *value* of a child-to-be is what DySpec (section 4) takes for the chance that the verifier will test it: the
    probability of its parent's path times the mass that its earlier siblings have left. Where no chance is involved
    the next token is known, and its value is the probability of its path.
    """

    def __init__(self, *, max_depths: Sequence[int], sample: bool, generator: torch.Generator | None):
        self._max_depths = np.array(max_depths)
        self._sample = sample
        self._generator = generator
        self._nodes = np.empty(0, _NODE)
        self._frontier = self._roots()
        self._scored: list[tuple[np.ndarray, Tensor]] = []
        self._num_places = 0
        self._spares_B = np.zeros(len(max_depths), np.int64)

    @property
    def hungry(self) -> bool:
        return len(self._frontier) > 0

    @abstractmethod
    def _wants(self, slots: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """bool: which of these children are wanted, given the slot, value and rank of each.

        The children of a slot come in order. If one is not wanted, none after it may be.
        """

    def _opens(self, slots: np.ndarray) -> np.ndarray:
        """bool: which of these slots without children may come to have wanted ones."""
        return self._wants(slots, slots["bound"], np.zeros(len(slots), np.int64))

    @abstractmethod
    def _kept(self) -> np.ndarray:
        """bool: which nodes belong to the finished trees."""

    def grow(self, scores_BMV: Tensor) -> Layer:
        q_BMV = scores_BMV.softmax(-1)
        num_nodes = len(self._nodes)
        self._draw(Urn(q_BMV.flatten(0, 1), sample=self._sample, generator=self._generator))
        self._scored.append((self._frontier, q_BMV))
        if not num_nodes:
            self._spares_B = self._spare_tokens(scores_BMV)
        self._frontier = self._slots_of(np.arange(num_nodes, len(self._nodes)))
        return self._next_layer(scores_BMV.device)

    def finish(self) -> Draft:
        kept = self._kept()
        nodes = [np.flatnonzero(kept & (self._nodes["row"] == row)) for row in range(len(self._max_depths))]
        trees = TreeBatch.stack([self._tree(indices) for indices in nodes], self._scored[0][1].device)
        places = [self._nodes["place"][indices].tolist() for indices in nodes]
        return Draft(trees=trees, q_BTV=self._gather_q(trees, nodes) if self._sample else None, places=places)

    def _roots(self) -> np.ndarray:
        rows = np.flatnonzero(self._max_depths > 0)
        slots = np.zeros(len(rows), _SLOT)
        slots["row"] = slots["index"] = rows
        slots["node"], slots["reach"], slots["bound"] = ROOT, 1, 1
        return slots

    def _draw(self, urn: Urn) -> None:
        """Take children of the frontier for as long as they are wanted."""
        slots, rank_N = self._frontier, np.zeros(len(self._frontier), np.int64)
        for batch in count():
            promise_N = urn.promise_M.cpu().double().numpy()[slots["index"]]
            wanted_N = self._wants(slots, np.minimum(slots["reach"] * promise_N, slots["bound"]), rank_N)
            wanted_N &= promise_N > 0
            slots, rank_N, promise_N = slots[wanted_N], rank_N[wanted_N], promise_N[wanted_N]
            if len(slots):
                indices = torch.from_numpy(slots["index"].copy()).to(urn.device)
                tokens_NK, probs_NK = (x.cpu().numpy() for x in urn.take(indices, batch_size(batch)))
                slots, rank_N = self._offer(slots, rank_N, promise_N, tokens_NK, probs_NK.astype(np.float64))
            if not len(slots):
                return urn.refill()

    def _offer(
        self, slots: np.ndarray, rank_N: np.ndarray, promise_N: np.ndarray, tokens_NK: np.ndarray, probs_NK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the tokens that are wanted; returns the slots of which all were, and the rank of their next child.

        Whether a token is wanted depends on those before it only: the others might as well not have been drawn.
        """
        before_NK = promise_N[:, None] - probs_NK.cumsum(1) + probs_NK if self._sample else probs_NK
        values_NK = np.minimum(slots["reach"][:, None] * before_NK, slots["bound"][:, None])
        values_NK = np.minimum.accumulate(values_NK, 1)
        ranks_NK = rank_N[:, None] + (probs_NK > 0).cumsum(1) - 1
        slot_L, place_L = np.nonzero(probs_NK)
        values_L, ranks_L = values_NK[slot_L, place_L], ranks_NK[slot_L, place_L]
        wanted_L = self._wants(slots[slot_L], values_L, ranks_L)
        new = np.empty(len(slot_L), _NODE)
        parents = slots[slot_L]
        new["row"], new["parent"], new["depth"] = parents["row"], parents["node"], parents["depth"] + 1
        new["token"], new["prob"] = tokens_NK[slot_L, place_L], probs_NK[slot_L, place_L]
        new["value"], new["rank"], new["place"] = values_L, ranks_L, -1
        new["reach"] = parents["reach"] * new["prob"]
        self._nodes = _joined(self._nodes, new[wanted_L])
        slots["bound"] = values_NK[:, -1]
        sated_N = np.bincount(slot_L, ~wanted_L, len(slots)) > 0
        return slots[~sated_N], ranks_NK[~sated_N, -1] + 1

    def _slots_of(self, indices: np.ndarray) -> np.ndarray:
        """Slots of the nodes that may have children worth a forward of the draft model."""
        nodes = self._nodes[indices]
        slots = np.zeros(len(nodes), _SLOT)
        slots["node"] = indices
        for name in ("row", "depth", "reach"):
            slots[name] = nodes[name]
        slots["bound"] = np.minimum(nodes["value"], nodes["reach"])
        slots = slots[nodes["depth"] < self._max_depths[nodes["row"]]]
        return slots[self._opens(slots)]

    def _next_layer(self, device: torch.device) -> Layer:
        """Give the frontier its places and hand it out."""
        slots, num_rows = self._frontier[np.argsort(self._frontier["row"], kind="stable")], len(self._max_depths)
        sizes = np.bincount(slots["row"], minlength=num_rows)
        width = int(sizes.max())
        offsets = np.arange(len(slots)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        slots["index"] = slots["row"] * width + offsets
        nodes = self._nodes[slots["node"]]
        tokens_BM, parents_BM = np.repeat(self._spares_B[:, None], width, 1), np.full((num_rows, width), ROOT)
        tokens_BM[slots["row"], offsets] = nodes["token"]
        parents_BM[slots["row"], offsets] = np.append(self._nodes["place"], ROOT)[nodes["parent"]]
        self._nodes["place"][slots["node"]] = self._num_places + offsets
        self._num_places += width
        self._frontier = slots
        return Layer(
            tokens_BM=torch.from_numpy(tokens_BM).to(device), parents_BM=torch.from_numpy(parents_BM).to(device)
        )

    def _spare_tokens(self, scores_BMV: Tensor) -> np.ndarray:
        """For each row a child of its root, to fill layers in which it has fewer nodes than others."""
        spares_B = self._spares_B.copy()
        idle = np.flatnonzero(self._max_depths <= 0)
        if len(idle):
            spares_B[idle] = scores_BMV[idle, 0].argmax(-1).cpu().numpy()
        first = self._nodes[self._nodes["rank"] == 0]
        spares_B[first["row"]] = first["token"]
        return spares_B

    def _tree(self, indices: np.ndarray) -> TokenTree:
        """The tree of these nodes, numbered anew."""
        nodes = self._nodes[indices]
        numbers = np.full(len(self._nodes) + 1, ROOT)
        numbers[indices] = np.arange(len(indices))
        return TokenTree(
            tokens=nodes["token"].tolist(),
            parents=numbers[nodes["parent"]].tolist(),
            probs=nodes["prob"].tolist(),
            values=nodes["value"].tolist(),
        )

    def _gather_q(self, trees: TreeBatch, nodes: Sequence[np.ndarray]) -> Tensor:
        """q of every slot that has children."""
        slot_of = np.full(len(self._nodes) + 1, -1)
        for row, indices in enumerate(nodes):
            slot_of[indices] = row * trees.num_slots + 1 + np.arange(len(indices))
        root_q_BMV = self._scored[0][1]
        q_FV = root_q_BMV.new_empty((trees.num_rows * trees.num_slots, root_q_BMV.shape[2]))  # leaves stay unwritten
        for slots, q_BMV in self._scored:
            targets = np.where(slots["node"] == ROOT, slots["row"] * trees.num_slots, slot_of[slots["node"]])
            kept = targets >= 0
            target_S, source_S = (torch.from_numpy(x[kept].copy()).to(q_FV.device) for x in (targets, slots["index"]))
            q_FV.index_copy_(0, target_S, q_BMV.flatten(0, 1).index_select(0, source_S))
        return q_FV.view(trees.num_rows, trees.num_slots, -1)


def _joined(nodes: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`np.concatenate`, which is slow on structured arrays."""
    joined = np.empty(len(nodes) + len(new), nodes.dtype)
    joined[: len(nodes)], joined[len(nodes) :] = nodes, new
    return joined
