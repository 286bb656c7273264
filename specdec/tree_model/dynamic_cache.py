"""A `DynamicCache` of transformers: its beginning, what it has of a row, and what rows leave there.

Shape legend: H heads, S slots, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, count

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, LinearAttentionLayer

from specdec.tree_model.cache import RowStates
from specdec.tree_model.recurrent import refill_states


def beginning(cache: DynamicCache, length: int) -> DynamicCache:
    """A cache of the first `length` slots of another one, which stays as it is. Nothing is copied.

    Args:
        cache: without sliding windows and states (one made without a configuration): those forget their beginning.
    """
    shorter = DynamicCache()
    if length:
        shorter.layers = [copy.copy(layer) for layer in cache.layers]
        shorter.crop(length - cache.get_seq_length())
    return shorter


def only_row(cache: DynamicCache) -> RowStates:
    """What a cache of one row has, as views of it: the opposite of `refill`.

    Args:
        cache: as for `beginning`.
    """
    slots: list[tuple[Tensor, ...]] = []
    for layer in cache.layers:
        indexed = getattr(layer, "indexer_keys", None)
        slots.append((layer.keys[0], layer.values[0], *([] if indexed is None else [indexed])))
    return RowStates(length=cache.get_seq_length(), slots=slots, recurrent=[])


def refill(cache: DynamicCache, rows: Sequence[RowStates]) -> None:
    """Give a `DynamicCache` the states of finished rows, as plain decoding would have left them.

    Rows are aligned to the left; a row that finished early is filled with zeros to the longest one's length.

    Args:
        rows: for each row what `TreeCache.row_states` returned.
    """
    cache.reset()
    num_slots = max(row.length for row in rows)
    kinds = (DummyLayer, LinearAttentionLayer)
    places = [index for index, layer in enumerate(cache.layers) if type(layer) not in kinds]
    by_layer = zip(*(row.slots for row in rows), strict=True)
    for layer, index in zip(by_layer, chain(places, count(len(cache.layers))), strict=False):
        parts = zip(*layer, strict=True)
        keys, values, *indexed = (torch.stack([_pad_slots(states, num_slots) for states in part]) for part in parts)
        cache.update(keys, values, index)
        if indexed:
            cache.update_indexer(indexed[0][:, 0], index)
    with_states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    for layer, *states in zip(with_states, *(row.recurrent for row in rows), strict=True):
        refill_states(layer, states)


def _pad_slots(states: Tensor, num_slots: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, num_slots - states.shape[1]))
