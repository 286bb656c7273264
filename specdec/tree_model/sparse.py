"""A model with a part of another's past: the slots that matter, copied to a small cache of its own.

Keys are stored rotated for their positions, so that slots mean the same wherever they lie, and every model and kernel
reads the small cache as it reads any other. Each layer, and each head of keys, has slots of its own. The cache holds
`budget` slots of a row, and those that have been committed since they were chosen: an eighth more at most, and a draft.

Shape legend: B rows, K heads of keys, S slots, N chosen slots, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.tree_model.cache import RowStates, TreeCache
from specdec.tree_model.layer_views import View
from specdec.tree_model.model import TreeModel
from specdec.tree_model.pages import PagePool
from specdec.tree_model.selection import Queries, most_attended, window

_REFRESHES = 8
"""A row's slots are chosen anew when this part of the budget has been committed."""
_TAIL_ROOM = 32
"""Slots for a draft: more are made where that is not enough."""
_NEVER = -(1 << 40)


class _WatchedCache(TreeCache):
    """A cache that tells whose keys were written last."""

    queries: Queries | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.queries is not None:
            self.queries.updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def watch(self) -> Any:
        """What native layers tell their queries (see `FusedLayer`)."""
        return None if self.queries is None else self.queries.watch


class SparseModel(TreeModel):
    """A model that follows another one of the same layers with at most so many slots of its past.

    Args:
        model: whose layers see all that came before, or a window of it.
        budget: slots of a row.
        by_attention: whether slots are chosen by what the last forwards attended to; else they are the newest.
    """

    def __init__(self, model: PreTrainedModel, budget: int, *, by_attention: bool):
        super().__init__(model)
        self._budget = budget
        self._by_attention = by_attention

    def begin(self, num_rows: int = 0, *, capacity: int = 0, pool: PagePool | None = None) -> None:
        """As of any `TreeModel`, but for pages and more room than the budget needs."""
        super().begin(num_rows)
        capacity = self._budget + self._budget // _REFRESHES + _TAIL_ROOM
        self.cache = _WatchedCache(self.num_layers, num_rows, capacity, **self._layers)
        self._seen = [0] * num_rows
        """Slots of the other model, of each row, that have been looked at."""
        self._chosen_at = [_NEVER] * num_rows
        """How many those were when the row's slots were chosen last."""
        self._queries: Queries | None = None
        """Of the last forwards, if slots are to be chosen by them."""

    def follow(self, other: TreeModel) -> None:
        """Take what the other model has committed since the last time; forget the tail.

        Queries of the forwards that come are kept if by the next time slots are due to be chosen by them.
        """
        self.forget_tail()
        for row, length in enumerate(other.cache.lengths):
            if length:
                self._follow_row(row, other, length)
        self._lag_AB = self.cache.lengths_on(self.device) - other.next_positions_AB
        is_due = self._by_attention and any(map(self._is_due, range(len(self._seen))))
        self._queries = Queries() if is_due else None
        assert isinstance(self.cache, _WatchedCache)
        self.cache.queries = self._queries

    def _run(self, view: View, inputs: dict[str, Any], *, num_logits: int = 0) -> Any:
        with nullcontext() if self._queries is None or self._is_fused else self._queries:  # fused layers tell theirs
            return super()._run(view, inputs, num_logits=num_logits)

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self._seen = [self._seen[row] for row in rows]
        self._chosen_at = [self._chosen_at[row] for row in rows]
        if self._queries is not None:
            self._queries.select_rows(rows)

    def join(self, states: RowStates | None = None, hidden: dict[int, Tensor] | None = None) -> None:
        super().join(states, hidden)
        self._seen.append(0)
        self._chosen_at.append(_NEVER)

    @property
    def _chooses_now(self) -> bool:
        return self._queries is not None or not self._by_attention

    def _is_due(self, row: int) -> bool:
        """Whether slots have to be chosen anew."""
        return self._seen[row] - self._chosen_at[row] >= self._budget // _REFRESHES

    def _follow_row(self, row: int, other: TreeModel, length: int) -> None:
        states, seen = other.cache.row_views(row), self._seen[row]
        self._seen[row] = length
        if not seen or (self._chooses_now and self._is_due(row)):
            self._choose(row, states, other.visible_slots(row))
        elif length > seen:
            slots = [states.layer(place, seen) for place in range(len(self.cache.stored))]
            self.cache.append_row(row, RowStates(length=length - seen, slots=slots, recurrent=[]))

    def _choose(self, row: int, states: RowStates, slots_S: Tensor) -> None:
        """Fill the row with the slots that are chosen now."""
        count = min(self._budget, len(slots_S))
        self.cache.truncate_committed([0 if other == row else kept for other, kept in enumerate(self.cache.lengths)])
        slots = []
        for place, index in enumerate(self.cache.stored):
            parts = states.layer(place)
            chosen = self._slots_of_layer(index, row, slots_S, count, parts[0])
            slots.append(tuple(_gather(part, chosen.to(part.device)) for part in parts))
        self.cache.append_row(row, RowStates(length=count, slots=slots, recurrent=[]))
        self._chosen_at[row] = self._seen[row] if self._chooses_now else _NEVER

    def _slots_of_layer(self, index: int, row: int, slots_S: Tensor, count: int, key_KSD: Tensor) -> Tensor:
        """int64 [N] or [K, N]."""
        kind = self.kinds[index]
        if kind is not None and kind.reach is not None:  # side by side: its mask counts slots
            return slots_S[-count:]
        query_KQD = None if self._queries is None else self._queries.of_row(index, row, len(key_KSD))
        if query_KQD is None or count == len(slots_S) or query_KQD.shape[-1] != key_KSD.shape[-1]:
            return window(slots_S, count)
        slots_S = slots_S.to(key_KSD.device)
        if len(slots_S) < key_KSD.shape[1]:
            key_KSD = key_KSD[:, slots_S]
        return most_attended(slots_S, count, query_KQD.to(key_KSD.device), key_KSD)


def _gather(part_KSD: Tensor, chosen: Tensor) -> Tensor:
    """[K, N, D] the chosen slots, [N] or [K, N]."""
    if chosen.dim() == 1:
        return part_KSD[:, chosen]
    return torch.stack([part_SD.index_select(0, chosen_N) for part_SD, chosen_N in zip(part_KSD, chosen, strict=True)])
