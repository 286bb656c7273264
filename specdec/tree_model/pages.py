"""Keys and values in pages of a few slots: rows have lengths of their own, and share the pages of what they begin with.

The idea of vLLM's PagedAttention (Kwon et al. 2023). A page holds so many slots of a text in all layers; a row has a
list of pages, and so has a text that is kept for others. Nothing is copied when a row joins, leaves, grows or is kept:
what two texts begin with are the same pages, full ones, which nobody writes to any more. A page goes when nobody has
it.

Only native layers read pages (`kernels/model/packed.py`): a cache of them is no `Cache` of transformers.

Shape legend: L layers, H heads of keys, P slots of a page, D head size, S slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specdec.kernels import native
from specdec.tree_model.cache import RowStates, TreeCache

PAGE = native.PAGE_SLOTS


class PagePool:
    """What pages of a model look like, and how many of them there are.

    Attributes:
        num_pages: that somebody has.
    """

    def __init__(self, num_layers: int, num_heads: int, head_size: int):
        self.shape = (num_layers, 2, num_heads, PAGE, head_size)
        self.num_pages = 0


class Page:
    """Keys and values, float32 [L, 2, H, P, D], of a text's next slots. Zeros at first: a NaN that is hidden would
    leak, through 0 * NaN, into what is seen."""

    __slots__ = ("_pool", "address", "states")

    def __init__(self, pool: PagePool):
        self.states = torch.zeros(pool.shape)
        self.address = self.states.data_ptr()
        self._pool = pool
        pool.num_pages += 1

    def __del__(self) -> None:
        self._pool.num_pages -= 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPages(RowStates):
    """What one row has committed, by reference: only full pages stay as they are when the row goes on."""

    pages: Sequence[Page]

    def layer(self, index: int, start: int = 0) -> tuple[torch.Tensor, ...]:
        """As of a `RowStates`; copied from the pages of these slots."""
        first = start // PAGE
        whole = torch.cat([page.states[index] for page in self.pages[first:]], 2)
        return tuple(whole[:, :, start - first * PAGE : self.length - first * PAGE])

    def part(self, start: int, stop: int) -> RowPages:
        """Those of some full pages; nothing is copied."""
        assert start % PAGE == stop % PAGE == 0
        return row_pages(stop - start, self.pages[start // PAGE : stop // PAGE])

    def copied(self) -> RowStates:
        """The same as a `TreeCache` has it."""
        whole = torch.cat([page.states for page in self.pages], 3)[:, :, :, : self.length]
        return RowStates(length=self.length, slots=[(layer[0], layer[1]) for layer in whole], recurrent=[])


def row_pages(length: int, pages: Sequence[Page]) -> RowPages:
    return RowPages(length=length, slots=[], recurrent=[], pages=pages)


def as_pages(pool: PagePool, states: RowStates) -> RowPages:
    """What a `TreeCache` has of a row, copied into pages."""
    if isinstance(states, RowPages):
        return states
    pages = [Page(pool) for _ in range(-(-states.length // PAGE))]
    for first, page in zip(range(0, states.length, PAGE), pages, strict=True):
        for layer, slots in zip(page.states, states.slots, strict=True):
            for kept, own in zip(layer, slots, strict=True):
                part = own[:, first : first + PAGE]
                kept[:, : part.shape[1]] = part
    return row_pages(states.length, pages)


def one_after_another(parts: Sequence[RowStates]) -> RowStates:
    """What a row has that begins with these parts of a text."""
    length = sum(part.length for part in parts)
    paged = [part for part in parts if isinstance(part, RowPages)]
    if len(paged) == len(parts):
        return row_pages(length, [page for part in paged for page in part.pages])
    copied = [part.copied() if isinstance(part, RowPages) else part for part in parts]
    layers = zip(*(part.slots for part in copied), strict=True)
    slots = [tuple(torch.cat(kept, 1) for kept in zip(*layer, strict=True)) for layer in layers]
    return RowStates(length=length, slots=slots, recurrent=[])


class PagedCache(TreeCache):
    """The rows of a `TreeModel` in pages: a `TreeCache` of no layers, for its slots are not where those have them."""

    def __init__(self, pool: PagePool, num_rows: int = 0):
        super().__init__(0, num_rows)
        self.pool = pool
        self.tails = [0] * num_rows
        """Slots of each row after the committed ones."""
        self._pages: list[list[Page]] = [[] for _ in range(num_rows)]
        self._tables: list[np.ndarray] = [np.empty(0, np.int64) for _ in range(num_rows)]

    @property
    def tail(self) -> int:
        """Slots of the longest tail."""
        return max(self.tails, default=0)

    def append(self, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A tail of so many slots, which a forward is about to write.

        Returns:
            The addresses of the row's pages, and of each new slot in its page.
        """
        assert not self.tails[row], "a forward a round"
        length = self.lengths[row]
        self.tails[row] = count
        pages = self._pages[row]
        num_missing = -(-(length + count) // PAGE) - len(pages)
        if num_missing > 0:
            pages += [Page(self.pool) for _ in range(num_missing)]
            self._tables[row] = _addresses(pages)
        table, slots = self._tables[row], np.arange(length, length + count)
        return table, table[slots // PAGE] + slots % PAGE * self._slot_bytes

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        for row, slots in enumerate(kept):
            length = self.lengths[row]
            moves = [(length + slot, length + place) for place, slot in enumerate(slots) if slot != place]
            if moves:
                self._move(row, moves)
        super().commit(kept)

    def rollback(self) -> None:
        self.tails = [0] * self.num_rows

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self._pages = [self._pages[row] for row in rows]
        self._tables = [self._tables[row] for row in rows]
        self.rollback()

    def join(self, states: RowStates | None = None) -> None:
        """As of a `TreeCache`, but that the row has the pages themselves; the last one, if not full, for itself."""
        super().join()
        pages = [] if states is None else list(as_pages(self.pool, states).pages)
        self.lengths[-1] = 0 if states is None else states.length
        self.tails.append(0)
        self._pages.append(pages)
        self._tables.append(_addresses(pages))

    def row_views(self, row: int) -> RowPages:
        length = self.lengths[row]
        return row_pages(length, self._pages[row][: -(-length // PAGE)])

    def row_states(self, row: int) -> RowStates:
        return self.row_views(row).copied()

    def of_rows(self, cache: TreeCache) -> PagedCache:
        """Copies of another cache's rows, in pages of this pool."""
        paged = PagedCache(self.pool)
        for row in range(cache.num_rows):
            paged.join(cache.row_views(row))
        return paged

    def copied(self) -> TreeCache:
        """The same rows without pages, for a model whose layers cannot read these any more."""
        cache = TreeCache(self.pool.shape[0], 0)
        for row in range(self.num_rows):
            cache.join(self.row_states(row) if self.lengths[row] else None)
        return cache

    def check_integrity(self) -> None:
        """Assert what must hold between rounds."""
        assert self.tail == 0
        last_pages = [pages[-1] for length, pages in zip(self.lengths, self._pages, strict=True) if length % PAGE]
        assert len(set(map(id, last_pages))) == len(last_pages), "a page that is written to has one row"
        for length, pages, table in zip(self.lengths, self._pages, self._tables, strict=True):
            assert len(pages) * PAGE >= length
            assert table.tolist() == [page.address for page in pages]

    @property
    def _slot_bytes(self) -> int:
        return 4 * self.pool.shape[-1]

    def _move(self, row: int, moves: Sequence[tuple[int, int]]) -> None:
        library = native.library()
        assert library is not None, "pages are for native layers"
        sources, targets = zip(*moves, strict=True)
        numbers = (ctypes.c_int64 * (2 * len(moves)))(*sources, *targets)
        start, num_parts = ctypes.addressof(numbers), 2 * self.pool.shape[0] * self.pool.shape[2]
        addresses = self._tables[row].ctypes.data, num_parts, self._slot_bytes
        library.move_in_pages(*addresses, start, start + 8 * len(moves), len(moves))


def _addresses(pages: Sequence[Page]) -> np.ndarray:
    return np.array([page.address for page in pages], np.int64)
