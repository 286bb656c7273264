"""The KV cache of a tree-decoding model. The only file that touches HF cache classes.

Every row owns the slots `0 .. lengths[row] - 1`, without gaps between its committed tokens (padding to the left
of a prompt included). After them comes the *tail*: the speculative slots that forwards wrote since the last
commit, at `lengths[row] + 0, + 1, ...`. `commit` keeps a path through the tail and forgets the rest; `rollback`
forgets it all. Buffers grow by half of their size, so a generation of n tokens copies O(n). Rows join at the end and
leave anywhere; buffers have room for more rows than there are, so that neither copies more than the rows that move.

All positions are kept, in sliding-window layers too: there the mask hides what has left the window.

Shape legend: B rows, H heads, S slots, T new slots, D head size.
"""

from __future__ import annotations

import copy
import math
import mmap
import weakref
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels.slots import SlotMover, can_move

RowStates: TypeAlias = list[tuple[Tensor, Tensor]]
"""Committed keys and values of one row, each [H, S, D], layer by layer."""

_LAZY_BYTES = 1 << 20
_MIN_CAPACITY = 64
_MOST_ROOM = 4
"""Times the rows, or the slots of the longest row: buffers with room for more are replaced when rows leave."""


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The attention window of each layer, None where a layer sees everything.

    Raises:
        UnsupportedModelError: a layer keeps a state that cannot be rolled back or masked by tree.
    """
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and not getattr(config, "attention_chunk_size", None):
            windows.append(layer.sliding_window)
        else:
            raise UnsupportedModelError(
                f"layer {index} of this {config.model_type!r} model keeps a {type(layer).__name__}, which cannot "
                "take back drafted tokens; specdec decodes full-attention and sliding-window models: "
                "use model.generate() instead"
            )
    return windows


class TreeCache(Cache):
    """KV of B rows with lengths of their own and a common speculative tail.

    Args:
        num_layers: number of decoder layers.
        num_rows: B.
        capacity: slots to allocate at the start; more are allocated when needed.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int = _MIN_CAPACITY):
        self.lengths = [0] * num_rows
        self._slots_memo: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._mover: SlotMover | None = None
        super().__init__(layers=[_TreeLayer(self, capacity) for _ in range(num_layers)])

    @classmethod
    def adopt(cls, cache: DynamicCache, num_layers: int, num_rows: int, capacity: int) -> TreeCache:
        """A tree cache that starts with a copy of a `DynamicCache` (which stays as it is).

        Raises:
            UnsupportedOptionError: the cache has another batch size.
        """
        adopted = cls(num_layers, num_rows, capacity)
        length = cache.get_seq_length()
        if length == 0:
            return adopted
        for layer, source in zip(adopted.layers, cache.layers, strict=True):
            keys, values = source.keys, source.values
            if keys.shape[0] != num_rows:
                raise UnsupportedOptionError(
                    f"past_key_values holds {keys.shape[0]} rows but the input has {num_rows}: "
                    "pass a cache of the same batch size, or none"
                )
            # a window that has already forgotten its first slots never shows them again
            forgotten = (0, 0, length - keys.shape[-2], 0)
            layer.update(torch.nn.functional.pad(keys, forgotten), torch.nn.functional.pad(values, forgotten))
        adopted.commit([range(length)] * num_rows)
        return adopted

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def tail(self) -> int:
        """Number of speculative slots that every layer holds."""
        return min(layer.tail for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same length (then writes are slices)."""
        return min(self.lengths) == max(self.lengths)

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these tail slots of each row, in this order, as committed; forget the others.

        Args:
            kept: for each row increasing tail indices (0 is the first slot after the committed ones).
        """
        moves = [
            (row, length + slot, length + place)
            for row, (length, slots) in enumerate(zip(self.lengths, kept, strict=True))
            for place, slot in enumerate(slots)
            if slot != place
        ]
        if moves and self._mover is None and all(can_move(layer.keys) for layer in self.layers):
            self._mover = SlotMover([buffer for layer in self.layers for buffer in (layer.keys, layer.values)])
        if moves and self._mover is not None:
            for row, own in groupby(moves, itemgetter(0)):
                _, old, new = zip(*own, strict=True)
                self._mover.move(row, old, new)
        elif moves:
            _move(self.layers, torch.tensor(moves).unbind(1))
        self.lengths = [length + len(slots) for length, slots in zip(self.lengths, kept, strict=True)]
        self.rollback()

    def arrange_tail(self, num_layers: int, sources_BK: Tensor) -> None:
        """Make these old tail slots the new tail of the first layers.

        Args:
            sources_BK: int64 tail indices.
        """
        num_kept = sources_BK.shape[1]
        starts_B1 = torch.tensor(self.lengths, device=sources_BK.device).unsqueeze(1)
        rows_B1 = torch.arange(self.num_rows, device=sources_BK.device).unsqueeze(1)
        targets_BK = starts_B1 + torch.arange(num_kept, device=sources_BK.device)
        _move(self.layers[:num_layers], (rows_B1, starts_B1 + sources_BK, targets_BK))
        self.cut_tail(num_layers, num_kept)

    def cut_tail(self, num_layers: int, num_kept: int) -> None:
        """Forget all but the first slots of the tail of the first layers."""
        for layer in self.layers[:num_layers]:
            layer.tail = num_kept

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget the committed slots of each row past this many, and the tail."""
        self.lengths = list(lengths)
        self.rollback()

    def buffers_change(self) -> None:
        """To be called when a layer gets other buffers."""
        self._mover = None

    def rollback(self) -> None:
        """Forget the tail; also repairs a forward that broke off between two layers."""
        self._slots_memo = None
        for layer in self.layers:
            layer.tail = 0

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tail, and what is committed past these lengths."""
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        self.rollback()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order. Cheapest where few of them change their place."""
        assert self.tail == 0, "rows leave between rounds"
        lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.select_rows(rows, lengths)
        self.lengths = lengths
        self._slots_memo = None

    def join(self, states: RowStates | None = None) -> None:
        """A row more, at the end.

        Args:
            states: what it has committed already (copied); None for nothing.
        """
        assert self.tail == 0, "rows join between rounds"
        self.lengths.append(0)
        self._slots_memo = None
        for layer in self.layers:
            layer.make_room(self.num_rows)
        if states is not None:
            self.write_row(self.num_rows - 1, states)

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room for so many rows of so many slots at once: buffers that grow are copied."""
        for layer in self.layers:
            layer.reserve(num_rows, capacity)

    def write_row(self, row: int, states: RowStates) -> None:
        """Make these a row's committed states (copied); it has none yet."""
        assert self.tail == self.lengths[row] == 0, "the row is empty"
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer.write_row(row, keys, values)
        self.lengths[row] = states[0][0].shape[1]
        self._slots_memo = None

    def clear_row(self, row: int) -> None:
        """Overwrite what a row has left in the buffers: what is no number would reach whoever gets its place."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[row], layer.values[row] = 0, 0

    def part(self, rows: Sequence[int], room: int) -> TreeCache:
        """A cache of these rows alone: copies, with room for so many slots more."""
        assert self.tail == 0, "parts are made between rounds"
        part = TreeCache(len(self.layers), 0)
        part.lengths = [self.lengths[row] for row in rows]
        for own, layer in zip(part.layers, self.layers, strict=True):
            if layer.is_initialized:
                own.copy_rows(layer, rows, room)
        return part

    def take_tail(self, part: TreeCache, rows: Sequence[int]) -> None:
        """Make the tail of a part the tail of its rows; that of all others means nothing."""
        count = part.tail
        for layer, own in zip(self.layers, part.layers, strict=True):
            layer.take_tail(own, rows, count)

    def row_states(self, row: int) -> RowStates:
        """Copies of a row's committed states."""
        return [(keys.clone(), values.clone()) for keys, values in self.row_views(row)]

    def row_views(self, row: int) -> RowStates:
        """A row's committed states, which hold until the next change; a row that never had any has none."""
        length = self.lengths[row]
        return [
            (layer.keys[row, :, :length], layer.values[row, :, :length])
            for layer in self.layers
            if layer.is_initialized
        ]

    def check_integrity(self) -> None:
        """Assert what must hold between rounds."""
        for layer in self.layers:
            assert layer.tail == 0
            if layer.keys is not None:
                assert layer.keys.shape[0] == layer.values.shape[0] >= self.num_rows
                assert layer.keys.shape[2] >= max(self.lengths)

    def slots(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Row and slot indices, each [B, T], of the tail slots start .. start + count - 1 (ragged rows)."""
        key = (start, count)
        if self._slots_memo is None or self._slots_memo[0] != key:
            first_B1 = torch.tensor(self.lengths).unsqueeze(1) + start
            slots_BT = first_B1 + torch.arange(count)
            rows_BT = torch.arange(self.num_rows).unsqueeze(1).expand_as(slots_BT)
            self._slots_memo = (key, (rows_BT, slots_BT))
        return self._slots_memo[1]


class _TreeLayer(CacheLayerMixin):
    """One layer's buffers [R, H, capacity, D], R >= B; the book-keeping of rows is the cache's."""

    is_sliding = False

    def __init__(self, cache: TreeCache, capacity: int):
        super().__init__()
        self._cache = cast(TreeCache, weakref.proxy(cache))  # a cycle would keep the buffers until the next collection
        self._capacity = max(capacity, _MIN_CAPACITY)
        self.tail = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, because a masked slot still enters the weighted sum and 0 * NaN is NaN
        self.keys, self.values = (
            _zeros((*states.shape[:2], self._capacity, states.shape[3]), states)
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        self._cache.buffers_change()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T slots to the tail; returns views of everything written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_rows, _, count, _ = key_states.shape
        stop = self.get_seq_length() + count
        if stop > self._capacity:
            self._resize(len(self.keys), max(stop, self._capacity + self._capacity // 2))
        if self._cache.is_uniform:
            self.keys[:num_rows, :, stop - count : stop] = key_states
            self.values[:num_rows, :, stop - count : stop] = value_states
        else:
            rows_BT, slots_BT = self._cache.slots(self.tail, count)
            self.keys[rows_BT, :, slots_BT] = key_states.transpose(1, 2)
            self.values[rows_BT, :, slots_BT] = value_states.transpose(1, 2)
        self.tail += count
        return self.keys[:num_rows, :, :stop], self.values[:num_rows, :, :stop]

    def _resize(self, num_rows: int, capacity: int) -> None:
        """Larger buffers, with everything that is in these."""
        used = self.get_seq_length()
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _zeros((num_rows, old.shape[1], capacity, old.shape[3]), old)
            new[: len(old), :, :used] = old[:, :, :used]
            setattr(self, name, new)
        self._capacity = capacity
        self._cache.buffers_change()

    def make_room(self, num_rows: int) -> None:
        """For so many rows."""
        self.reserve(num_rows, self._capacity)

    def reserve(self, num_rows: int, capacity: int) -> None:
        capacity = max(capacity, self._capacity)
        if not self.is_initialized:
            self._capacity = capacity
        elif num_rows > len(self.keys) or capacity > self._capacity:
            room = len(self.keys) if num_rows <= len(self.keys) else max(num_rows, 2 * len(self.keys))
            self._resize(room, capacity)

    def write_row(self, row: int, key_states: Tensor, value_states: Tensor) -> None:
        """Fill a row from its first slot on; the states are [H, S, D]."""
        count = key_states.shape[1]
        if not self.is_initialized:
            self._capacity = max(self._capacity, count)
            rows = [states.expand(self._cache.num_rows, -1, -1, -1) for states in (key_states, value_states)]
            self.lazy_initialization(*rows)
        elif count > self._capacity:
            self._resize(len(self.keys), max(count, self._capacity + self._capacity // 2))
        self.keys[row, :, :count], self.values[row, :, :count] = key_states, value_states

    def copy_rows(self, other: _TreeLayer, rows: Sequence[int], room: int) -> None:
        """Begin with these rows of another layer, with room for so many slots more."""
        self._capacity = max(self._cache.lengths) + room
        like = [buffer[:1, :, :1].expand(len(rows), -1, -1, -1) for buffer in (other.keys, other.values)]
        self.lazy_initialization(*like)
        for place, (row, length) in enumerate(zip(rows, self._cache.lengths, strict=True)):
            self.keys[place, :, :length] = other.keys[row, :, :length]
            self.values[place, :, :length] = other.values[row, :, :length]

    def take_tail(self, other: _TreeLayer, rows: Sequence[int], count: int) -> None:
        """Copy what another layer, of these rows alone, has after their committed slots."""
        lengths = self._cache.lengths
        if max(lengths) + count > self._capacity:
            self._resize(len(self.keys), max(max(lengths) + count, self._capacity + self._capacity // 2))
        for place, row in enumerate(rows):
            tail = slice(lengths[row], lengths[row] + count)
            self.keys[row, :, tail] = other.keys[place, :, tail]
            self.values[row, :, tail] = other.values[place, :, tail]
        self.tail = count

    def move(self, rows: Any, sources: Any, targets: Any) -> None:
        """Copy slots; rows, sources and targets index together."""
        for buffer in (self.keys, self.values):
            buffer[rows, :, targets] = buffer[rows, :, sources]

    def select_rows(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep these rows, of these lengths."""
        if not self.is_initialized:
            return
        moves = [(old, new) for new, old in enumerate(rows) if old != new]
        overwritten = {new for _, new in moves}
        # a row may be moved in place if its old place is not taken before its turn
        is_safe = all(old > new or old not in overwritten for old, new in moves)
        longest = max(lengths, default=0)
        has_much_room = self._capacity > _MOST_ROOM * max(longest, _MIN_CAPACITY)
        if not rows:
            self.keys = self.values = None  # type: ignore[assignment]  # as before the first update
            self._capacity, self.is_initialized = _MIN_CAPACITY, False
            self._cache.buffers_change()
        elif is_safe and len(self.keys) <= _MOST_ROOM * len(rows) and not has_much_room:
            for old, new in moves:
                for buffer in (self.keys, self.values):
                    buffer[new, :, : lengths[new]] = buffer[old, :, : lengths[new]]
        else:
            self._capacity = 2 * max(longest, _MIN_CAPACITY) if has_much_room else self._capacity
            rows_B = torch.tensor(rows, device=self.keys.device)
            self.keys, self.values = (
                buffer[:, :, : self._capacity].index_select(0, rows_B) for buffer in (self.keys, self.values)
            )
            self._cache.buffers_change()

    def get_seq_length(self) -> int:
        return max(self._cache.lengths, default=0) + self.tail

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of another tensor's kind. Large ones on the CPU take no memory where nobody writes: short rows beside a
    long one have much of that, and to clear it took as long as many rounds."""
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < _LAZY_BYTES:
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=like.dtype).view(shape)


def _move(layers: Sequence[_TreeLayer], places: Sequence[Tensor]) -> None:
    """Copy slots in layers, which may be on several devices; `places` are rows, sources and targets."""
    by_device: dict[torch.device, Sequence[Tensor]] = {}
    for layer in layers:
        device = layer.keys.device
        if device not in by_device:
            by_device[device] = [place.to(device) for place in places]
        layer.move(*by_device[device])


def beginning(cache: DynamicCache, length: int) -> DynamicCache:
    """A cache of the first `length` slots of another one, which stays as it is. Nothing is copied.

    Args:
        cache: without sliding windows (one made without a configuration): those forget their beginning.
    """
    shorter = DynamicCache()
    if length:
        shorter.layers = [copy.copy(layer) for layer in cache.layers]
        shorter.crop(length - cache.get_seq_length())
    return shorter


def refill(cache: DynamicCache, rows: Sequence[RowStates]) -> None:
    """Give a `DynamicCache` the states of finished rows, as plain decoding would have left them.

    Rows are aligned to the left; a row that finished early is filled with zeros to the longest one's length.

    Args:
        rows: for each row what `TreeCache.row_states` returned.
    """
    cache.reset()
    num_slots = max(keys.shape[1] for keys, _ in (row[0] for row in rows))
    for index in range(len(rows[0])):
        keys, values = (torch.stack([_pad_slots(row[index][part], num_slots) for row in rows]) for part in (0, 1))
        cache.update(keys, values, index)


def _pad_slots(states: Tensor, num_slots: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, num_slots - states.shape[1]))
