"""Nodes of a forward, level by level: in which order a recurrent layer takes them, and whose state each goes on from.

A level's nodes have their parents in earlier levels, so that all of them can be stepped at once, those of all rows
together. A chain has as many levels as nodes.

Shape legend: B rows, T new slots, K tail slots (old and new), N nodes of a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

COMMITTED = -1
"""In the place of a level's number: the states that rows have committed."""

Place: TypeAlias = tuple[int, int]
"""Where a state is: the level's number, and the node's index in it (or the row's)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """Nodes that are stepped at once.

    Args:
        number: of the level in its round.
        rows, slots: of each node, among the forward's new slots.
        sources: where the states are that the nodes go on from.
        shape: B and T of the forward.
    """

    number: int
    rows: Sequence[int]
    slots: Sequence[int]
    sources: Sequence[Place]
    shape: tuple[int, int]

    @cached_property
    def _column(self) -> int | None:
        """The slot, if it is the same of all rows in order: then nothing needs to be gathered."""
        is_column = len(set(self.slots)) == 1 and list(self.rows) == list(range(self.shape[0]))
        return self.slots[0] if is_column else None

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.rows), torch.tensor(self.slots)

    def take(self, value: Any) -> Any:
        """The nodes' part [N, 1, ...] of tensors [B, T, ...] or [1, T, ...], in containers too; all else as it is."""
        if isinstance(value, Tensor):
            return self._take(value) if value.shape[:2] in (self.shape, (1, self.shape[1])) else value
        if isinstance(value, dict):
            return {name: self.take(part) for name, part in value.items()}
        return type(value)(map(self.take, value)) if type(value) in (tuple, list) else value

    def _take(self, value: Tensor) -> Tensor:
        value = value.expand(self.shape[0], *value.shape[1:])
        if self._column is not None:
            return value[:, self._column : self._column + 1]
        rows_N, slots_N = self._index
        return value[rows_N.to(value.device), slots_N.to(value.device)].unsqueeze(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The levels of a forward.

    Args:
        levels: in order; every slot of every row is in one of them.
        shape: B and T of the forward.
    """

    levels: Sequence[Level]
    shape: tuple[int, int]

    @cached_property
    def together(self) -> Level:
        """All nodes as one level, in order, as if each went on from its row's committed state."""
        rows = [row for level in self.levels for row in level.rows]
        slots = [slot for level in self.levels for slot in level.slots]
        return Level(number=0, rows=rows, slots=slots, sources=[(COMMITTED, row) for row in rows], shape=self.shape)

    @cached_property
    def _order(self) -> Tensor | None:
        """int64 [B * T] where each slot is in the levels laid end to end; None if they are columns."""
        if all(level._column == number for number, level in enumerate(self.levels)):
            return None
        nodes = [
            row * self.shape[1] + slot for each in self.levels for row, slot in zip(each.rows, each.slots, strict=True)
        ]
        return torch.tensor(nodes).argsort()

    def merge(self, parts: Sequence[Any]) -> Any:
        """Undoes `Level.take`: what each level gave, as [B, T, ...]. What is no node's is the last level's."""
        first = parts[0]
        if type(first) is tuple:
            return tuple(self.merge(each) for each in zip(*parts, strict=True))
        pairs = list(zip(parts, self.levels, strict=True))
        if not all(isinstance(part, Tensor) and part.shape[:2] == (len(each.rows), 1) for part, each in pairs):
            return parts[-1]
        if self._order is None:
            return torch.cat(list(parts), 1)
        flat = torch.cat(list(parts))[:, 0]
        return flat[self._order.to(flat.device)].unflatten(0, self.shape)


def schedule(seen_BTK: Tensor | None, places: Sequence[list[Place]], num_new: int, first: int) -> Schedule:
    """In which order new slots are stepped.

    Args:
        seen_BTK: bool: which tail slots, old and new, each new slot sees: itself and its ancestors, which stand before
            it. None says that there is one new slot and that it sees all.
        places: of each row's old tail slots; those of the new ones are added.
        num_new: T.
        first: number of the first level.
    """
    nodes: defaultdict[int, list[tuple[int, int, Place]]] = defaultdict(list)
    depths: list[list[int]] = [[] for _ in places]
    parents = _parents(seen_BTK, len(places), len(places[0]) if places else 0)
    olds = [len(row) for row in places]
    for slot in range(num_new):
        for row, known in enumerate(places):
            parent = parents[row][slot]
            depth = depths[row][parent - olds[row]] + 1 if parent >= olds[row] else 0
            depths[row].append(depth)
            nodes[depth].append((row, slot, (COMMITTED, row) if parent < 0 else known[parent]))
            known.append((first + depth, len(nodes[depth]) - 1))
    shape = len(places), num_new
    levels = [_level(first + depth, nodes[depth], shape) for depth in sorted(nodes)]
    return Schedule(levels=levels, shape=shape)


def _level(number: int, nodes: Sequence[tuple[int, int, Place]], shape: tuple[int, int]) -> Level:
    rows, slots, sources = zip(*nodes, strict=True)
    return Level(number=number, rows=rows, slots=slots, sources=sources, shape=shape)


def _parents(seen_BTK: Tensor | None, num_rows: int, num_old: int) -> list[list[int]]:
    """The tail slot that each new slot hangs on: the last one that it sees before itself; -1 for none."""
    if seen_BTK is None:
        return [[num_old - 1]] * num_rows
    num_new, num_tail = seen_BTK.shape[1:]
    before_BTK = seen_BTK.cpu().tril(num_tail - num_new - 1)
    index_K = torch.arange(1, num_tail + 1)
    parents: list[list[int]] = ((before_BTK * index_K).amax(2) - 1).tolist()
    return parents


def gather(states: Mapping[int, Tensor], sources: Sequence[Place]) -> Tensor:
    """What is at these places, [N, ...]: the tensor itself where it is asked for as it is, else a copy.

    Args:
        states: number of a level -> the states of its nodes.
    """
    numbers, index = zip(*sources, strict=True)
    if len(set(numbers)) == 1:
        whole = states[numbers[0]]
        if list(index) == list(range(len(whole))):
            return whole
        return whole.index_select(0, torch.tensor(index, device=whole.device))
    return torch.stack([states[number][place] for number, place in sources])
