"""Drafted trees verified by the native library: work is done for the slots that the verification comes to.

Shape legend: B rows, T slots, N nodes, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import native
from specdec.kernels.native import structs
from specdec.kernels.trees.token_source import is_native
from trees import Draft, Ragged

Rule = Literal["walk", "topdown", "traversal"]
_NUMBERS = {"walk": 0, "topdown": 1, "traversal": 2}


def can_verify(draft: Draft, scores_BTV: Tensor | Ragged) -> bool:
    """Whether `verify` knows how: trees that were grown, or involved no chance, and scores that it can read."""
    if not is_native(scores_BTV.flat_RV if isinstance(scores_BTV, Ragged) else scores_BTV):
        return False
    return not draft.is_drawn or (draft.q_layers is not None and all(map(is_native, draft.q_layers.layers_BMV)))


def verify(
    draft: Draft, scores_BTV: Tensor | Ragged, rule: Rule, generator: torch.Generator | None = None
) -> tuple[list[list[int]], list[int]]:
    """Accepted nodes of every row from the root down, and the token after them (-1: some score is not a number).

    Args:
        scores_BTV: float32 contiguous processed scores of the target.
        rule: see `acceptance`; "walk" takes the greatest score for the target's choice.
    """
    library = native.library()
    assert library is not None, "can_verify() asks first"
    trees = draft.trees
    num_slots = trees.num_slots
    if isinstance(scores_BTV, Ragged):
        scores, starts = scores_BTV.flat_RV, scores_BTV.starts
    else:
        scores, starts = scores_BTV, tuple(range(0, trees.num_rows * num_slots, num_slots))
    vocab_size = scores.shape[-1]
    q_at = coins_at = 0
    if draft.is_drawn:
        q_BT = _draft_scores(draft)
        coins_BX = torch.rand((trees.num_rows, num_slots + 1), dtype=torch.float64, generator=generator)
        q_at, coins_at = q_BT.data_ptr(), coins_BX.data_ptr()
    tokens_BN, parents_BN = trees.tokens_BN.contiguous(), trees.parents_BN.contiguous()
    path = (ctypes.c_int64 * (trees.depth + 1))()
    v = structs.Verification(num_slots=num_slots, depth=trees.depth, vocab=vocab_size, path=ctypes.addressof(path))
    paths, following = [], []
    for row, size in enumerate(trees.sizes):
        v.size = size
        v.p = scores.data_ptr() + 4 * starts[row] * vocab_size
        v.tokens = tokens_BN.data_ptr() + 8 * row * trees.width
        v.parents = parents_BN.data_ptr() + 8 * row * trees.width
        if draft.is_drawn:
            v.q, v.coins = q_at + 8 * row * num_slots, coins_at + 8 * row * (num_slots + 1)
        library.verify(v, _NUMBERS[rule])
        paths.append(path[: v.count])
        following.append(v.next)
    return paths, following


def _draft_scores(draft: Draft) -> Tensor:
    """Where the scores of the draft at every slot begin; those of leaves are not meaningful."""
    layers = draft.q_layers
    assert layers is not None, "can_verify() asks first"
    starts_L = np.array([layer.data_ptr() for layer in layers.layers_BMV])
    widths_L = np.array([layer.shape[1] for layer in layers.layers_BMV])
    rows_B1 = np.arange(draft.trees.num_rows)[:, None]
    place_BT = rows_B1 * widths_L[layers.layer_BT] + layers.column_BT
    q_BT = starts_L[layers.layer_BT] + 4 * layers.layers_BMV[0].shape[2] * place_BT
    return torch.from_numpy(q_BT)
