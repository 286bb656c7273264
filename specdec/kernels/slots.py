"""Slots of a cache's buffers moved in one call for all layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from specdec.kernels import native


def can_move(buffer: Tensor) -> bool:
    return buffer.device.type == "cpu" and native.library() is not None


def move(buffers: Sequence[Tensor], row: int, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy slots of a row within each buffer.

    Args:
        buffers: contiguous [B, H, S, D] on the CPU.
        sources, targets: slots; targets rise and none is above its source.
    """
    library = native.library()
    assert library is not None, "can_move() asks first"
    addresses: list[int] = []
    numbers: list[int] = []
    for buffer in buffers:
        _, heads, capacity, size = buffer.shape
        slot_bytes = size * buffer.element_size()
        addresses.append(buffer.data_ptr() + row * heads * capacity * slot_bytes)
        numbers += (heads, capacity, slot_bytes)
    library.move(
        (ctypes.c_int64 * len(addresses))(*addresses),
        (ctypes.c_int64 * len(numbers))(*numbers),
        len(addresses),
        (ctypes.c_int64 * len(sources))(*sources),
        (ctypes.c_int64 * len(targets))(*targets),
        len(sources),
    )
