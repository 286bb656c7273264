"""Draws from rows of scores in the processor's native tongue: one pass over a row, and no softmax.

Shape legend: M rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels import native
from trees.urn import TokenSource, TorchSource

BLOCK = 256
"""Tokens of a block; mirrors draws.h."""


def open_urn(scores_MV: Tensor, *, sample: bool, generator: torch.Generator | None) -> TokenSource:
    """A native urn where there can be one, torch's elsewhere."""
    if is_native(scores_MV):
        return NativeUrn(scores_MV, sample=sample, generator=generator)
    return TorchSource(scores_MV, sample=sample, generator=generator)


def is_native(scores: Tensor) -> bool:
    on_cpu = scores.device.type == "cpu" and scores.dtype is torch.float32 and scores.is_contiguous()
    return on_cpu and native.library() is not None


class NativeUrn(TokenSource):
    """What is left of M distributions that are given by their scores, [M, V] contiguous float32 (kept, not changed)."""

    def __init__(self, scores_MV: Tensor, *, sample: bool, generator: torch.Generator | None):
        library = native.library()
        assert library is not None, "open_urn() asks first"
        self._library = library
        self._scores_MV = scores_MV
        self._sample = sample
        self._generator = generator
        self._taken: list[list[int]] = [[] for _ in range(len(scores_MV))]
        num_rows, vocab_size = scores_MV.shape
        num_numbers = num_rows * -(-vocab_size // BLOCK)
        self._peaks, self._sums = (ctypes.c_float * num_numbers)(), (ctypes.c_float * num_numbers)()
        self._norms = (ctypes.c_double * num_rows)()
        library.scan(scores_MV.data_ptr(), num_rows, vocab_size, self._peaks, self._sums, self._norms)

    @property
    def norms(self) -> list[float]:
        """The logarithm of each row's sum of e^score."""
        return self._norms[:]

    def take(self, slots: Sequence[int], count: int) -> tuple[list[list[int]], list[list[float]]]:
        num_slots = len(slots)
        taken = [self._taken[slot] for slot in slots]
        sizes = list(map(len, taken))
        room = max(sizes) + count
        padded = [token for gone in taken for token in (*gone, *[0] * (room - len(gone)))]
        coins = None
        if self._sample:
            coins = torch.rand(num_slots * count, dtype=torch.float64, generator=self._generator)
        tokens, probs = (ctypes.c_int64 * (num_slots * count))(), (ctypes.c_double * (num_slots * count))()
        self._library.take(
            self._scores_MV.data_ptr(),
            self._scores_MV.shape[1],
            self._peaks,
            self._sums,
            self._norms,
            (ctypes.c_int64 * num_slots)(*slots),
            num_slots,
            (ctypes.c_int64 * len(padded))(*padded),
            (ctypes.c_int64 * num_slots)(*sizes),
            room,
            count,
            native.address(coins),
            tokens,
            probs,
        )
        starts = range(0, num_slots * count, count)
        new = [tokens[start : start + count] for start in starts]
        for before, row in zip(taken, new, strict=True):
            before += row
        return new, [probs[start : start + count] for start in starts]
