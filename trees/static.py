"""Trees of a shape that is fixed before anything is drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul

import numpy as np

from trees.layered import LayeredGrower, Node
from trees.policy import Grower, GrowthPolicy, Round
from trees.tree import TokenTree


@dataclass(frozen=True)
class Fixed(GrowthPolicy):
    """Every node of depth d has `branching[d]` children (SpecInfer's expansion configuration; Miao et al. 2024).

    Raises:
        ValueError: `branching` is not a non-empty sequence of positive integers.
    """

    branching: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.branching, list | tuple) or not self.branching:
            raise ValueError(
                f"Fixed(branching={self.branching!r}): branching holds a number of children for each depth"
            )
        if not all(isinstance(width, int) and width > 0 for width in self.branching):
            raise ValueError(f"Fixed(branching={self.branching!r}): numbers of children are positive integers")
        object.__setattr__(self, "branching", tuple(self.branching))

    @property
    def most_nodes(self) -> int:
        return sum(accumulate(self.branching, mul))

    def start(self, round_: Round) -> Grower:
        return ShapedGrower(round_, _fixed_shape(self.branching))


@dataclass(frozen=True)
class Sequoia(GrowthPolicy):
    """The best tree of `budget` nodes if acceptance depended on nothing but rank (Sequoia; Chen et al. 2024).

    Args:
        budget: number of nodes of each row.
        acceptance: `acceptance[k]` is the chance that, below an accepted parent, child number k is the one to be
            accepted; a node has at most as many children as there are entries. `measure_acceptance` measures them.

    Raises:
        ValueError: `budget` is not a positive integer, or `acceptance` holds no or other things than chances.
    """

    budget: int
    acceptance: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(f"Sequoia(budget={self.budget!r}): budget is a positive integer")
        if not isinstance(self.acceptance, list | tuple) or not self.acceptance:
            raise ValueError(f"Sequoia(acceptance={self.acceptance!r}): acceptance holds a chance for each rank")
        if not all(isinstance(chance, int | float) and 0 <= chance <= 1 for chance in self.acceptance):
            raise ValueError(f"Sequoia(acceptance={self.acceptance!r}): chances lie between 0 and 1")
        object.__setattr__(self, "acceptance", tuple(self.acceptance))

    @property
    def most_nodes(self) -> int:
        return self.budget

    def start(self, round_: Round) -> Grower:
        return ShapedGrower(round_, _sequoia_shape(self.budget, self.acceptance))


def count_ranks(tree: TokenTree, path: Sequence[int], num_ranks: int) -> tuple[list[int], list[int]]:
    """How often children of each rank were accepted, and how often they were tested, when this path was accepted.

    Args:
        path: accepted nodes from the root down.
        num_ranks: children past this many are not counted.
    """
    accepted, tested = [0] * num_ranks, [0] * num_ranks
    for slot, child in zip([0, *(node + 1 for node in path)], [*path, None], strict=True):
        for rank, sibling in enumerate(tree.children[slot][:num_ranks]):
            tested[rank] += 1
            if sibling == child:
                accepted[rank] += 1
                break
    return accepted, tested


def measure_acceptance(accepted: Sequence[int], tested: Sequence[int]) -> tuple[float, ...]:
    """The `acceptance` of `Sequoia` from counts of top-down verification (see `count_ranks`), summed over rounds.

    The chance that child k is accepted is that all before it are refused and then it is not. Parents with few
    children are thus no evidence about the ranks that they lack. The vector ends at the first rank without a test.
    """
    chances, refused = [], 1.0
    for hits, trials in zip(accepted, tested, strict=True):
        if not trials:
            break
        chances.append(refused * hits / trials)
        refused *= 1 - hits / trials
    return tuple(chances)


class ShapedGrower(LayeredGrower):
    """Grows a given shape, except where the draft knows fewer tokens than a node is to have children.

    Args:
        shape: for each slot of the shape (0 is the root) its children, in draw order.
    """

    def __init__(self, round_: Round, shape: Sequence[Sequence[int]]):
        super().__init__(round_)
        self._shape = shape
        self._spots = {id(root): 0 for root in self._frontier}

    def _extend(self, slots: list[Node]) -> list[Node]:
        self._fetch(slots)
        parents = []
        for slot in slots:
            for spot in self._shape[self._spots[id(slot)]]:
                child = self._take(slot)
                if child is None:
                    break
                self._spots[id(child)] = spot
                if self._shape[spot] and self._may_have_children(child):
                    parents.append(child)
        return parents


@lru_cache
def _fixed_shape(branching: tuple[int, ...]) -> list[list[int]]:
    shape: list[list[int]] = [[]]
    layer = [0]
    for width in branching:
        for slot in layer:
            shape[slot] = list(range(len(shape), len(shape) + width))
            shape.extend([] for _ in range(width))
        layer = [child for slot in layer for child in shape[slot]]
    return shape


@lru_cache
def _sequoia_shape(budget: int, acceptance: tuple[float, ...]) -> list[list[int]]:
    """Children of every slot of the best tree of `budget` nodes and the root.

    Sequoia, section 4.1: let best[b, n] be the expected number of accepted nodes (the root counts as one) of the best
    tree of n nodes, root included, whose root has b children. If its last child roots a subtree of m nodes, it is
    best[b - 1, n - m] + acceptance[b] * max over j of best[j, m].
    """
    num_nodes, num_ranks = budget + 1, len(acceptance)
    best = np.full((num_ranks + 1, num_nodes + 1), -np.inf)
    best[0, 1] = 1
    last = np.zeros((num_ranks + 1, num_nodes + 1), np.int64)
    for n in range(2, num_nodes + 1):
        sizes = np.arange(1, n)
        subtrees = best[:, sizes].max(0)
        for b in range(1, num_ranks + 1):
            gains = best[b - 1, n - sizes] + acceptance[b - 1] * subtrees
            choice = gains.argmax()
            best[b, n], last[b, n] = gains[choice], sizes[choice]
    return _rebuild(best, last, num_nodes)


def _rebuild(best: np.ndarray, last: np.ndarray, num_nodes: int) -> list[list[int]]:
    """The tree that the choices of the dynamic programme stand for."""
    shape: list[list[int]] = [[]]
    todo = [(0, num_nodes)]
    while todo:
        slot, size = todo.pop()
        sizes = []
        for b in range(int(best[:, size].argmax()), 0, -1):
            sizes.append(int(last[b, size]))
            size -= sizes[-1]
        shape[slot] = list(range(len(shape), len(shape) + len(sizes)))
        shape.extend([] for _ in sizes)
        todo.extend(zip(shape[slot], reversed(sizes), strict=True))
    return shape
