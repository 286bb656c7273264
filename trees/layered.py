"""Growing trees of any shape: what static and dynamic policies share.

Children of a layer's slots are taken in batches, and the policy says which of them it wants, from what was known before
each was taken. The book-keeping is on the host, the distributions stay on the device.

Shape legend: B rows, M tokens of a layer, N slots that take children, K children in a batch, T slots of a finished
tree, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from trees.growth import Draft, Grower, Layer, LayeredDistributions, Round
from trees.tree import ROOT, TokenTree, TreeBatch
from trees.urn import Urn


@dataclass(slots=True, eq=False)
class Node:
    """A token of a growing tree (the root has none), and the slot after it, which takes children.

    The *value* of a child-to-be is what DySpec (section 4) takes for the chance that the verifier will test it: the
    probability of its parent's path times the mass that its earlier siblings have left. Where no chance is involved
    the next token is known, and its value is the probability of its path.

    Args:
        value: what was known of the node before its token was taken.
        reach: product of the probabilities on the path, this token's included.
        left: mass that no child has taken.
        taken: tokens of the children.
        bound: no next child has a greater value.
        column: where its layer holds the slot's scores.
        place: see `Draft.places`.
    """

    row: int
    parent: Node | None
    token: int
    prob: float
    value: float
    reach: float
    depth: int
    bound: float
    left: float = 1.0
    taken: set[int] = field(default_factory=set)
    column: int = 0
    place: int = ROOT


def batch_size(batch: int, num_slots: int) -> int:
    """How many tokens of each slot to take at once; there are more batches only where all of them were wanted."""
    return max(4 << min(batch, 4), 64 // num_slots)


class LayeredGrower(Grower):
    """Grows every tree layer by layer."""

    def __init__(self, round_: Round):
        self._round = round_
        self._nodes: list[Node] = []
        self._frontier = [
            Node(row=row, parent=None, token=ROOT, prob=1.0, value=1.0, reach=1.0, depth=0, bound=1.0)
            for row, depth in enumerate(round_.max_depths)
            if depth > 0
        ]
        self._q_layers: list[Tensor] = []
        self._num_places = 0
        self._spares = [0] * len(round_.max_depths)

    @property
    def hungry(self) -> bool:
        return bool(self._frontier)

    @abstractmethod
    def _wants(self, slot: Node, value: float) -> bool:
        """Whether the next child of a slot is wanted, given its value; if not, none after it may be."""

    def _added(self, node: Node) -> None:
        """A child that was wanted has its token now."""

    def _kept(self) -> Iterable[Node]:
        """The nodes that belong to the finished trees."""
        return self._nodes

    def grow(self, scores_BMV: Tensor) -> Layer:
        num_nodes = len(self._nodes)
        q_BMV = scores_BMV.softmax(-1)
        if self._round.sample:
            self._q_layers.append(q_BMV)
        self._draw(
            Urn(q_BMV.flatten(0, 1), sample=self._round.sample, generator=self._round.generator), scores_BMV.shape[1]
        )
        new = self._nodes[num_nodes:]
        if not num_nodes:
            self._spares = self._spare_tokens(scores_BMV)
        self._frontier = [
            node for node in new if node.depth < self._round.max_depths[node.row] and self._wants(node, node.bound)
        ]
        self._device = scores_BMV.device
        return self._next_layer()

    def finish(self) -> Draft:
        rows: list[list[Node]] = [[] for _ in self._round.max_depths]
        for node in self._kept():
            rows[node.row].append(node)
        rows = [_depth_first(nodes) for nodes in rows]
        trees = TreeBatch.stack([_tree(nodes) for nodes in rows], self._device)
        places = [[node.place for node in nodes] for nodes in rows]
        if not self._round.sample:
            return Draft(trees=trees, places=places)
        columns = [[0, *(node.column for node in nodes), *[0] * (trees.width - len(nodes))] for nodes in rows]
        q_layers = LayeredDistributions(
            layers_BMV=self._q_layers, columns_BT=torch.tensor(columns, device=self._device)
        )
        return Draft(trees=trees, q_layers=q_layers, places=places)

    def _draw(self, urn: Urn, width: int) -> None:
        """Take children of the frontier for as long as they are wanted."""
        slots = self._frontier
        for batch in count():
            if not slots:
                return urn.refill()
            indices = torch.tensor([slot.row * width + slot.column for slot in slots])
            tokens_NK, probs_NK = (x.tolist() for x in urn.take(indices.to(urn.device), batch_size(batch, len(slots))))
            slots = [slot for slot, *taken in zip(slots, tokens_NK, probs_NK, strict=True) if self._offer(slot, *taken)]

    def _offer(self, slot: Node, tokens: Sequence[int], probs: Sequence[float]) -> bool:
        """Add the tokens that are wanted; returns whether the slot may take more.

        Whether a token is wanted depends on those before it only: the others might as well not have been drawn.
        """
        for token, prob in zip(tokens, probs, strict=True):
            if not prob:
                return False  # there are no more
            if token in slot.taken:
                continue
            value = min(slot.bound, slot.reach * (slot.left if self._round.sample else prob))
            if not self._wants(slot, value):
                return False
            self._add(slot, token, prob, value)
        return self._wants(slot, min(slot.bound, slot.reach * slot.left))

    def _add(self, slot: Node, token: int, prob: float, value: float) -> None:
        reach = slot.reach * prob
        node = Node(
            row=slot.row,
            parent=slot,
            token=token,
            prob=prob,
            value=value,
            reach=reach,
            depth=slot.depth + 1,
            bound=min(value, reach),
        )
        self._nodes.append(node)
        self._added(node)
        slot.bound = value
        slot.left = max(slot.left - prob, 0.0)
        slot.taken.add(token)

    def _next_layer(self) -> Layer:
        """Give the frontier its places and hand it out."""
        rows: list[list[Node]] = [[] for _ in self._spares]
        for node in self._frontier:
            rows[node.row].append(node)
        width = max(map(len, rows))
        tokens, parents = [], []
        for nodes, spare in zip(rows, self._spares, strict=True):
            padding = width - len(nodes)
            tokens.append([*(node.token for node in nodes), *[spare] * padding])
            parents.append([*(node.parent.place if node.parent else ROOT for node in nodes), *[ROOT] * padding])
            for column, node in enumerate(nodes):
                node.column, node.place = column, self._num_places + column
        self._num_places += width
        return Layer(
            tokens_BM=torch.tensor(tokens, dtype=torch.long, device=self._device),
            parents_BM=torch.tensor(parents, dtype=torch.long, device=self._device),
        )

    def _spare_tokens(self, scores_BMV: Tensor) -> list[int]:
        """For each row a child of its root, to fill layers in which it has fewer nodes than others."""
        spares = [0] * len(self._spares)
        idle = [row for row, depth in enumerate(self._round.max_depths) if depth <= 0]
        if idle:
            for row, token in zip(idle, scores_BMV[idle, 0].argmax(-1).tolist(), strict=True):
                spares[row] = token
        for node in reversed(self._nodes):
            spares[node.row] = node.token
        return spares


def _depth_first(nodes: Sequence[Node]) -> list[Node]:
    """First children first: the likeliest paths stand where the caches need not move them."""
    children: dict[int, list[Node]] = defaultdict(list)
    for node in reversed(nodes):
        children[id(node.parent)].append(node)
    ordered, stack = [], [node for node in reversed(nodes) if node.depth == 1]
    while stack:
        node = stack.pop()
        ordered.append(node)
        stack += children[id(node)]
    return ordered


def _tree(nodes: Sequence[Node]) -> TokenTree:
    numbers = {id(node): number for number, node in enumerate(nodes)}
    return TokenTree(
        tokens=[node.token for node in nodes],
        parents=[numbers.get(id(node.parent), ROOT) for node in nodes],
        probs=[node.prob for node in nodes],
        values=[node.value for node in nodes],
    )
