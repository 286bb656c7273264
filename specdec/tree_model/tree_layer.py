"""One layer of a tree cache: buffers of slots, row by row.

Shape legend: B rows, R rows of the buffers, H heads, S slots, T new slots, D head size.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from trees.uploads import upload

MIN_CAPACITY = 64
_FREE_SLOTS, _FREE_BYTES = 1 << 15, 1 << 30
"""Slots of a row that buffers on a CPU begin with, as far as a buffer is not larger than that: they take memory where
somebody writes, so such a buffer need not grow by copying."""
_LAZY_BYTES = 1 << 16
_MOST_ROOM = 4
"""Times the rows, or the slots of the longest row: buffers in which more was written are replaced when rows leave."""
_NAMES = ("keys", "values", "index_keys")


class Rows(Protocol):
    """What a layer asks of the cache that it belongs to (a `TreeCache`)."""

    lengths: list[int]

    @property
    def num_rows(self) -> int: ...

    @property
    def is_uniform(self) -> bool: ...

    def slots(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]: ...

    def buffers_change(self) -> None: ...


class TreeLayer(CacheLayerMixin):
    """One layer's buffers [R, H, capacity, D], R >= B; the book-keeping of rows is the cache's.

    Args:
        cache: that the layer belongs to.
        capacity: slots to begin with.

    Attributes:
        tail: slots after the committed ones.
        index_keys: of the indexer that selects what a token attends to, where there is one; of one head.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    index_keys: Tensor | None

    def __init__(self, cache: Rows, capacity: int):
        super().__init__()
        # a cycle would keep the buffers until the next collection
        self._cache = cast(Rows, weakref.proxy(cache))
        self._capacity = max(capacity, MIN_CAPACITY)
        self._written = 0
        self.tail = 0
        self.index_keys = None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Those that there are: keys, values and what the indexer keeps."""
        return tuple(buffer for buffer in (self.keys, self.values, self.index_keys) if buffer is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._allocate((key_states, value_states), len(key_states))

    def _allocate(self, states: Sequence[Tensor], num_rows: int) -> None:
        """New buffers of zeros for states like these, in the order of `buffers`."""
        self.dtype, self.device = states[0].dtype, states[0].device
        self._set(self._zeros(states, num_rows))
        self.is_initialized = True

    def _zeros(self, states: Sequence[Tensor], num_rows: int) -> list[Tensor]:
        """Buffers for states like these: of the capacity, which becomes larger where that costs nothing."""

        def buffers(capacity: int) -> list[Tensor]:
            # zeros, because a masked slot still enters the weighted sum and 0 * NaN is NaN
            return [_zeros((num_rows, part.shape[-3], capacity, part.shape[-1]), part) for part in states]

        slot_bytes = max(num_rows * part.shape[-3] * part.shape[-1] * part.element_size() for part in states)
        free = min(_FREE_SLOTS, _FREE_BYTES // slot_bytes)
        if _is_lazy(states[0]) and free > self._capacity:
            with contextlib.suppress(OSError):  # the process may have few addresses
                found = buffers(free)
                self._capacity = free
                return found
        return buffers(self._capacity)

    def _set(self, buffers: Iterable[Tensor]) -> None:
        for name, buffer in zip(_NAMES, buffers, strict=False):
            setattr(self, name, buffer)
        self._cache.buffers_change()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T slots to the tail; returns views of everything written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.append(key_states.shape[2])
        return self._write_last(self.keys, key_states), self._write_last(self.values, value_states)

    def append(self, num_new: int) -> None:
        """More slots at the end of the tail, which the caller writes."""
        self._reserve(self.get_seq_length() + num_new)
        self.tail += num_new

    def update_indexer(self, index_states: Tensor) -> Tensor:
        """Write the indexer's keys [B, T, D] of the slots that `update` has just appended; returns those of all."""
        states = index_states.unsqueeze(1)
        if self.index_keys is None:
            self._set((self.keys, self.values, _zeros((len(self.keys), 1, self._capacity, states.shape[3]), states)))
        assert self.index_keys is not None
        return self._write_last(self.index_keys, states)[:, 0]

    def _write_last(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Write the last T slots of the tail; returns a view of all slots."""
        num_rows, _, num_new, _ = states.shape
        stop = self.get_seq_length()
        if self._cache.is_uniform:
            buffer[:num_rows, :, stop - num_new : stop] = states
        else:
            rows_BT, slots_BT = self._cache.slots(self.tail - num_new, num_new, buffer.device)
            buffer[rows_BT, :, slots_BT] = states.transpose(1, 2)
        return buffer[:num_rows, :, :stop]

    def _reserve(self, num_slots: int) -> None:
        """For so many slots, which are written next."""
        self._written = max(self._written, num_slots)
        if num_slots > self._capacity:
            self._resize(len(self.keys), max(num_slots, self._capacity + self._capacity // 2))

    def _resize(self, num_rows: int, capacity: int) -> None:
        """Larger buffers, with everything that is in these."""
        used, self._capacity = self.get_seq_length(), capacity
        larger = self._zeros(self.buffers, num_rows)
        for old, new in zip(self.buffers, larger, strict=True):
            new[: len(old), :, :used] = old[:, :, :used]
        self._set(larger)

    def make_room(self, num_rows: int) -> None:
        """For so many rows."""
        self.reserve(num_rows, self._capacity)

    def reserve(self, num_rows: int, capacity: int) -> None:
        """For so many rows of so many slots."""
        capacity = max(capacity, self._capacity)
        if not self.is_initialized:
            self._capacity = capacity
        elif num_rows > len(self.keys) or capacity > self._capacity:
            room = len(self.keys) if num_rows <= len(self.keys) else max(num_rows, 2 * len(self.keys))
            self._resize(room, capacity)

    def write_row(self, row: int, states: Sequence[Tensor], start: int = 0) -> None:
        """Fill a row from the slot `start` on.

        Args:
            states: [H, S, D] of each of the buffers.
        """
        stop = start + states[0].shape[1]
        if not self.is_initialized:
            self._capacity = max(self._capacity, stop)
            self._allocate(states, self._cache.num_rows)
        self._reserve(stop)
        for buffer, part in zip(self.buffers, states, strict=True):
            buffer[row, :, start:stop] = part

    def copy_rows(self, other: TreeLayer, rows: Sequence[int], room: int) -> None:
        """Begin with these rows of another layer, with room for so many slots more."""
        self._capacity = max(self._cache.lengths) + room
        self._allocate(other.buffers, len(rows))
        self._reserve(max(self._cache.lengths))
        for own, buffer in zip(self.buffers, other.buffers, strict=True):
            for place, (row, length) in enumerate(zip(rows, self._cache.lengths, strict=True)):
                own[place, :, :length] = buffer[row, :, :length]

    def take_tail(self, other: TreeLayer, rows: Sequence[int], count: int) -> None:
        """Copy what another layer, of these rows alone, has after their committed slots."""
        lengths = self._cache.lengths
        self._reserve(max(lengths) + count)
        for own, buffer in zip(self.buffers, other.buffers, strict=True):
            for place, row in enumerate(rows):
                tail = slice(lengths[row], lengths[row] + count)
                own[row, :, tail] = buffer[place, :, tail]
        self.tail = count

    def clear_row(self, row: int) -> None:
        for buffer in self.buffers:
            buffer[row, :, : self._written] = 0

    def select_rows(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep these rows, of these lengths."""
        if not self.is_initialized:
            return
        moves = [(old, new) for new, old in enumerate(rows) if old != new]
        overwritten = {new for _, new in moves}
        # a row may be moved in place if its old place is not taken before its turn
        is_safe = all(old > new or old not in overwritten for old, new in moves)
        longest = max(lengths, default=0)
        has_much_room = self._written > _MOST_ROOM * max(longest, MIN_CAPACITY)
        if not rows:
            self.keys = self.values = None  # type: ignore[assignment]  # as before the first update
            self.index_keys = None
            self._capacity, self._written, self.is_initialized = MIN_CAPACITY, 0, False
            self._cache.buffers_change()
        elif is_safe and len(self.keys) <= _MOST_ROOM * len(rows) and not has_much_room:
            for old, new in moves:
                for buffer in self.buffers:
                    buffer[new, :, : lengths[new]] = buffer[old, :, : lengths[new]]
        else:
            self._capacity = 2 * max(longest, MIN_CAPACITY) if has_much_room else self._capacity
            rows_B = upload(rows, self.keys.device)
            fewer = self._zeros(self.buffers, len(rows))
            for buffer, part in zip(self.buffers, fewer, strict=True):
                part[: len(rows), :, :longest] = buffer[:, :, :longest].index_select(0, rows_B)
            self._written = longest
            self._set(fewer)

    def get_seq_length(self) -> int:
        return max(self._cache.lengths, default=0) + self.tail

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _is_lazy(like: Tensor) -> bool:
    """Whether zeros of a tensor's kind take no memory where nobody writes: not on Windows, which sets it aside."""
    return like.device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of another tensor's kind.

    Large ones on the CPU take no memory where nobody writes: short rows beside a long one have much of that, and to
    clear it took as long as many rounds.

    Raises:
        OSError: the process may have no more addresses.
    """
    num_bytes = math.prod(shape) * like.element_size()
    if not _is_lazy(like) or num_bytes < _LAZY_BYTES:
        return like.new_zeros(shape)
    # private: a process that is forked off must not write into these
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # no huge pages here; one would be taken for the first slot of a head
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
