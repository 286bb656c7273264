"""What kernels and their twins are told: an attention of the slots that it sees, moves of the buffers.

Shape legend: B rows, W new slots, R rows of the buffers, H heads, S slots, D head size, N buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Buffers(NamedTuple):
    """Of one device, for as long as they live.

    Args:
        parts: [R, H, S, D] each, contiguous; dtypes, heads and sizes may differ.
        table_N4: int64 address, heads, slots, and words of a slot in one head.
        word_bytes: of a word, which divides every slot.
        most_heads, most_words: the largest of the table.
    """

    parts: Sequence[Tensor]
    table_N4: Tensor
    word_bytes: int
    most_heads: int
    most_words: int
