"""Chains with leaves that grow while the next token is worth its time.

Shape legend: B rows, M tokens of a layer, T slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import prod
from operator import itemgetter

import numpy as np
from torch import Tensor

from trees.draft import Draft, LayeredDistributions
from trees.policy import Grower, GrowthPolicy, Layer, Round
from trees.side_leaves import Leaf, chain_grown_indices, chain_with_leaves
from trees.token_source import TokenSource
from trees.tree import ROOT, TreeBatch
from trees.uploads import upload

MAX_LEAVES = 3
"""Of a slot."""
_LEAST = 0.01
"""Chance below which a leaf is not taken where it costs nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GainLimitedChain(GrowthPolicy):
    """A chain that stops when the next token is not expected to bring what it costs, then leaves beside it likewise.

    The next token of the chain is drafted if the chance that it will be accepted, summed over the rows of the batch, is
    at least its price. Then the rows get leaves, each its best, for as long as the chances of these together come to
    what a wider verification costs; rows that are shorter than the longest fill up for nothing. What a chance is taken
    from is known before the token is drawn, so sampled trees stay exact: it is the non-anticipating rule "take the next
    one if (A + r v) / T(n + 1) > A / T(n)", with what the time would bring elsewhere for A / T(n). With prices of 0 and
    no leaves this is `Chain`.

    Args:
        prices: of the second token, the third, ...: the tokens that the run makes otherwise in the time that drafting
            and verifying it takes. The chain has at most one token more than there are prices.
        chance: of acceptance, from what the draft says of it (`Round.confidence`), or a token's draft probability.
        next_chance: of acceptance of a token that is not drawn yet.
        leaf_prices: of the first node, the second, ...: the same for the time that verifying it takes. There are at
            most as many nodes as prices, but for the chain's.
        shares_budget: `leaf_prices` are of the nodes of all rows together, chains included, and `prices` of drafting
            alone: the nodes are chosen when all have been grown, the likeliest of all rows first, so that a row may get
            none. For trees that are not drawn.
        leaf_chance: that the target, where it comes to the slot, goes on with this leaf. From the leaf's draft
            probability for greedy targets; for sampled ones from the probability that its elder siblings leave.
    """

    prices: Sequence[float]
    chance: Callable[[float], float]
    next_chance: float
    leaf_prices: Sequence[float] = ()
    leaf_chance: Callable[[float], float] = float
    shares_budget: bool = False

    def start(self, round_: Round) -> Grower:
        return _GainLimitedGrower(round_, self)

    def goes_on(self, probs: Sequence[Sequence[float]]) -> bool:
        """Whether the next token of chains is worth its price.

        Args:
            probs: draft probabilities of their tokens so far, chain by chain.
        """
        longest = max(map(len, probs))
        reaches = (prod(map(self.chance, own)) for own in probs)
        return longest <= len(self.prices) and sum(reaches) * self.next_chance >= self.prices[longest - 1]


def leaf_confidence(prob: float, elder_probs: Sequence[float], sample: bool) -> float:
    """What a leaf's chance is taken from.

    Args:
        prob: its own draft probability; not read where tokens are sampled.
        elder_probs: of the siblings before it.
    """
    return max(1.0 - sum(elder_probs), 0.0) if sample else prob


@dataclass(slots=True)
class _Row:
    """A row's tree in the making.

    Args:
        limit: most tokens of the chain.
        reaches: for each slot of the chain, the chance that the target comes to it.
        probs: for each slot of the chain, those of its children; of the first what the draft says of it, where it says
            something (`Round.confidence`).
        offers: leaves to be had, the best first: negative chance, when it was offered, slot, token and probability
            (None: not drawn yet).
    """

    limit: int
    tokens: list[int] = field(default_factory=list)
    reaches: list[float] = field(default_factory=lambda: [1.0])
    probs: list[list[float]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    offers: list[tuple[float, int, int, tuple[int, float] | None]] = field(default_factory=list)
    num_offers: int = 0

    @property
    def size(self) -> int:
        return len(self.tokens) + len(self.leaves)

    @property
    def best_chance(self) -> float:
        return -self.offers[0][0] if self.offers else 0.0

    def offer(self, chance: float, slot: int, leaf: tuple[int, float] | None) -> None:
        heappush(self.offers, (-self.reaches[slot] * chance, self.num_offers, slot, leaf))
        self.num_offers += 1


class _GainLimitedGrower(Grower):
    def __init__(self, round_: Round, policy: GainLimitedChain):
        assert not (policy.shares_budget and round_.sample), "what was drawn is verified"
        self._policy = policy
        self._round = round_
        self._rows = [_Row(min(len(policy.prices) + 1, depth)) for depth in round_.max_depths]
        self._sources: list[TokenSource] = []
        self._layers_BMV: list[Tensor] = []

    @property
    def needs_scores(self) -> bool:
        return len(self._sources) < max(row.limit for row in self._rows)

    def grow(self, scores_BMV: Tensor) -> Layer:
        policy, sample, slot = self._policy, self._round.sample, len(self._sources)
        source = self._round.token_source(scores_BMV[:, 0], sample=sample, generator=self._round.generator)
        self._sources.append(source)
        self._layers_BMV.append(scores_BMV)
        found = source.take(range(len(self._rows)), 1 if sample else 1 + MAX_LEAVES)
        said_B1 = self._round.confidence()
        sure = [probs[0] for probs in found[1]] if said_B1 is None else said_B1[:, 0].tolist()
        for row, tokens, probs, confidence in zip(self._rows, *found, sure, strict=True):
            if slot < row.limit:
                row.tokens.append(tokens[0])
                row.probs.append([confidence])
                row.reaches.append(row.reaches[-1] * policy.chance(confidence))
                self._offer(row, slot, zip(tokens[1:], probs[1:], strict=True))
        if self.needs_scores and self._going_on() < policy.prices[slot]:
            for row in self._rows:
                row.limit = min(row.limit, slot + 1)
        newest_B1 = upload([tokens[:1] for tokens in found[0]], scores_BMV.device)
        return Layer(tokens_BM=newest_B1, parents_BM=np.full(newest_B1.shape, slot + ROOT))

    def finish(self) -> Draft:
        num_scored = None
        if self._policy.shares_budget:
            self._choose_nodes()
            num_scored = len(self._layers_BMV) - 1
        else:
            self._add_leaves()
        rows = [chain_with_leaves(row.tokens, [probs[0] for probs in row.probs], row.leaves) for row in self._rows]
        trees = TreeBatch.stack(rows, self._layers_BMV[0].device)
        return Draft(
            trees=trees,
            q_layers=self._distributions(trees.num_slots),
            grown_indices=chain_grown_indices(rows, num_scored),
        )

    def _going_on(self) -> float:
        """The chance that the next token of the chain is accepted, of all rows; where they share a budget, less what it
        takes to verify those tokens that are worth it."""
        slot, policy = len(self._sources), self._policy
        chances = [row.reaches[slot] * policy.next_chance for row in self._rows if row.limit > slot]
        if not policy.shares_budget:
            return sum(chances)
        prices = policy.leaf_prices[sum(len(row.tokens) for row in self._rows) :]
        pairs = zip(sorted(chances, reverse=True), prices, strict=False)
        return sum(max(chance - price, 0.0) for chance, price in pairs)

    def _offer(self, row: _Row, slot: int, others: Iterable[tuple[int, float]] = ()) -> None:
        """What may hang on a slot beside its newest child: `others` if they are known, or the next draw."""
        if not self._policy.leaf_prices:
            return
        elders = row.probs[slot]
        if not self._round.sample:
            for token, prob in others:
                row.offer(self._policy.leaf_chance(leaf_confidence(prob, elders, sample=False)), slot, (token, prob))
        elif len(elders) <= MAX_LEAVES:
            row.offer(self._policy.leaf_chance(leaf_confidence(0.0, elders, sample=True)), slot, None)

    def _add_leaves(self) -> None:
        """Every row takes its best leaves: up to the width that there is, and further while that is worth its price."""
        prices = self._policy.leaf_prices
        width = max(row.size for row in self._rows)
        while True:
            for number, row in enumerate(self._rows):
                while row.size < width and row.best_chance >= _LEAST:
                    self._take_leaf(number, row)
            chances = [row.best_chance for row in self._rows if row.best_chance >= _LEAST]
            if not chances or width >= len(prices) or sum(chances) < prices[width]:
                return
            width += 1

    def _choose_nodes(self) -> None:
        """Of all rows' chains and leaves those that are worth their prices, the likeliest first."""
        nodes: list[tuple[float, int, int, Leaf | None]] = [
            (-row.reaches[place + 1], place, number, None)
            for number, row in enumerate(self._rows)
            for place in range(len(row.tokens))
        ]
        nodes += [
            (negative_chance, slot + len(row.tokens), number, Leaf(*leaf, slot))
            for number, row in enumerate(self._rows)
            for negative_chance, _, slot, leaf in row.offers
            if leaf is not None and leaf[1] > 0
        ]
        nodes.sort(key=itemgetter(0, 1, 2))  # along a chain chances fall, and a leaf's are less than its slot's
        lengths = [0] * len(self._rows)
        for price, (negative_chance, _, number, leaf) in zip(self._policy.leaf_prices, nodes, strict=False):
            if -negative_chance < max(price, _LEAST):
                break
            if leaf is None:
                lengths[number] += 1
            else:
                self._rows[number].leaves.append(leaf)
        for row, length in zip(self._rows, lengths, strict=True):
            del row.tokens[length:], row.probs[length:]
            row.leaves = [leaf for leaf in row.leaves if leaf.slot <= length]

    def _take_leaf(self, number: int, row: _Row) -> None:
        _, _, slot, leaf = heappop(row.offers)
        if leaf is None:
            tokens, probs = self._sources[slot].take([number], 1)
            token, prob = tokens[0][0], probs[0][0]
        else:
            token, prob = leaf
        if prob > 0:
            row.leaves.append(Leaf(token, prob, slot))
            row.probs[slot].append(prob)
            self._offer(row, slot)

    def _distributions(self, num_slots: int) -> LayeredDistributions | None:
        if not self._round.sample:
            return None
        layer_T = np.minimum(np.arange(num_slots), len(self._layers_BMV) - 1)
        layer_BT = np.tile(layer_T, (len(self._rows), 1))
        return LayeredDistributions(layers_BMV=self._layers_BMV, layer_BT=layer_BT, column_BT=np.zeros_like(layer_BT))
