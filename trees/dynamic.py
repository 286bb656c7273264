"""Trees that follow the draft's own probabilities (DySpec; Xiong et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from trees.growth import Grower, GrowthPolicy
from trees.layered import LayeredGrower

_SMALLEST_THRESHOLD = 1e-9


@dataclass(frozen=True)
class DySpec(GrowthPolicy):
    """The `budget` nodes of the greatest values: DySpec's fixed-budget tree (algorithm 1).

    The paper forwards the draft once a node. Here a whole layer is drafted at once, and a node is passed on to the
    next layer only while its children could still belong to the tree; what the budget does not cover in the end is
    dropped. A node's value is known before its token is drawn: this is the paper's tree, in as many forwards as it is
    deep.

    For greedy targets: the `budget` likeliest paths (no chance is involved, values may include the tokens' own
    probabilities).

    Args:
        budget: number of nodes of each row.
        max_depth: depth past which no node is drafted, that is, the most forwards of the draft a round.
        shared: let the rows of a batch pool their budgets and spend them where the values are highest.

    Raises:
        ValueError: a number is not a positive integer.
    """

    budget: int = 64
    max_depth: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "budget")
        if self.max_depth is not None:
            _check_positive(self, "max_depth")

    def start(
        self,
        *,
        max_depths: Sequence[int],
        sample: bool,
        generator: torch.Generator | None = None,
        previous: Grower | None = None,
    ) -> Grower:
        return _ValueGrower(
            budget=self.budget,
            threshold=0.0,
            shared=self.shared,
            max_depths=_capped(max_depths, self.max_depth),
            sample=sample,
            generator=generator,
        )


@dataclass(frozen=True)
class DySpecThreshold(GrowthPolicy):
    """All nodes of at least a certain value (algorithm 2), at most `max_nodes`; the threshold follows the text.

    A round that leaves budget unused lowers the threshold of the next one, a round that uses it up raises it towards
    the least value that was needed. Only earlier rounds steer it: a round is as exact as with a fixed threshold.

    Args:
        threshold: of the first round; the paper finds 1 / max_nodes typical.
        max_nodes: number of nodes of each row at most, and what the threshold aims at.
        max_depth: depth past which no node is drafted.

    Raises:
        ValueError: `threshold` is not between 0 and 1, or a number is not a positive integer.
    """

    threshold: float = 1 / 64
    max_nodes: int = 64
    max_depth: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not 0 < self.threshold < 1:
            raise ValueError(f"DySpecThreshold(threshold={self.threshold!r}): threshold lies between 0 and 1")
        _check_positive(self, "max_nodes")
        if self.max_depth is not None:
            _check_positive(self, "max_depth")

    def start(
        self,
        *,
        max_depths: Sequence[int],
        sample: bool,
        generator: torch.Generator | None = None,
        previous: Grower | None = None,
    ) -> Grower:
        threshold = previous.next_threshold if isinstance(previous, _ValueGrower) else self.threshold
        return _ValueGrower(
            budget=self.max_nodes,
            threshold=threshold,
            shared=False,
            max_depths=_capped(max_depths, self.max_depth),
            sample=sample,
            generator=generator,
        )


class _ValueGrower(LayeredGrower):
    """The nodes of the greatest values: at most `budget` of each row, and none below the threshold."""

    def __init__(
        self,
        *,
        budget: int,
        threshold: float,
        shared: bool,
        max_depths: Sequence[int],
        sample: bool,
        generator: torch.Generator | None,
    ):
        super().__init__(max_depths=max_depths, sample=sample, generator=generator)
        self._threshold = threshold
        self._total = budget * sum(depth > 0 for depth in max_depths)
        self._limit = self._total if shared else budget
        self._pools = np.zeros(len(max_depths), np.int64) if shared else np.arange(len(max_depths))

    def _wants(self, slots: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        pools = self._pools[np.concatenate([self._nodes["row"], slots["row"]])]
        best = _among_best(pools, np.concatenate([self._nodes["value"], values]), self._limit)
        return best[len(self._nodes) :] & (values >= self._threshold)

    def _opens(self, slots: np.ndarray) -> np.ndarray:
        if self._sample:
            return super()._opens(slots)  # the value of a first draw is known: it is the bound
        kept = self._nodes[self._kept()]
        pools = self._pools[kept["row"]]
        least_kept = np.full(len(self._pools), np.inf)
        np.minimum.at(least_kept, pools, kept["value"])
        least_kept[np.bincount(pools, minlength=len(self._pools)) < self._limit] = 0
        return (slots["bound"] > least_kept[self._pools[slots["row"]]]) & (slots["bound"] >= self._threshold)

    def _kept(self) -> np.ndarray:
        return _among_best(self._pools[self._nodes["row"]], self._nodes["value"], self._limit)

    @property
    def next_threshold(self) -> float:
        """Half way (in logarithms) from this round's threshold to the one that would have met the budget.

        The number of nodes above a threshold is taken to be inversely proportional to it.
        """
        values = self._nodes["value"][self._kept()]
        used_up = len(values) == self._total
        met = values.min() if used_up else self._threshold * max(1, len(values)) / self._total
        return max(_SMALLEST_THRESHOLD, sqrt(self._threshold * met))


def _among_best(pools: np.ndarray, values: np.ndarray, limit: int) -> np.ndarray:
    """bool: which values are among the `limit` greatest of their pool; earlier ones win ties."""
    if len(values) <= limit:
        return np.ones(len(values), bool)
    order = np.lexsort((-values, pools))
    sorted_pools = pools[order]
    best = np.empty(len(values), bool)
    best[order] = np.arange(len(values)) - np.searchsorted(sorted_pools, sorted_pools) < limit
    return best


def _capped(max_depths: Sequence[int], max_depth: int | None) -> Sequence[int]:
    return max_depths if max_depth is None else [min(depth, max_depth) for depth in max_depths]


def _check_positive(policy: GrowthPolicy, name: str) -> None:
    value = getattr(policy, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{type(policy).__name__}({name}={value!r}): {name} is a positive integer")
