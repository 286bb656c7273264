"""How likely a drafted token is to be accepted, from how sure its drafter was of it.

Steers what is drafted and when to stop, never what is accepted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from operator import le, mul
from threading import Lock

CHAIN_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
LEAF_EDGES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Between the bins of confidence, which are finer where it matters: for tokens of a chain, and for leaves beside it."""

_PRIOR_TOKENS = 4.0
"""Tokens that the first belief is worth in each bin."""
_MEMORY_TOKENS = 4.0
"""Tokens that what earlier runs have shown is worth in a new one. Prompts differ more than rounds do."""
_MEMORY_LIMIT = 2000.0
"""Tokens of a bin after which earlier ones fade."""
_RUN_DECAY = 0.98
"""What a token of this run still counts for after another of its bin."""
_counting = Lock()
"""Runs of several threads share what they have learned."""


class AcceptanceMemory:
    """What all runs of a drafter have shown: tokens seen and accepted, by confidence.

    Args:
        edges: between the bins of confidence, rising.
        prior_acceptance: the least chance of a token, as a first belief. Else the confidence itself is that.
    """

    def __init__(self, edges: Sequence[float] = CHAIN_EDGES, prior_acceptance: float = 0.0) -> None:
        self.edges = edges
        centres = [sum(pair) / 2 for pair in pairwise((0.0, *edges, 1.0))]
        self._beliefs = [prior_acceptance + (1 - prior_acceptance) * centre for centre in centres]
        self.seen = [0.0 for _ in centres]
        self.accepted = [0.0 for _ in centres]

    @property
    def chances(self) -> list[float]:
        """For each bin, not falling."""
        with _counting:
            counts = list(zip(self.seen, self.accepted, self._beliefs, strict=True))
        seen = [count + _PRIOR_TOKENS for count, _, _ in counts]
        accepted = [count + _PRIOR_TOKENS * belief for _, count, belief in counts]
        return monotone([a / s for a, s in zip(accepted, seen, strict=True)], seen)

    def update(self, bin_: int, accepted: bool) -> None:
        with _counting:
            if self.seen[bin_] >= _MEMORY_LIMIT:
                self.seen[bin_] *= 0.5
                self.accepted[bin_] *= 0.5
            self.seen[bin_] += 1
            self.accepted[bin_] += accepted


class AcceptanceModel:
    """The calibrated map from confidence to acceptance, for one run.

    Starts from what earlier runs have shown, and moves to what this one shows: bin by bin, and all bins together by
    how much more or less than expected has been accepted so far.
    """

    def __init__(self, memory: AcceptanceMemory):
        self._memory = memory
        self._believed = memory.chances
        self._seen = [0.0 for _ in self._believed]
        self._accepted = [0.0 for _ in self._believed]
        self._chances: list[float] | None = None

    def chance(self, confidence: float) -> float:
        """That a token is accepted if the one before it is."""
        return self._current()[bisect_right(self._memory.edges, confidence)]

    def reaches(self, confidences: Sequence[float], least: float = 0.0) -> list[float]:
        """Of each token of a chain, up to the first with less than `least`: the chance that it and all before it are
        accepted."""
        if not confidences:
            return []
        chances, edges, reach, found = self._current(), self._memory.edges, 1.0, []
        for confidence in confidences:
            reach *= chances[bisect_right(edges, confidence)]
            found.append(reach)
            if reach < least:
                break
        return found

    @property
    def num_accepted(self) -> float:
        """Tokens that this run has accepted; earlier ones count for less."""
        return sum(self._accepted)

    @property
    def mean_chance(self) -> float:
        """Of a token whose confidence is not known yet."""
        weights = [1.0 + memory + run for memory, run in zip(self._memory.seen, self._seen, strict=True)]
        return sum(map(mul, self._current(), weights)) / sum(weights)

    def update(self, confidence: float, accepted: bool) -> None:
        """A token was tested by the target."""
        bin_ = bisect_right(self._memory.edges, confidence)
        self._memory.update(bin_, accepted)
        self._seen[bin_] = self._seen[bin_] * _RUN_DECAY + 1
        self._accepted[bin_] = self._accepted[bin_] * _RUN_DECAY + accepted
        self._chances = None

    def update_chain(self, confidences: Sequence[float], num_accepted: int) -> None:
        """A chain was tested: those after the first refused token were not."""
        for index, confidence in enumerate(confidences[: num_accepted + 1]):
            self.update(confidence, index < num_accepted)

    def _current(self) -> list[float]:
        if self._chances is None:
            self._chances = self._estimate()
        return self._chances

    def _estimate(self) -> list[float]:
        expected = sum(map(mul, self._seen, self._believed))
        trend = (sum(self._accepted) + _MEMORY_TOKENS) / (expected + _MEMORY_TOKENS)
        if trend < 1:
            likely = [believed * trend for believed in self._believed]
        else:
            likely = [1 - (1 - believed) / trend for believed in self._believed]
        weights = [seen + _MEMORY_TOKENS for seen in self._seen]
        columns = zip(self._accepted, likely, weights, strict=True)
        return monotone([(accepted + _MEMORY_TOKENS * own) / weight for accepted, own, weight in columns], weights)


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest non-falling sequence, by weighted squares (pool adjacent violators)."""
    if all(map(le, values, values[1:])):
        return list(values)
    means: list[float] = []  # three lists, not one of blocks: a batch asks for each of its rows in every round
    masses: list[float] = []
    sizes: list[int] = []
    for mean, mass in zip(values, weights, strict=True):
        size = 1
        while means and means[-1] > mean:
            other = masses.pop()
            mean = (means.pop() * other + mean * mass) / (other + mass)
            mass += other
            size += sizes.pop()
        means.append(mean)
        masses.append(mass)
        sizes.append(size)
    return [mean for mean, size in zip(means, sizes, strict=True) for _ in range(size)]
