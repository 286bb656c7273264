"""Verification of trees of which some layers have forwarded some slots already.

While a model drafts for itself from an early exit, its lower layers process one draft layer after the other: their
cache tail holds the root and then the drafted nodes in the order of drafting (`Draft.grown_indices`). The upper layers
then process root and nodes at once. This module says in which order: slots that the lower layers know first, then the
rest, which has to pass the lower layers before.

Shape legend: B rows, T slots of the trees, S slots in the order of the tail, K of these that the lower layers have
forwarded, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trees import TreeBatch
from trees.uploads import upload


@dataclass(frozen=True, kw_only=True, eq=False)
class TailOrder:
    """How the slots of a batch of trees stand in the cache's tail.

    Args:
        slots_BS: int64 slot of the tree at each index of the new tail; a row with fewer slots than others repeats its
            root.
        real_BS: bool: False where the root is repeated.
        sources_BK: int64 index in the old tail of each of the first K.
        tail_indices_BT: int64 index in the new tail of every slot (the root's for padding).
        tail_indices: the same on the host.
        is_plain: slot i stands at index i, and the old tail needs no change but a cut.
    """

    slots_BS: Tensor
    real_BS: Tensor
    sources_BK: Tensor
    tail_indices_BT: Tensor
    tail_indices: np.ndarray | None
    is_plain: bool

    @property
    def num_forwarded(self) -> int:
        """K."""
        return self.sources_BK.shape[1]

    def arrange(self, values_BTX: Tensor) -> Tensor:
        """Values of slots in the order of the tail: [B, T, ...] -> [B, S, ...]."""
        return values_BTX if self.is_plain else _gather(values_BTX, self.slots_BS)

    def arrange_mask(self, seen_BTT: Tensor) -> Tensor:
        """`ancestors_BTT` in the order of the tail."""
        if self.is_plain:
            return seen_BTT
        seen_BST = self.arrange(seen_BTT)
        seen_BSS = seen_BST.gather(2, self.slots_BS.unsqueeze(1).expand(-1, seen_BST.shape[1], -1))
        own_BSS = torch.eye(self.slots_BS.shape[1], dtype=torch.bool, device=seen_BSS.device)
        return (seen_BSS & self.real_BS.unsqueeze(1)) | own_BSS

    def restore(self, values_BSX: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return values_BSX if self.is_plain else _gather(values_BSX, self.tail_indices_BT)

    def restore_states(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """The same of states by their depth, of all at once."""
        return states if self.is_plain else _gather_states(states, self.tail_indices_BT)


class PartialForward:
    """What the lower layers have forwarded in a round: the hidden states of its slots."""

    def __init__(self, exit_layer: int):
        self.exit_layer = exit_layer
        self._parts: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def num_slots(self) -> int:
        return sum(part.shape[1] for part in self._parts[self.exit_layer])

    def add(self, states: dict[int, Tensor]) -> None:
        for depth, part_BTC in states.items():
            self._parts[depth].append(part_BTC)

    def states(self) -> dict[int, Tensor]:
        """number of layers -> [B, K, C]."""
        whole = torch.cat([part_BTC for parts in self._parts.values() for part_BTC in parts], 1)
        return dict(zip(self._parts, whole.split(self.num_slots, 1), strict=True))

    def arrange(self, sources_BK: Tensor) -> None:
        arranged = _gather_states(self.states(), sources_BK)
        self._parts = defaultdict(list, {depth: [states_BKC] for depth, states_BKC in arranged.items()})


def tail_order(trees: TreeBatch, grown_indices: Sequence[Sequence[int]] | None, num_forwarded: int) -> TailOrder:
    """Where the slots of these trees go.

    Args:
        grown_indices: of every node (see `trees.Draft`), -1 for one that has none.
        num_forwarded: tail slots that the lower layers have forwarded: the root, then nodes as they were grown.
    """
    device = trees.device
    if grown_indices is None:
        num_known = min(num_forwarded, trees.num_slots)
        slots_BS = torch.arange(trees.num_slots, device=device).expand(trees.num_rows, -1)
        return TailOrder(
            slots_BS=slots_BS,
            real_BS=trees.real_BT,
            sources_BK=slots_BS[:, :num_known],
            tail_indices_BT=slots_BS,
            tail_indices=None,
            is_plain=True,
        )
    known, rest = [], []
    for indices in grown_indices:
        tail = [0, *(index + 1 if 0 <= index < num_forwarded - 1 else -1 for index in indices)]
        known.append([(slot, index) for slot, index in enumerate(tail) if index >= 0])
        rest.append([slot for slot, index in enumerate(tail) if index < 0])
    num_known, num_rest = max(map(len, known)), max(map(len, rest))
    slots = np.zeros((len(known), num_known + num_rest), np.int64)
    sources, real = np.zeros((len(known), num_known), np.int64), np.zeros(slots.shape, bool)
    tail_indices = np.zeros((len(known), max(len(k) + len(r) for k, r in zip(known, rest, strict=True))), np.int64)
    for row, (known_slots, new_slots) in enumerate(zip(known, rest, strict=True)):
        slots[row, : len(known_slots)], sources[row, : len(known_slots)] = zip(*known_slots, strict=True)
        slots[row, num_known : num_known + len(new_slots)] = new_slots
        real[row, : len(known_slots)] = real[row, num_known : num_known + len(new_slots)] = True
        (places,) = np.nonzero(real[row])
        tail_indices[row, slots[row, places]] = places
    numbers = upload(np.concatenate([slots, sources, tail_indices], 1), device)
    slots_BS, sources_BK, tail_indices_BT = numbers.split([slots.shape[1], num_known, tail_indices.shape[1]], 1)
    return TailOrder(
        slots_BS=slots_BS,
        real_BS=upload(real, device),
        sources_BK=sources_BK,
        tail_indices_BT=tail_indices_BT,
        tail_indices=tail_indices,
        is_plain=False,
    )


def _gather(values_BTX: Tensor, index_BS: Tensor) -> Tensor:
    """Index the second dimension row by row."""
    rows_B1 = torch.arange(len(index_BS), device=index_BS.device).unsqueeze(1)
    return values_BTX[rows_B1, index_BS]


def _gather_states(states: dict[int, Tensor], index_BS: Tensor) -> dict[int, Tensor]:
    gathered_BSDC = _gather(torch.stack(list(states.values()), 2), index_BS)
    return dict(zip(states, gathered_BSDC.unbind(2), strict=True))
