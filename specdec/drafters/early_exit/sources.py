"""An exit as a source of drafts: how its confidence relates to acceptance, and what its rounds yield."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import mean

from specdec.control import LEAF_EDGES, AcceptanceMemory, AcceptanceModel, Plan, RoundAverages
from specdec.drafters.auto.sources import RoundContext
from specdec.drafters.early_exit.heads import ExitHead
from specdec.drafters.early_exit.rule import reached_slots
from specdec.drafters.early_exit.shadows import Seen
from specdec.kernels.model.profile import profile_of
from trees import GainLimitedChain, GrowthPolicy, TreeBatch, leaf_confidence

_FIRST_SURPLUS = RoundAverages(tokens=0.2, steps=0.0, nodes=1.5)
"""What leaves bring, and how many there are, before anything is known."""
_SURPLUS_ROUNDS = 8, 40
"""Rounds that the first belief is worth, and that count after a long time."""


class _Surplus:
    """What rounds came to beyond what was expected of their chains: there are leaves, and chains stop where they are
    unsure. An average over the last rounds, of all runs."""

    def __init__(self) -> None:
        self._mean = _FIRST_SURPLUS
        self._num_rounds, self._most_rounds = _SURPLUS_ROUNDS

    def on(self, expected: RoundAverages) -> RoundAverages:
        """What is to be expected with it."""
        mean = self._mean
        return RoundAverages(
            tokens=max(expected.tokens + mean.tokens, 1.0),
            steps=max(expected.steps + mean.steps, 1.0),
            nodes=max(expected.nodes + mean.nodes, 1.0),
        )

    def update(self, actual: RoundAverages, expected: RoundAverages) -> None:
        self._num_rounds = min(self._num_rounds + 1, self._most_rounds)
        mean, share = self._mean, 1 / self._num_rounds
        self._mean = RoundAverages(
            tokens=mean.tokens + share * (actual.tokens - expected.tokens - mean.tokens),
            steps=mean.steps + share * (actual.steps - expected.steps - mean.steps),
            nodes=mean.nodes + share * (actual.nodes - expected.nodes - mean.nodes),
        )


@dataclass(eq=False)
class _Known:
    """What runs have shown of an exit; it outlives them."""

    acceptance: AcceptanceMemory = field(default_factory=AcceptanceMemory)
    surplus: _Surplus = field(default_factory=_Surplus)
    leaves: dict[bool, AcceptanceMemory] = field(default_factory=dict)
    """Acceptance of the leaves beside a chain, by whether they were drawn."""


class _KnownExits(dict[int, _Known]):
    """Of what exits draft with (`ExitHead.weights`), by their layer."""


class ExitSource:
    """An exit at work in a run, and what is known of it.

    Args:
        sample: whether tokens are drawn.
        is_watched: whether shadow tokens tell of it; else its own drafts alone do.

    Attributes:
        is_seen: whether anything may be said of it.
        is_up_to_date: it has drafted the round before; else it reads first what it has missed.
    """

    def __init__(self, head: ExitHead, *, sample: bool, is_watched: bool):
        known = profile_of(head.weights).part(_KnownExits).setdefault(head.layer, _Known())
        self.layer = head.layer
        self.acceptance = AcceptanceModel(known.acceptance)
        self.is_seen = not is_watched
        self.is_up_to_date = False
        self._leaves = AcceptanceModel(known.leaves.setdefault(sample, AcceptanceMemory(LEAF_EDGES)))
        self._surplus = known.surplus
        self._prices: Sequence[float] = ()
        self._has_begun = False
        self._sample = sample
        self._is_watched = is_watched
        self._coins = Random(0)

    @property
    def is_worth_a_trial(self) -> bool:
        """Whether only a draft shows what it is worth now."""
        return self._has_begun or not self._is_watched

    def plan(self, source: int, context: RoundContext, step_seconds: float, prices: Sequence[float]) -> Plan[int]:
        """What a round of it is expected to bring and to take.

        Args:
            prices: of the tokens of its chain (see `GainLimitedChain`).
        """
        self._prices = prices
        expected = self._surplus.on(likely_averages(self.acceptance.mean_chance, prices, context.num_rows))
        return Plan(
            source=source,
            length=len(prices) + 1,
            tokens=expected.tokens * context.num_rows,
            seconds=expected.steps * step_seconds + context.seconds(expected.nodes),
        )

    def policy(self, prices: Sequence[float], leaf_prices: Sequence[float]) -> GrowthPolicy:
        return GainLimitedChain(
            prices=prices,
            chance=self.acceptance.chance,
            next_chance=self.acceptance.mean_chance,
            leaf_prices=leaf_prices,
            leaf_chance=self._leaves.chance,
        )

    def learn(self, trees: TreeBatch, paths: Sequence[Sequence[int]], num_steps: int) -> None:
        """What became of its draft, which took so many forwards."""
        self._has_begun = True
        for probs, accepted in reached_slots(trees, paths):
            self.acceptance.update(probs[0], accepted == 0)
            for rank in range(1, len(probs)):
                confidence = leaf_confidence(probs[rank], probs[:rank], self._sample)
                self._leaves.update(confidence, accepted == rank)
        # by what is believed now: that the first beliefs were wrong is no surplus
        expected = likely_averages(self.acceptance.mean_chance, self._prices, len(paths))
        actual = RoundAverages(tokens=1 + mean(map(len, paths)), steps=num_steps, nodes=trees.width)
        self._surplus.update(actual, expected)

    def observe(self, seen: Seen) -> None:
        """How it agreed with the target without drafting. Of a chance a coin says whether it came true."""
        self.is_seen = True
        for confidence, agreement in zip(seen.confidences, seen.agreements, strict=True):
            self.acceptance.update(confidence, self._coins.random() < agreement)


def likely_averages(chance: float, prices: Sequence[float], num_rows: int) -> RoundAverages:
    """Of a chain that goes on while that is worth its price, if each of its tokens is accepted with this chance."""
    tokens, reach, num_steps = 1.0 + chance, chance, 1
    for price in prices:
        if num_rows * reach * chance < price:
            break
        reach *= chance
        tokens += reach
        num_steps += 1
    return RoundAverages(tokens=tokens, steps=num_steps, nodes=num_steps)
