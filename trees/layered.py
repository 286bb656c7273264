"""Growing trees of any shape: what static and dynamic policies share.

A layer is what one forward scores. Its slots then give children, one after the other; which ones, and which of them are
scored next, is the policy's choice, made of what was known before each was taken. The book-keeping is on the host, the
distributions stay on the device.

Shape legend: B rows, M tokens of a layer, T slots of a finished tree, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from trees.calibration import Calibration, share_of
from trees.draft import Draft, LayeredDistributions
from trees.policy import Grower, Layer, Round
from trees.token_source import TokenSource
from trees.tree import ROOT, TokenTree, TreeBatch
from trees.uploads import upload


@dataclass(slots=True, eq=False)
class Node:
    """A token of a growing tree (the root has none), and the slot after it, which takes children.

    The *value* of a child-to-be is what DySpec (section 4) takes for the chance that the verifier will test it: the
    probability of its parent's path times the mass that its earlier siblings have left. Where no chance is involved
    the next token is known, and its value is the probability of its path. A calibration puts measured chances of
    acceptance in the place of probabilities; then the value is the chance that the child-to-be is accepted.

    Args:
        value: what was known of the node before its token was taken.
        reach: product of the probabilities on the path, this token's included.
        left: mass that no child has taken.
        refused: chance that all children so far are refused, if any is tested; without a calibration it is `left`.
        taken: tokens of the children.
        bound: no next child has a greater value.
        grown_index: see `Draft.grown_indices`.
        source: where the children come from; None until the slot is scored.
        layer, column: where the slot's scores are.
        ahead: tokens taken from the source and not yet asked for, with their probabilities, the next one last.
        num_fetches: from the source.
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
    refused: float = 1.0
    taken: set[int] = field(default_factory=set)
    grown_index: int = ROOT
    source: TokenSource | None = None
    layer: int = 0
    column: int = 0
    ahead: list[tuple[int, float]] = field(default_factory=list)
    num_fetches: int = 0


class FinishedTree(NamedTuple):
    """A row's tree; for each node its grown index, and the layer and column of the scores after it."""

    tree: TokenTree
    grown_indices: Sequence[int]
    layers: ArrayLike
    columns: ArrayLike


def batch_size(batch: int, num_slots: int) -> int:
    """How many tokens of each slot to take at once; there are more batches only where all of them were wanted."""
    return max(4 << min(batch, 4), 16 // num_slots)


class LayeredGrower(Grower):
    """Grows every tree layer by layer."""

    def __init__(self, round_: Round, calibration: Calibration | None = None):
        self._round = replace(round_, previous=None)  # or the scores of all rounds would be kept
        self._calibration = calibration if round_.sample else None
        self._nodes: list[Node] = []
        self._frontier = [
            Node(row=row, parent=None, token=ROOT, prob=1.0, value=1.0, reach=1.0, depth=0, bound=1.0)
            for row, depth in enumerate(round_.max_depths)
            if depth > 0
        ]
        self._layers: list[Tensor] = []
        self._num_grown = 0
        self._padding_tokens = [0] * len(round_.max_depths)

    @property
    def needs_scores(self) -> bool:
        return bool(self._frontier)

    @abstractmethod
    def _extend(self, slots: list[Node]) -> list[Node]:
        """Take children of slots, now that these are scored too; returns the nodes to score next."""

    def _kept(self) -> Iterable[Node]:
        """The nodes that belong to the finished trees, siblings in draw order."""
        return self._nodes

    def grow(self, scores_BMV: Tensor) -> Layer:
        is_first = not self._layers
        source = self._round.token_source(
            scores_BMV.flatten(0, 1), sample=self._round.sample, generator=self._round.generator
        )
        for slot in self._frontier:
            slot.source, slot.layer = source, len(self._layers)
        self._device, self._width = scores_BMV.device, scores_BMV.shape[1]
        self._layers.append(scores_BMV)
        self._frontier = self._extend(self._frontier)
        if is_first:
            self._padding_tokens = self._find_padding_tokens(scores_BMV)
        return self._next_layer()

    def finish(self) -> Draft:
        rows = self._finished()
        trees = TreeBatch.stack([row.tree for row in rows], self._device)
        grown_indices = [row.grown_indices for row in rows]
        if not self._round.sample:
            return Draft(trees=trees, grown_indices=grown_indices)
        layer_BT, column_BT = np.zeros((2, trees.num_rows, trees.num_slots), np.int64)
        for number, row in enumerate(rows):
            layer_BT[number, 1 : len(row.tree) + 1] = row.layers
            column_BT[number, 1 : len(row.tree) + 1] = row.columns
        q_layers = LayeredDistributions(layers_BMV=self._layers, layer_BT=layer_BT, column_BT=column_BT)
        return Draft(trees=trees, q_layers=q_layers, grown_indices=grown_indices)

    def _finished(self) -> Sequence[FinishedTree]:
        """The tree of every row."""
        rows: list[list[Node]] = [[] for _ in self._round.max_depths]
        for node in self._kept():
            rows[node.row].append(node)
        return [_finished_tree(_depth_first(nodes)) for nodes in rows]

    def _fetch(self, slots: Sequence[Node]) -> None:
        """Have tokens ready for slots of one layer."""
        if not slots:
            return
        count = batch_size(slots[0].num_fetches, len(slots))
        width, source = self._layers[slots[0].layer].shape[1], slots[0].source
        assert source is not None, "slots give children once they are scored"
        for slot, tokens, probs in zip(
            slots, *source.take([slot.row * width + slot.column for slot in slots], count), strict=True
        ):
            slot.num_fetches += 1
            slot.ahead = list(zip(tokens[::-1], probs[::-1], strict=True))

    def _peek(self, slot: Node) -> float:
        """The probability of a slot's next child; 0 if there is none. Takes its token from the source."""
        while True:
            while slot.ahead:
                token, prob = slot.ahead[-1]
                if not prob or token not in slot.taken:
                    return prob
                slot.ahead.pop()
            self._fetch([slot])

    def _next_value(self, slot: Node) -> float:
        """Of the next child: before its token is known, if it is drawn."""
        if not self._round.sample:
            return min(slot.bound, slot.reach * self._peek(slot))
        if self._calibration is None:
            return min(slot.bound, slot.reach * slot.left)
        return min(slot.bound, slot.reach * slot.refused * self._calibration.of_next(len(slot.taken)))

    def _take(self, slot: Node) -> Node | None:
        """A slot's next child; None if there is none."""
        value = self._next_value(slot)
        if not self._peek(slot):
            return None
        token, prob = slot.ahead.pop()
        if self._calibration is None:
            reach = slot.reach * prob
        else:
            chance = self._calibration.of_drawn(len(slot.taken), share_of(prob, slot.left))
            reach = slot.reach * slot.refused * chance
            slot.refused *= 1 - chance
        node = Node(slot.row, slot, token, prob, value, reach, slot.depth + 1, min(value, reach))
        self._nodes.append(node)
        slot.bound = value
        slot.left = max(slot.left - prob, 0.0)
        slot.taken.add(token)
        return node

    def _may_have_children(self, node: Node) -> bool:
        return node.depth < self._round.max_depths[node.row]

    def _next_layer(self) -> Layer:
        """Give the frontier its grown indices and hand it out."""
        rows: list[list[Node]] = [[] for _ in self._padding_tokens]
        for node in self._frontier:
            rows[node.row].append(node)
        width = max(map(len, rows))
        tokens, parents = [], []
        for nodes, padding_token in zip(rows, self._padding_tokens, strict=True):
            padding = width - len(nodes)
            tokens.append([*(node.token for node in nodes), *[padding_token] * padding])
            parents.append([*(node.parent.grown_index if node.parent else ROOT for node in nodes), *[ROOT] * padding])
            for column, node in enumerate(nodes):
                node.column, node.grown_index = column, self._num_grown + column
        self._num_grown += width
        tokens_BM = upload(tokens, self._device)
        return Layer(tokens_BM=tokens_BM, parents_BM=np.array(parents, np.int64))

    def _find_padding_tokens(self, scores_BMV: Tensor) -> list[int]:
        """For each row a child of its root, to fill layers in which it has fewer nodes than others."""
        tokens = [0] * len(self._padding_tokens)
        idle = [row for row, depth in enumerate(self._round.max_depths) if depth <= 0]
        if idle:
            for row, token in zip(idle, scores_BMV[idle, 0].argmax(-1).tolist(), strict=True):
                tokens[row] = token
        for node in reversed(self._nodes):
            if node.depth == 1:
                tokens[node.row] = node.token
        return tokens


class ChildByChildGrower(LayeredGrower):
    """Asks about each child in turn: all that a policy of one's own has to say."""

    @abstractmethod
    def wants(self, slot: Node, value: float) -> bool:
        """Whether a slot's next child is wanted, from its value and what the slot has already (`slot.taken`)."""

    def _extend(self, slots: list[Node]) -> list[Node]:
        self._fetch(slots)
        new = []
        for slot in slots:
            while self.wants(slot, self._next_value(slot)):
                child = self._take(slot)
                if child is None:
                    break
                new.append(child)
        return [node for node in new if self._may_have_children(node) and self.wants(node, node.bound)]


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


def _finished_tree(nodes: Sequence[Node]) -> FinishedTree:
    numbers = {id(node): number for number, node in enumerate(nodes)}
    tree = TokenTree(
        tokens=[node.token for node in nodes],
        parents=[numbers.get(id(node.parent), ROOT) for node in nodes],
        probs=[node.prob for node in nodes],
        values=[node.value for node in nodes],
    )
    columns = ([getattr(node, name) for node in nodes] for name in ("grown_index", "layer", "column"))
    return FinishedTree(tree, *columns)
