"""What goes into a packed forward: the trees of all rows, or the next tokens of a prompt, one row after the other.

Shape legend: B rows, T slots of a row, R slots of all rows, S slots of a row with those before, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.model.packed import PackedLayers, Text
from specdec.tree_model.pages import PagedCache
from trees import Ragged, TreeBatch


class Packed(NamedTuple):
    """Tokens of several rows, int64 [R], their positions, and the rows; nothing is padded."""

    tokens: list[np.ndarray]
    positions: list[np.ndarray]
    texts: list[Text]

    @property
    def sizes(self) -> list[int]:
        return [text.num_tokens for text in self.texts]

    def followed_by(self, other: Packed) -> Packed:
        """These rows, then those of another cache."""
        return Packed(self.tokens + other.tokens, self.positions + other.positions, self.texts + other.texts)


def pack_trees(cache: PagedCache, trees: TreeBatch, roots_B1: Tensor) -> Packed:
    """The root and the nodes of every tree; they become the tail of their rows."""
    packed = Packed([], [], [])
    slots_BT = torch.cat([roots_B1, trees.tokens_BN], 1).numpy()
    for row, size in enumerate(trees.sizes):
        length, count = cache.lengths[row], 1 + size
        pages, places = cache.append(row, count)
        visible_TS = None if trees.is_chain else _visible(trees.host_ancestors_BTT[row, :count, :count], length)
        packed.tokens.append(slots_BT[row, :count])
        packed.positions.append(length + trees.host_depths_BT[row, :count])
        packed.texts.append(Text(count, length + count, pages, places, visible_TS))
    return packed


def pack_tokens(cache: PagedCache, tokens_BT: Tensor) -> Packed:
    """As many more tokens of every row."""
    packed, count = Packed([], [], []), tokens_BT.shape[1]
    for row, tokens_T in enumerate(tokens_BT.numpy()):
        length = cache.lengths[row]
        packed.tokens.append(tokens_T)
        packed.positions.append(np.arange(length, length + count))
        packed.texts.append(Text(count, length + count, *cache.append(row, count)))
    return packed


def run_packed(
    layers: PackedLayers, packed: Packed, sizes: Sequence[int], depths: Collection[int]
) -> tuple[Ragged | None, dict[int, Tensor]]:
    """Forward all rows.

    Args:
        sizes: T of the first rows, those whose logits are wanted.
        depths: numbers of layers after which states are kept.

    Returns:
        Logits of the first rows, None for none, and the kept states [B, T, C] of all: zeros where a row has no slot.
    """
    tokens_R, positions_R = (torch.from_numpy(np.concatenate(part)) for part in (packed.tokens, packed.positions))
    kept = {depth: torch.empty(len(tokens_R), layers.num_channels) for depth in depths}
    outputs = layers(tokens_R, positions_R, packed.texts, num_logits=sum(sizes), kept=kept)
    states = {
        depth: torch.nn.utils.rnn.pad_sequence(list(kept_RC.split(packed.sizes)), batch_first=True)
        for depth, kept_RC in kept.items()
    }
    return None if outputs.logits is None else Ragged(outputs.logits[0], sizes), states


def _visible(ancestors_TT: np.ndarray, length: int) -> np.ndarray:
    """bool [T, S]: all that is committed, and of the tree the path to the slot."""
    return np.concatenate([np.ones((len(ancestors_TT), length), np.bool_), ancestors_TT], 1)
