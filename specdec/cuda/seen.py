"""What an attention is told of its slots, for the kernels and for their twin.

Shape legend: B rows, W new slots.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TAIL_SLOTS = 64
"""Bits of an integer: no tail is longer."""
SPLIT_SLOTS = 256
"""Slots whose scores are summed up together; splits are added up in their order."""


class Seen(NamedTuple):
    """Which slots new slots see: committed ones from a first one on, and their path in the tail, which begins after.

    Args:
        firsts_BW: int64 past the padding of a row, and within a window.
        lengths_B: int64 committed slots, padding included.
        bits_BW: int64, bit k says that a new slot sees slot k of the tail.
    """

    firsts_BW: Tensor
    lengths_B: Tensor
    bits_BW: Tensor
