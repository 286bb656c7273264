"""Native sampling from rows of scores: one pass over a row, and no softmax.

Shape legend: M rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import native
from specdec.kernels.native import structs
from trees.token_source import TokenSource, TorchSource


def open_token_source(scores_MV: Tensor, *, sample: bool, generator: torch.Generator | None) -> TokenSource:
    """A native source where there can be one, torch's elsewhere."""
    if is_native(scores_MV):
        return NativeTokenSource(scores_MV, sample=sample, generator=generator)
    return TorchSource(scores_MV, sample=sample, generator=generator)


def is_native(scores: Tensor) -> bool:
    on_cpu = scores.device.type == "cpu" and scores.dtype is torch.float32 and scores.is_contiguous()
    return on_cpu and native.library() is not None


class NativeTokenSource(TokenSource):
    """What is left of M distributions that are given by their scores, [M, V] contiguous float32 (kept, not changed).

    A row is read when something is first taken from it: rows that nobody asks about cost nothing.
    """

    def __init__(self, scores_MV: Tensor, *, sample: bool, generator: torch.Generator | None):
        library = native.library()
        assert library is not None, "open_token_source() asks first"
        self._library = library
        self._scores_MV = scores_MV
        self._sample = sample
        self._generator = generator
        self._taken: dict[int, list[int]] = {}
        num_rows, vocab_size = scores_MV.shape
        num_blocks = num_rows * native.num_blocks(vocab_size)
        self._found = np.empty(num_blocks + num_rows)  # two float32 a block, then the norms
        self._found[num_blocks:] = np.nan
        start = self._found.ctypes.data
        self._candidates = structs.Candidates(
            scores_MV.data_ptr(), vocab_size, start, start + 4 * num_blocks, start + 8 * num_blocks
        )

    def take(self, slots: Sequence[int], count: int) -> tuple[list[list[int]], list[list[float]]]:
        num_slots = len(slots)
        coins = None
        if self._sample:
            coins = torch.rand(num_slots * count, dtype=torch.float64, generator=self._generator)
        numbers = np.empty((1 + 2 * count) * num_slots, np.int64)  # slots, tokens, and probabilities in float64
        numbers[:num_slots] = slots
        tokens, probs = numbers[num_slots:].reshape(2, num_slots, count)
        before = [self._taken.get(slot, ()) for slot in slots]
        start, taken = numbers.ctypes.data, _pack(before)
        after_slots, size = start + 8 * num_slots, 8 * num_slots * count
        self._library.take(
            self._candidates, start, num_slots, taken, count, native.address(coins), after_slots, after_slots + size
        )
        new = tokens.tolist()
        self._taken.update((slot, [*old, *row]) for slot, old, row in zip(slots, before, new, strict=True))
        return new, probs.view(np.float64).tolist()


def _pack(rows: Sequence[Sequence[int]]) -> structs.Taken:
    room = max(map(len, rows))
    if not room:
        return structs.Taken()
    numbers = np.array([[len(row), *row, *[0] * (room - len(row))] for row in rows])
    tokens, counts = np.ascontiguousarray(numbers[:, 1:]), np.ascontiguousarray(numbers[:, 0])
    taken = structs.Taken(tokens.ctypes.data, counts.ctypes.data, room)
    taken.alive = (tokens, counts)
    return taken
