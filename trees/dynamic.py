"""Trees that follow the draft's own probabilities (DySpec; Xiong et al. 2024)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import sqrt

from trees.calibration import Calibration
from trees.layered import LayeredGrower, Node
from trees.policy import Grower, GrowthPolicy, Round

_SMALLEST_THRESHOLD = 1e-9
_CAUTION = 0.8
"""How far below the least value of the round before the next round's may be expected."""


@dataclass(frozen=True)
class DySpec(GrowthPolicy):
    """The `budget` nodes of the greatest values: DySpec's fixed-budget tree (algorithm 1).

    The paper forwards the draft once a node. Here a forward takes all nodes whose children are likely to belong to the
    tree; what the budget does not cover in the end is dropped. A node's value is known before its token is drawn: this
    is the paper's tree, in about as many forwards as it is deep.

    For greedy targets: the `budget` likeliest paths (no chance is involved, values may include the tokens' own
    probabilities).

    Args:
        budget: number of nodes of each row.
        max_depth: depth past which no node is drafted, that is, the most forwards of the draft a round.
        shared: let the rows of a batch pool their budgets and spend them where the values are highest.
        calibration: what the draft's probabilities say about acceptance, for sampled trees; None takes them at
            their word, as the paper does. The tree stays exact whatever it says.

    Raises:
        ValueError: a number is not a positive integer, or `calibration` is something else.
    """

    budget: int = 64
    max_depth: int | None = None
    shared: bool = False
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "budget")
        if self.max_depth is not None:
            _check_positive(self, "max_depth")
        if not isinstance(self.calibration, Calibration | None):
            raise ValueError(
                f"DySpec(calibration={self.calibration!r}): calibration is a trees.Calibration, or None for none"
            )

    @property
    def most_nodes(self) -> int | None:
        return None if self.shared else self.budget

    def start(self, round_: Round) -> Grower:
        round_ = _capped(round_, self.max_depth)
        return ValueGrower(round_, budget=self.budget, threshold=0.0, shared=self.shared, calibration=self.calibration)


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

    @property
    def most_nodes(self) -> int:
        return self.max_nodes

    def start(self, round_: Round) -> Grower:
        previous = round_.previous
        threshold = previous.next_threshold if isinstance(previous, ValueGrower) else self.threshold
        round_ = _capped(round_, self.max_depth)
        return ValueGrower(round_, budget=self.max_nodes, threshold=threshold)


@dataclass(slots=True, eq=False)
class _Pool:
    """Rows that share a budget.

    Args:
        limit: the budget.
        guess: of the least value that will be kept.
        values: a heap of the greatest values so far, the least of them on top.
        offers: a heap of what can be done next, the greatest value on top: a scored slot gives its next child, a
            node that is not scored yet has to be. No offer can lead to a greater value than its own.
    """

    limit: int
    guess: float
    values: list[float] = field(default_factory=list)
    offers: list[tuple[float, int, Node]] = field(default_factory=list)

    def push(self, value: float) -> None:
        (heappush if len(self.values) < self.limit else heapreplace)(self.values, value)


class ValueGrower(LayeredGrower):
    """The nodes of the greatest values: at most `budget` of each row, and none below the threshold.

    This is DySpec's algorithm 1, but for one thing: a node that must be scored before the algorithm can go on waits,
    and offers of less value are taken meanwhile. What they lead to may be dropped in the end, so they are taken only
    down to a guess of the least value that will be kept. A bad guess costs forwards, and nothing else.
    """

    def __init__(
        self,
        round_: Round,
        *,
        budget: int,
        threshold: float,
        shared: bool = False,
        calibration: Calibration | None = None,
    ):
        super().__init__(round_, calibration)
        num_rows = len(round_.max_depths)
        previous = round_.previous
        guess = _CAUTION * previous.least_value if isinstance(previous, ValueGrower) else 0.5 / budget
        self._threshold = threshold
        self._total = budget * sum(depth > 0 for depth in round_.max_depths)
        self._pools = [_Pool(limit=budget, guess=guess) for _ in range(num_rows)]
        if shared:
            self._pools = [_Pool(limit=self._total, guess=guess)] * num_rows
        self._ticket = count()

    def _extend(self, slots: list[Node]) -> list[Node]:
        slots = [slot for slot in slots if self._wants(slot, slot.bound)]
        self._fetch(slots)
        for slot in slots:
            self._offer(slot, self._next_value(slot))
        return [node for pool in {id(pool): pool for pool in self._pools}.values() for node in self._collect(pool)]

    def _wants(self, slot: Node, value: float) -> bool:
        """Whether the next child of a slot is wanted, given its value; if not, none after it may be."""
        pool = self._pools[slot.row]
        return value >= self._threshold and (len(pool.values) < pool.limit or value > pool.values[0])

    def _offer(self, node: Node, value: float) -> None:
        heappush(self._pools[node.row].offers, (-value, next(self._ticket), node))

    def _collect(self, pool: _Pool) -> list[Node]:
        """Take offers, the best first; returns the nodes that wait for their scores."""
        waiting: list[Node] = []
        while pool.offers:
            value, node = -pool.offers[0][0], pool.offers[0][2]
            if not self._wants(node, value):
                break
            if value < pool.guess:
                if waiting:
                    break
                pool.guess = value / 2
            heappop(pool.offers)
            if node.source is None:
                waiting.append(node)
            elif child := self._take(node):
                pool.push(child.value)
                self._offer(node, self._next_value(node))
                if self._may_have_children(child):
                    self._offer(child, child.bound)
        return waiting

    def _kept(self) -> list[Node]:
        kept, counts = [], Counter[int]()
        for node in sorted(self._nodes, key=lambda node: -node.value):
            pool = self._pools[node.row]
            counts[id(pool)] += 1
            if counts[id(pool)] <= pool.limit:
                kept.append(node)
        return kept

    @property
    def least_value(self) -> float:
        """Of the kept nodes; 0 if there are none."""
        return min((node.value for node in self._kept()), default=0.0)

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
