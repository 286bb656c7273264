"""What is done with the buffers of several layers at once: their addresses, and slots that change their place.

Shape legend: B rows, R rows of the buffers, H heads, S slots, K tail slots, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.tree_model.tree_layer import TreeLayer


class Addresses(NamedTuple):
    """Of the buffers of some layers, which have the same strides."""

    keys: ctypes.Array[ctypes.c_void_p]
    values: ctypes.Array[ctypes.c_void_p]
    strides: tuple[int, int, int]


def addresses_of(layers: Sequence[TreeLayer | None]) -> Addresses | None:
    """None where they are not alike, or no float32 on the CPU."""
    buffers: list[Tensor] = []
    for layer in layers:
        if type(layer) is not TreeLayer or not layer.is_initialized or layer.index_keys is not None:
            return None
        buffers += layer.buffers
    kinds = {(buffer.dtype, buffer.device.type, buffer.shape, buffer.stride()) for buffer in buffers}
    if len(kinds) != 1 or not {torch.float32, "cpu"} <= set(next(iter(kinds))):
        return None
    addresses = [buffer.data_ptr() for buffer in buffers]
    pointers = ctypes.c_void_p * len(layers)
    row, head, slot, _ = buffers[0].stride()
    return Addresses(pointers(*addresses[::2]), pointers(*addresses[1::2]), (row, head, slot))


def arrange_slots(buffers: Iterable[Tensor], starts_B: Tensor, sources_BK: Tensor) -> None:
    """Make old tail slots the first ones of the tail. All are read before one is written.

    Args:
        buffers: [R, H, S, D] each, on one device; written to.
        starts_B: int64 slots before the tail.
        sources_BK: int64 old tail index of each of the new tail's first K slots.
    """
    rows_B1, starts_B1 = torch.arange(len(starts_B), device=starts_B.device).unsqueeze(1), starts_B.unsqueeze(1)
    targets_BK = starts_B1 + torch.arange(sources_BK.shape[1], device=starts_B.device)
    slots_BK = starts_B1 + sources_BK
    for buffer in buffers:
        buffer[rows_B1, :, targets_BK] = buffer[rows_B1, :, slots_BK]
