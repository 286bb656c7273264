"""Vectors of rows that differ in their number of slots, without padding.

Shape legend: B rows, T slots of a row, R slots of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import Tensor


class Ragged:
    """For every row a vector for each of its own slots, the rows one after the other.

    Args:
        flat_RV: contiguous.
        sizes: T of every row.
    """

    def __init__(self, flat_RV: Tensor, sizes: Sequence[int]):
        self.flat_RV = flat_RV
        self.sizes = tuple(sizes)
        self.starts = (0, *accumulate(self.sizes))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Tensor:
        """[T, V], a view."""
        return self.flat_RV[self.starts[row] : self.starts[row + 1]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Ragged:
        """A function of all vectors [R, V]."""
        return Ragged(function(self.flat_RV), self.sizes)
