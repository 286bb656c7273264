"""Which slots of the past are worth looking at: the first ones (attention sinks), the newest, and those that the newest
tokens attend to most.

The scores are those of TokenSelect (Wu et al. 2025) and H2O (Zhang et al. 2023) with full softmax weights: of each
query head over the whole past, summed over some queries and over the query heads that share a head of keys. What is
chosen is chosen for each layer and each head of keys.

Shape legend: B rows, T tokens, H query heads, K heads of keys, Q queries of one of those, S slots, N chosen slots,
D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SINKS = 4
"""First tokens, which take the attention that is of no use elsewhere (Xiao et al. 2023)."""
_SINK_SHARE = _RECENT_SHARE = 4
"""Of a budget a fourth at most is sinks, and a fourth is the newest slots whatever their scores."""
_MOST_FORWARDS = 2
"""Whose queries are asked: those of the root, and of the tokens after it."""


class Queries(TorchFunctionMode):
    """Rotated queries of the forwards within, by layer.

    Native layers tell theirs (`FusedLayer`); others are seen calling torch's `scaled_dot_product_attention`. Layers
    that do neither, as with eager attention, have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._scales: dict[int, float | None] = {}
        self.updated: int | None = None
        """The layer whose keys were written last, until its queries are seen."""

    def watch(self, index: int, query_BHTD: Tensor, scale: float | None) -> None:
        """A layer is about to attend with these; H and T may be those of packed queries, [B, K, H / K * T, D]."""
        self.updated = None
        if len(self._kept[index]) < _MOST_FORWARDS:
            self._kept[index].append(query_BHTD.detach())
            self._scales[index] = scale

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.updated is not None:
            self.watch(self.updated, args[0] if args else named["query"], named.get("scale"))
        return func(*args, **named)

    def of_row(self, index: int, row: int, num_heads: int) -> Tensor | None:
        """[K, Q, D], scaled; None if there are none of the layer, or of a row that was not there."""
        kept = self._kept.get(index)
        if not kept or row >= len(kept[0]):
            return None
        size = kept[0].shape[-1]
        query_KQD = torch.cat([query_BHTD[row].reshape(num_heads, -1, size) for query_BHTD in kept], 1).float()
        scale = self._scales[index]
        return query_KQD * (size**-0.5 if scale is None else scale)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        for index, kept in self._kept.items():
            self._kept[index] = [query_BHTD[list(rows)] for query_BHTD in kept]


def window(slots_S: Tensor, count: int) -> Tensor:
    """int64 [N]: the first slots and the newest.

    Args:
        slots_S: int64 the slots that there are, in order; N of them at least.
        count: N.
    """
    num_sinks = min(_SINKS, count // _SINK_SHARE)
    return torch.cat([slots_S[:num_sinks], slots_S[len(slots_S) - count + num_sinks :]])


def most_attended(slots_S: Tensor, count: int, query_KQD: Tensor, key_KSD: Tensor) -> Tensor:
    """int64 [K, N]: sinks, the newest slots, and of all others those that the queries attend to most.

    Args:
        slots_S: int64 the slots that there are, in order; more than `count`.
        query_KQD: scaled.
        key_KSD: of these slots, in their order.
    """
    weights_KS = (query_KQD @ key_KSD.float().transpose(1, 2)).softmax(-1).sum(1)
    num_sinks, num_recent = min(_SINKS, count // _SINK_SHARE), count // _RECENT_SHARE
    weights_KS[:, :num_sinks] = weights_KS[:, weights_KS.shape[1] - num_recent :] = torch.inf
    return slots_S[weights_KS.topk(count, sorted=False).indices.sort().values]
