"""Slots of a cache's buffers moved in one call for all layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from specdec.kernels import native


def can_move(buffer: Tensor) -> bool:
    return buffer.device.type == "cpu" and native.library() is not None


class SlotMover:
    """Moves slots within buffers, for as long as these live.

    Args:
        buffers: contiguous [B, H, S, D] on the CPU.
    """

    def __init__(self, buffers: Sequence[Tensor]):
        library = native.library()
        assert library is not None, "can_move() asks first"
        self._library = library
        numbers: list[int] = []
        for buffer in buffers:
            _, heads, capacity, size = buffer.shape
            numbers += (heads, capacity, size * buffer.element_size())
        self._addresses = (ctypes.c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)

    def move(self, row: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots of a row within each buffer.

        Args:
            sources, targets: slots; targets rise and none is above its source.
        """
        count = len(sources)
        moves = (ctypes.c_int64 * (2 * count))(*sources, *targets)
        start = ctypes.addressof(moves)
        self._library.move(self._addresses, self._numbers, len(self._addresses), row, start, start + 8 * count, count)
