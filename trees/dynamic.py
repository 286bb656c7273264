"""Trees that follow the draft's own probabilities (DySpec; Xiong et al. 2024)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from math import sqrt

from trees.growth import Grower, GrowthPolicy, Round
from trees.layered import LayeredGrower, Node

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

    def start(self, round_: Round) -> Grower:
        round_ = _capped(round_, self.max_depth)
        return _ValueGrower(round_, budget=self.budget, threshold=0.0, shared=self.shared)


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

    def start(self, round_: Round) -> Grower:
        previous = round_.previous
        threshold = previous.next_threshold if isinstance(previous, _ValueGrower) else self.threshold
        round_ = _capped(round_, self.max_depth)
        return _ValueGrower(round_, budget=self.max_nodes, threshold=threshold, shared=False)


class _ValueGrower(LayeredGrower):
    """The nodes of the greatest values: at most `budget` of each row, and none below the threshold.

    A pool is the rows that share a budget; its heap holds the greatest values so far, the least of them on top.
    """

    def __init__(self, round_: Round, *, budget: int, threshold: float, shared: bool):
        super().__init__(round_)
        num_rows = len(round_.max_depths)
        self._threshold = threshold
        self._total = budget * sum(depth > 0 for depth in round_.max_depths)
        self._limit = self._total if shared else budget
        self._pools: list[list[float]] = [[]] * num_rows if shared else [[] for _ in range(num_rows)]

    def _wants(self, slot: Node, value: float) -> bool:
        pool = self._pools[slot.row]
        return value >= self._threshold and (len(pool) < self._limit or value > pool[0])

    def _added(self, node: Node) -> None:
        pool = self._pools[node.row]
        (heappush if len(pool) < self._limit else heapreplace)(pool, node.value)

    def _kept(self) -> list[Node]:
        kept, counts = [], Counter[int]()
        for node in sorted(self._nodes, key=lambda node: -node.value):
            pool = id(self._pools[node.row])
            counts[pool] += 1
            if counts[pool] <= self._limit:
                kept.append(node)
        return sorted(kept, key=lambda node: node.depth)

    @property
    def next_threshold(self) -> float:
        """Half way (in logarithms) from this round's threshold to the one that would have met the budget.

        The number of nodes above a threshold is taken to be inversely proportional to it.
        """
        values = [node.value for node in self._kept()]
        used_up = len(values) == self._total
        met = min(values) if used_up else self._threshold * max(1, len(values)) / self._total
        return max(_SMALLEST_THRESHOLD, sqrt(self._threshold * met))


def _capped(round_: Round, max_depth: int | None) -> Round:
    if max_depth is None:
        return round_
    return replace(round_, max_depths=[min(depth, max_depth) for depth in round_.max_depths])


def _check_positive(policy: GrowthPolicy, name: str) -> None:
    value = getattr(policy, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{type(policy).__name__}({name}={value!r}): {name} is a positive integer")
