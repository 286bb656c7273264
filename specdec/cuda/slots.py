"""Slots of a cache's tail arranged in all layers by one launch.

Shape legend: B rows, R rows of the buffers, H heads, S slots, D head size, K tail slots, N buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec.cuda.attention import has_triton
from specdec.cuda.seen import Buffers
from specdec.tree_model.buffers import arrange_slots
from trees.uploads import upload

MOST_SLOTS = 512
"""That a program of the kernel holds at once."""
_WORD_BYTES = (8, 4, 2, 1)


def can_arrange(parts: Sequence[Tensor]) -> bool:
    """Whether `arrange` is for these buffers: they are not on a CPU, and on CUDA it needs Triton."""
    devices = {part.device for part in parts}
    if len(devices) != 1 or not all(part.is_contiguous() for part in parts):
        return False
    kind = devices.pop().type
    return kind != "cpu" and (kind != "cuda" or has_triton())


def buffers_of(parts: Sequence[Tensor]) -> Buffers:
    slot_bytes = [part.shape[3] * part.element_size() for part in parts]
    word = next(word for word in _WORD_BYTES if not any(size % word for size in slot_bytes))
    table = [
        [part.data_ptr(), part.shape[1], part.shape[2], size // word]
        for part, size in zip(parts, slot_bytes, strict=True)
    ]
    return Buffers(
        tuple(parts),
        upload(table, parts[0].device),
        word,
        most_heads=max(heads for _, heads, _, _ in table),
        most_words=max(words for *_, words in table),
    )


def arrange(buffers: Buffers, starts_B: Tensor, sources_BK: Tensor) -> None:
    """Make old tail slots the first ones of the tail, in all heads of all buffers. All are read before one is written.

    Args:
        starts_B: int64 slots before the tail.
        sources_BK: int64 old tail index of each of the new tail's first K slots; K at most `MOST_SLOTS`.
    """
    if sources_BK.is_cuda:
        from specdec.cuda import kernels

        kernels.arrange(buffers, starts_B, sources_BK)
    else:
        reference(buffers, starts_B, sources_BK)


def reference(buffers: Buffers, starts_B: Tensor, sources_BK: Tensor) -> None:
    """`arrange` by PyTorch's operators, on any device."""
    arrange_slots(buffers.parts, starts_B, sources_BK)
