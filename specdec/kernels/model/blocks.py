"""What a native layer's attention is given: the rows of a cache, a block of queries at a time.

Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from specdec.kernels import native


class Attended(NamedTuple):
    """Queries, and what they attend to."""

    query_BTHD: torch.Tensor
    key_BKSD: torch.Tensor
    value_BKSD: torch.Tensor
    mask: torch.Tensor | None

    def blocks(self) -> Iterator[tuple[int, "Attended"]]:
        """Parts of at most `BLOCK_ROWS` queries that lie beside each other, and the number of queries before each."""
        B, T = self.query_BTHD.shape[:2]
        if B * T <= native.BLOCK_ROWS:
            yield 0, self
            return
        for row, first in itertools.product(range(B), range(0, T, native.BLOCK_ROWS)):
            part = self._part(slice(row, row + 1), slice(first, min(first + native.BLOCK_ROWS, T)))
            yield row * T + first, part

    def _part(self, rows: slice, tokens: slice) -> "Attended":
        B, T = self.query_BTHD.shape[:2]
        num_keys = self.key_BKSD.shape[2]
        if self.mask is None:  # causal: the last query sees the last key
            mask, num_seen = None, num_keys - T + tokens.stop
        else:
            mask, num_seen = self.mask.expand(B, -1, T, -1)[rows, :, tokens], num_keys
        key, value = self.key_BKSD[rows, :, :num_seen], self.value_BKSD[rows, :, :num_seen]
        return Attended(self.query_BTHD[rows, tokens], key, value, mask)
