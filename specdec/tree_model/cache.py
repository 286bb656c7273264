"""The cache of a tree-decoding model. Its layers are in `tree_layer.py` and `recurrent.py`; with `dynamic_cache.py`, no
others touch HF's.

Every row owns the slots `0 .. lengths[row] - 1`, without gaps between its committed tokens (padding to the left
of a prompt included). After them comes the *tail*: the speculative slots that forwards wrote since the last
commit, at `lengths[row] + 0, + 1, ...`. `commit` keeps a path through the tail and forgets the rest; `rollback`
forgets it all. Buffers on a CPU have room for tens of thousands of slots, which take memory as they are written;
beyond, and elsewhere, buffers grow by half of their size, so a generation of n tokens copies O(n). Rows join at the
end and leave anywhere; buffers have room for more rows than there are, so that neither copies more than the rows that
move.

All positions are kept, in sliding-window layers too: there the mask hides what has left the window.

Shape legend: B rows, H heads, S slots, T new slots, D head size.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer

from specdec.errors import UnsupportedOptionError
from specdec.kernels.model.layer_run import NewSlots
from specdec.kernels.trees.cache_slots import SlotMover, can_move
from specdec.tree_model.buffers import Addresses, addresses_of, arrange_slots
from specdec.tree_model.recurrent import StateLayer, States, StateTreeLayer, TreeStates
from specdec.tree_model.tree_layer import MIN_CAPACITY, TreeLayer
from trees.uploads import upload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStates:
    """What one row has committed.

    Args:
        length: number of its slots.
        slots: keys and values (and keys of an indexer), each [H, S, D], of every layer that stores some.
        recurrent: the states of every layer that has such, without a dimension of rows.
    """

    length: int
    slots: list[tuple[Tensor, ...]]
    recurrent: list[States]

    def layer(self, index: int, start: int = 0) -> tuple[Tensor, ...]:
        """What a layer holds of the slots from `start` on, each [H, S, D]; the layers that store some are counted."""
        return tuple(part[:, start:] for part in self.slots[index])

    def part(self, start: int, stop: int) -> RowStates:
        """Those of some slots, without recurrent states; copied."""
        slots = [tuple(kept[:, start:stop].clone() for kept in layer) for layer in self.slots]
        return RowStates(length=stop - start, slots=slots, recurrent=[])


class Point(NamedTuple):
    """What rows had committed: so many slots, and the states of every layer that has such."""

    lengths: Sequence[int]
    states: Sequence[States]


class TreeCache(Cache):
    """KV of B rows with lengths of their own and a common speculative tail.

    Args:
        num_layers: number of decoder layers.
        num_rows: B.
        capacity: slots to allocate at the start; more are allocated when needed.
        without: layers that have no keys and values.
        recurrent: index -> number of states, of layers that have such.

    Attributes:
        stored: index -> layer, of those that have keys and values.
        states: of recurrent layers; None if there is no such layer.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        capacity: int = MIN_CAPACITY,
        *,
        without: Collection[int] = frozenset(),
        recurrent: Mapping[int, int] | None = None,
    ):
        self.lengths = [0] * num_rows
        self._lengths_memo: dict[torch.device, tuple[tuple[int, ...], Tensor]] = {}
        self._slots_memo: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._mover: SlotMover | None = None
        self._addresses: dict[tuple[int, ...], Addresses | None] = {}
        self.without, self.recurrent = frozenset(without), recurrent or {}
        layers = [self._new_layer(index, capacity) for index in range(num_layers)]
        super().__init__(layers=layers)
        self.stored = {index: layer for index, layer in enumerate(layers) if isinstance(layer, TreeLayer)}
        with_states = {index: layer for index, layer in enumerate(layers) if isinstance(layer, StateLayer)}
        self.states = TreeStates(with_states, num_rows) if with_states else None

    def _new_layer(self, index: int, capacity: int) -> TreeLayer | StateLayer | DummyLayer:
        num_states = self.recurrent.get(index)
        if index in self.without:
            return StateLayer(num_states) if num_states else DummyLayer()
        return StateTreeLayer(self, capacity, num_states) if num_states else TreeLayer(self, capacity)

    def filled_from(self, cache: DynamicCache) -> Self:
        """This cache, which is empty, with a copy of what a `DynamicCache` holds (that stays as it is).

        Raises:
            UnsupportedOptionError: the cache has another batch size.
        """
        length = cache.get_seq_length() if self.states is None else self.states.adopt(cache)
        if length == 0:
            return self
        for index, layer in self.stored.items():
            source = cache.layers[index]
            keys, values = source.keys, source.values
            if keys.shape[0] != self.num_rows:
                raise UnsupportedOptionError(
                    f"the cache holds {keys.shape[0]} rows but the input has {self.num_rows}: "
                    "pass a cache of the same batch size, or none"
                )
            # a window that has already forgotten its first slots never shows them again
            forgotten = (0, 0, length - keys.shape[-2], 0)
            layer.update(torch.nn.functional.pad(keys, forgotten), torch.nn.functional.pad(values, forgotten))
            if getattr(source, "indexer_keys", None) is not None:
                layer.update_indexer(source.indexer_keys)
        self.commit([range(length)] * self.num_rows)
        return self

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def tail(self) -> int:
        """Number of speculative slots that every layer holds."""
        if not self.stored:
            return 0 if self.states is None else self.states.tail
        return min(layer.tail for layer in self.stored.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots of the longest row, the tail of the layers that are furthest included (lower ones may run ahead)."""
        tail = max((layer.tail for layer in self.stored.values()), default=self.tail)
        return max(self.lengths, default=0) + tail

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same length (then writes are slices)."""
        return min(self.lengths) == max(self.lengths)

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these tail slots of each row, in this order, as committed; forget the others.

        Args:
            kept: for each row increasing tail indices (0 is the first slot after the committed ones).
        """
        lengths = [length + len(slots) for length, slots in zip(self.lengths, kept, strict=True)]
        if any(slot != place for slots in kept for place, slot in enumerate(slots)):
            self._bring_forward(kept, lengths)
        self.lengths = lengths
        if self.states is not None:
            self.states.commit(kept)
        self.rollback()

    def _bring_forward(self, kept: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Make these the first slots of the tail.

        Args:
            lengths: of the rows, once that is committed.
        """
        layers = list(self.stored.values())
        if self._mover is None and all(can_move(layer.keys) for layer in layers):
            self._mover = SlotMover([buffer for layer in layers for buffer in layer.buffers])
        if self._mover is None:
            device, longest = layers[0].keys.device, max(map(len, kept))
            # past the end of a row that keeps fewer, slots stay where they are
            sources = [[*slots, *range(len(slots), longest)] for slots in kept]
            numbers = upload([lengths, *zip(*sources, strict=True)], device)  # one copy for both
            self._arrange(layers, numbers[1:].t())
            self._lengths_memo[device] = tuple(lengths), numbers[0]
            return
        for row, (length, slots) in enumerate(zip(self.lengths, kept, strict=True)):
            moves = [(length + slot, length + place) for place, slot in enumerate(slots) if slot != place]
            if moves:
                self._mover.move(row, *zip(*moves, strict=True))

    def _arrange(self, layers: Sequence[TreeLayer], sources_BK: Tensor) -> None:
        """Make old tail slots the first ones of the tail of some layers, which may be on several devices."""
        buffers: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for layer in layers:
            buffers[layer.keys.device] += layer.buffers
        for device, own in buffers.items():
            arrange_slots(own, self.lengths_on(device), sources_BK.to(device))

    def arrange_tail(self, num_layers: int, sources_BK: Tensor) -> None:
        """Make these old tail slots the new tail of the first layers.

        Args:
            sources_BK: int64 tail indices.
        """
        self._arrange(self.stored_in(0, num_layers), sources_BK)
        self.cut_tail(num_layers, sources_BK.shape[1])

    def cut_tail(self, num_layers: int, num_kept: int) -> None:
        """Forget all but the first slots of the tail of the first layers."""
        for layer in self.stored_in(0, num_layers):
            layer.tail = num_kept

    def stored_in(self, start: int, stop: int | None) -> list[TreeLayer]:
        """Those of the model's layers from `start` on and before `stop` that have keys and values."""
        numbers = range(len(self.layers))[start:stop]
        return [layer for index, layer in self.stored.items() if index in numbers]

    def buffers_change(self) -> None:
        """To be called when a layer gets other buffers."""
        self._mover = None
        self._addresses.clear()

    def append_slots(self, layers: tuple[int, ...], num_new: int) -> NewSlots | None:
        """More slots at the end of the tail of some layers, which the caller writes.

        Returns:
            None where the layers' buffers are not alike, or no float32 on the CPU; nothing has changed then.
        """
        if self._addresses_of(layers) is None or len({self.stored[index].tail for index in layers}) > 1:
            return None
        for index in layers:
            self.stored[index].append(num_new)
        found = self._addresses_of(layers)  # there may be other buffers now
        assert found is not None, "layers that are alike grow alike"
        first = self.stored[layers[0]]
        firsts = (ctypes.c_int64 * self.num_rows)(*[length + first.tail - num_new for length in self.lengths])
        return NewSlots(found.keys, found.values, found.strides, firsts, first.get_seq_length())

    def _addresses_of(self, layers: tuple[int, ...]) -> Addresses | None:
        if layers not in self._addresses:
            self._addresses[layers] = addresses_of([self.stored.get(index) for index in layers])
        return self._addresses[layers]

    def rollback(self) -> None:
        """Forget the tail; also repairs a forward that broke off between two layers."""
        self._slots_memo.clear()
        for layer in self.stored.values():
            layer.tail = 0
        if self.states is not None:
            self.states.rollback()

    def point(self) -> Point:
        """What is committed now, to return to."""
        return Point(tuple(self.lengths), () if self.states is None else self.states.point())

    def return_to(self, point: Point) -> None:
        """Forget the tail, and what has been committed since; rows have neither come nor gone."""
        if self.states is not None:
            self.states.return_to(point.states)
        self.lengths = list(point.lengths)
        self.rollback()

    def truncate_committed(self, lengths: Sequence[int]) -> None:
        """Forget the tail, and what is committed past these lengths. Rows with states keep all or nothing."""
        shorter = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        if self.states is not None:
            self.states.truncate_committed(self.lengths, shorter)
        self.lengths = shorter
        self.rollback()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order. Cheapest where few of them change their place."""
        assert self.tail == 0, "rows leave between rounds"
        lengths = [self.lengths[row] for row in rows]
        for layer in self.stored.values():
            layer.select_rows(rows, lengths)
        if self.states is not None:
            self.states.select_rows(rows)
        self.lengths = lengths
        self._slots_memo.clear()

    def join(self, states: RowStates | None = None) -> None:
        """A row more, at the end.

        Args:
            states: what it has committed already (copied); None for nothing.
        """
        assert self.tail == 0, "rows join between rounds"
        self.lengths.append(0)
        self._slots_memo.clear()
        for layer in self.stored.values():
            layer.make_room(self.num_rows)
        if self.states is not None:
            self.states.join()
        if states is not None:
            self.write_row(self.num_rows - 1, states)

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room for so many rows of so many slots at once: buffers that grow are copied."""
        for layer in self.stored.values():
            layer.reserve(num_rows, capacity)

    def write_row(self, row: int, states: RowStates) -> None:
        """Make these a row's committed states (copied); it has none yet."""
        assert self.lengths[row] == 0, "the row is empty"
        self.append_row(row, states)
        if self.states is not None:
            self.states.write_row(row, states.recurrent)

    def append_row(self, row: int, states: RowStates) -> None:
        """Commit these slots (copied) after those that a row has; states of recurrences stay as they are."""
        assert self.tail == 0, "slots are appended between rounds"
        for layer, slots in zip(self.stored.values(), states.slots, strict=True):
            layer.write_row(row, slots, self.lengths[row])
        self.lengths[row] += states.length
        self._slots_memo.clear()

    def clear_row(self, row: int) -> None:
        """Overwrite what a row has left in the buffers: a NaN would leak, through 0 * NaN, into the next."""
        for layer in self.stored.values():
            layer.clear_row(row)
        if self.states is not None:
            self.states.write_row(row, None)

    def row_subset(self, rows: Sequence[int], room: int) -> TreeCache:
        """A cache of these rows alone: copies, with room for so many slots more."""
        assert self.tail == 0, "parts are made between rounds"
        assert self.states is None, "parts are made of keys and values"
        part = TreeCache(len(self.layers), 0, without=self.without)
        part.lengths = [self.lengths[row] for row in rows]
        for own, layer in zip(part.stored.values(), self.stored.values(), strict=True):
            if layer.is_initialized:
                own.copy_rows(layer, rows, room)
        return part

    def take_tail(self, part: TreeCache, rows: Sequence[int]) -> None:
        """Make the tail of a part the tail of its rows; that of all others means nothing."""
        count = part.tail
        for layer, own in zip(self.stored.values(), part.stored.values(), strict=True):
            layer.take_tail(own, rows, count)

    def row_states(self, row: int) -> RowStates:
        """Copies of a row's committed states."""
        views = self.row_views(row)
        return replace(views, slots=[tuple(part.clone() for part in layer) for layer in views.slots])

    def row_views(self, row: int) -> RowStates:
        """A row's committed states, which hold until the next change; a row that never had any has none."""
        length = self.lengths[row]
        slots = [
            tuple(buffer[row, :, :length] for buffer in layer.buffers)
            for layer in self.stored.values()
            if layer.is_initialized
        ]
        return RowStates(length=length, slots=slots, recurrent=[] if self.states is None else self.states.row(row))

    def check_integrity(self) -> None:
        """Assert what must hold between rounds."""
        for layer in self.stored.values():
            assert layer.tail == 0
            for buffer in layer.buffers:
                assert buffer.shape[0] == len(layer.keys) >= self.num_rows
                assert buffer.shape[2] >= max(self.lengths)
        if self.states is not None:
            self.states.check_integrity(self.num_rows)

    def lengths_on(self, device: torch.device) -> Tensor:
        """int64 [B] `lengths` on a device, where they are copied once after every change."""
        now, known = tuple(self.lengths), self._lengths_memo.get(device)
        if known is None or known[0] != now:
            known = self._lengths_memo[device] = now, upload(now, device)
        return known[1]

    def slots(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and slot indices, each [B, T], of the tail slots start .. start + count - 1 (ragged rows)."""
        key = (start, count, device)
        if key not in self._slots_memo:
            slots_BT = self.lengths_on(device).unsqueeze(1) + torch.arange(start, start + count, device=device)
            rows_BT = torch.arange(self.num_rows, device=device).unsqueeze(1).expand_as(slots_BT)
            self._slots_memo[key] = (rows_BT, slots_BT)
        return self._slots_memo[key]
