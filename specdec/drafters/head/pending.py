"""What a head has not read yet: committed tokens, each with the target's states at the position before it.

Shape legend: B rows, W pending tokens, X channels of all states of a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.decoding.sequences import Sequences
from specdec.tree_model.model import TreeModel
from trees.uploads import upload


class PendingPairs:
    """The newest tokens of every row; the last of them is the root of its next round.

    Args:
        target: keeps the states of `layers`, which are laid side by side in this order.
    """

    def __init__(self, target: TreeModel, sequences: Sequences, layers: Sequence[int]):
        self._target, self._sequences = target, sequences
        self._layers = layers
        self._states: list[list[Tensor]] = []
        target.keep_states(layers)

    @property
    def sizes(self) -> list[int]:
        """Pending tokens of each row."""
        return [sum(map(len, parts)) for parts in self._states]

    def begin(self) -> list[int]:
        """The target has read the prompts and committed a token each; returns how many states of each row it kept.

        They are those of its last forward: all of a prompt, unless it was read in chunks or begins in a cache.
        """
        width = self._target.states[self._layers[0]].shape[1]
        counts = [max(1, min(width, len(tokens) - 1)) for tokens in self._sequences.tokens]
        for row, count in enumerate(counts):
            self._states.append([self._of_row(row, range(width - count, width))])
        return counts

    def join(self) -> int:
        """Take the row that the target has been given at its end; returns how many of its states are known."""
        states = self._target.joined_states
        parts = [torch.cat([states[layer] for layer in self._layers], -1)] if states else []
        self._states.append(parts)
        return sum(map(len, parts))

    def add(self, slots: Sequence[Sequence[int]]) -> None:
        """The last verification has kept these slots of every row."""
        for row, kept in enumerate(slots):
            self._states[row].append(self._of_row(row, kept))

    def take(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The oldest of them, so many of each row: tokens int64 [B, W] and states [B, W, X]; they are read now."""
        pending = self.sizes
        rows = [torch.cat(parts) if parts else self._nothing() for parts in self._states]
        tokens = [
            self._sequences.prefix(row)[-count:][:size]
            for row, (count, size) in enumerate(zip(pending, sizes, strict=True))
        ]
        taken = [states_WX[:size] for states_WX, size in zip(rows, sizes, strict=True)]
        self._states = [[states_WX[size:]] for states_WX, size in zip(rows, sizes, strict=True)]
        return pad_sequence(tokens, batch_first=True), pad_sequence(taken, batch_first=True)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._states = [self._states[row] for row in rows]

    def _of_row(self, row: int, kept: Sequence[int]) -> Tensor:
        """States [W, X] of these slots of the last forward; a copy, so that it does not keep those of all."""
        parts = [self._target.states[layer][row] for layer in self._layers]
        if not isinstance(kept, range) and kept and kept[-1] == len(kept) - 1:  # slots increase: these are the first
            kept = range(len(kept))
        if isinstance(kept, range):
            return torch.cat([states_TC[kept.start : kept.stop] for states_TC in parts], -1)
        return torch.cat(parts, -1).index_select(0, upload(list(kept), parts[0].device))

    def _nothing(self) -> Tensor:
        known = next(part for parts in self._states for part in parts)
        return known[:0]
