"""What a draft's probabilities say about acceptance, measured.

Shape legend: K ranks (the first child of a slot has rank 0), J bins of probability.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trees.tree import TokenTree

EDGES = (0.1, 0.3, 0.6, 0.9, 0.99)
"""Where one bin of probability ends and the next begins."""

_PRIOR = 3.0
"""Weight of a rank's mean in each of its bins, in tests."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How often the target accepts a drawn child that it tests (that is, after it has refused the earlier siblings).

    DySpec takes for this chance the child's share r, its probability in what its earlier siblings have left. Measured,
    a first child of small r is accepted far more often, and later siblings of large r less often.

    Args:
        before: `before[k]` is the chance of a child of rank k, as far as it is known before its token is drawn.
        after: `after[k][j]` is the same once its share is known to lie in bin j (see `EDGES`).
            Children past the last rank are taken for children of that rank.

    Raises:
        ValueError: an entry is no chance, or a rank or bin is missing.
    """

    before: tuple[float, ...]
    after: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(self.before))
        object.__setattr__(self, "after", tuple(map(tuple, self.after)))
        if not self.before or [len(bins) for bins in self.after] != [len(EDGES) + 1] * len(self.before):
            raise ValueError(
                f"Calibration(before={self.before!r}, after={self.after!r}): before holds a chance for each rank, "
                f"after {len(EDGES) + 1} chances for each rank"
            )
        if not all(0 <= chance <= 1 for chance in (*self.before, *(x for bins in self.after for x in bins))):
            raise ValueError(f"Calibration(before={self.before!r}, after={self.after!r}): chances lie between 0 and 1")

    def of_next(self, rank: int) -> float:
        """The chance of a child that is not drawn yet."""
        return self.before[min(rank, len(self.before) - 1)]

    def of_drawn(self, rank: int, share: float) -> float:
        return self.after[min(rank, len(self.after) - 1)][bisect_right(EDGES, share)]


def count_shares(tree: TokenTree, path: Sequence[int], num_ranks: int) -> np.ndarray:
    """int64 [2, K, J]: how often children of each rank and bin were accepted, and how often they were tested.

    Args:
        tree: drawn, with the `probs` that its tokens had.
        path: accepted nodes from the root down.
        num_ranks: children past this many are not counted.
    """
    assert tree.probs is not None, "shares are made of probabilities"
    counts = np.zeros((2, num_ranks, len(EDGES) + 1), np.int64)
    for slot, accepted in zip([0, *(node + 1 for node in path)], [*path, None], strict=True):
        left = 1.0
        for rank, child in enumerate(tree.children[slot][:num_ranks]):
            bin_ = bisect_right(EDGES, share_of(tree.probs[child], left))
            counts[1, rank, bin_] += 1
            if child == accepted:
                counts[0, rank, bin_] += 1
                break
            left -= tree.probs[child]
    return counts


def measure_calibration(accepted_KJ: np.ndarray, tested_KJ: np.ndarray) -> Calibration:
    """From counts of top-down verification (see `count_shares`), summed over rounds.

    A rank's bins are drawn towards its mean and made to rise with probability. Ranks end at the first without a test.

    Raises:
        ValueError: nothing was tested.
    """
    num_ranks = int(np.cumprod(tested_KJ.sum(1) > 0).sum())
    if not num_ranks:
        raise ValueError("no child was tested: there is nothing to measure")
    accepted_KJ, tested_KJ = accepted_KJ[:num_ranks], tested_KJ[:num_ranks]
    before_K = accepted_KJ.sum(1) / tested_KJ.sum(1)
    weight_KJ = tested_KJ + _PRIOR
    after_KJ = (accepted_KJ + _PRIOR * before_K[:, None]) / weight_KJ
    after = [_rising(chances, weights) for chances, weights in zip(after_KJ.tolist(), weight_KJ.tolist(), strict=True)]
    return Calibration(before=tuple(before_K.tolist()), after=tuple(after))


def share_of(prob: float, left: float) -> float:
    """A token's share of the probability that was left; rounding may have eaten up what was."""
    return min(1.0, prob / left) if left > 0 else 1.0


def _rising(chances: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The nearest rising sequence in the sense of weighted least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for chance, weight in zip(chances, weights, strict=True):
        pools.append((chance, weight, 1))
        while any(a[0] > b[0] for a, b in pairwise(pools[-2:])):
            (x, v, m), (y, w, n) = pools[-2:]
            pools[-2:] = [((x * v + y * w) / (v + w), v + w, m + n)]
    return tuple(chance for chance, _, count in pools for _ in range(count))
