"""Every outcome of a round's verification, through the real code, and how far what it commits is from p^L."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec import acceptance
from specdec.acceptance import coins as coins_module
from tests.support.acceptance_oracles import outcomes_of
from tests.support.enumeration import LENGTH, ToyModel, prefixes, q_of
from trees import Draft, TokenTree, TreeBatch

CAUGHT = 1e-3
"""Total variation that a wrong rule must show."""


VERIFIERS = {"topdown": acceptance.topdown, "traversal": acceptance.traversal}


@dataclass
class Enumeration:
    """Stands in for the coins and the last draw: every outcome of the coins is a row of the batch."""

    tree_of_row: list[TokenTree]
    coins_BN: Tensor
    weight_B: Tensor
    last_BV: Tensor | None = None

    def __post_init__(self) -> None:
        self._num_thrown_B = torch.zeros(len(self.coins_BN), dtype=torch.long)

    @classmethod
    def of(cls, rows: Sequence[TokenTree]) -> Enumeration:
        tree_of_row, coins, weights = [], [], []
        width = max(map(len, rows))
        for tree in rows:
            for outcome in itertools.product((False, True), repeat=len(tree)):
                tree_of_row.append(tree)
                coins.append([*outcome, *[False] * (width + 1 - len(tree))])  # one more, which nobody throws
                weights.append(0.5 ** len(tree))
        return cls(tree_of_row, torch.tensor(coins), torch.tensor(weights, dtype=torch.float64))

    def throw(self, chance: Tensor, generator: torch.Generator | None) -> Tensor:
        """Takes the row's next coin wherever there is a chance to win and one to lose."""
        chance_BN = chance.view(len(self.coins_BN), -1).clamp_max(1)
        if chance_BN.shape == self.coins_BN.shape:
            chance_BN[:, 0] = 1  # the root is not a node
        won = []
        for chance_B in chance_BN.unbind(1):
            uncertain_B = (chance_B > 0) & (chance_B < 1)
            coin_B = self.coins_BN.gather(1, self._num_thrown_B[:, None])[:, 0]
            self._num_thrown_B += uncertain_B
            self.weight_B *= torch.where(uncertain_B, 2 * torch.where(coin_B, chance_B, 1 - chance_B), 1)
            won.append(torch.where(uncertain_B, coin_B, chance_B == 1))
        return torch.stack(won, 1).view(chance.shape)

    def draw_one(self, p_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        self.last_BV = p_BV / p_BV.sum(-1, keepdim=True)
        return torch.zeros(len(p_BV), dtype=torch.long)


def committed_texts(
    rows: Sequence[TokenTree],
    q: Sequence[Tensor],
    target: ToyModel,
    verify: str,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Tensor, Tensor]:
    """For each drafted tree the distribution of the text, [trees, V^L], and the expected number of accepted nodes."""
    coins = Enumeration.of(rows)
    monkeypatch.setattr(coins_module, "bernoulli", coins.throw)
    monkeypatch.setattr(coins_module, "sample", coins.draw_one)
    batch = TreeBatch.stack(coins.tree_of_row)
    q_of = {id(tree): _pad(q_TV, batch.num_slots) for tree, q_TV in zip(rows, q, strict=True)}
    p_of = {id(tree): _pad(torch.stack([*map(target.probs, prefixes(tree))]), batch.num_slots) for tree in rows}
    q_BTV, p_BTV = (torch.stack([table[id(tree)] for tree in coins.tree_of_row]) for table in (q_of, p_of))
    accepted = VERIFIERS[verify](Draft(trees=batch, q_BTV=q_BTV), p_BTV.log())
    index = {id(tree): number for number, tree in enumerate(rows)}
    keys = [
        (index[id(tree)], tuple(tree.tokens[node] for node in path))
        for tree, (path, _) in zip(coins.tree_of_row, outcomes_of(accepted), strict=True)
    ]
    groups = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    last_GV = torch.zeros(len(groups), target.vocab_size, dtype=torch.float64)
    last_GV.index_add_(0, torch.tensor([groups[key] for key in keys]), coins.weight_B[:, None] * coins.last_BV)
    texts = torch.zeros(len(rows), target.vocab_size**LENGTH, dtype=torch.float64)
    num_accepted = torch.zeros(len(rows), dtype=torch.float64)
    for (number, text), last_V in zip(groups, last_GV, strict=True):
        num_accepted[number] += len(text) * last_V.sum()
        texts[number] += target.completed(text, last_V)
    return texts, num_accepted


def _pad(x_TV: Tensor, num_slots: int) -> Tensor:
    return torch.nn.functional.pad(x_TV, (0, 0, 0, num_slots - len(x_TV)))


def distributions(draft: Draft, row: int = 0) -> Tensor:
    """q of a row's slots [T, V]; of leaves anything."""
    if draft.q_BTV is not None:
        return draft.q_BTV[row, : draft.trees.sizes[row] + 1]
    leaf_V = torch.zeros(draft.q_layers.layers_BMV[0].shape[2], dtype=torch.float64)
    children = draft.trees.row(row).children
    return torch.stack([q_of(draft, row, slot) if family else leaf_V for slot, family in enumerate(children)])


def total_variation(
    drafts: Sequence[tuple[float, Draft]], target: ToyModel, verify: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """Between what is committed and p^L; and the expected number of accepted nodes."""
    weight_D = torch.tensor([prob for prob, _ in drafts], dtype=torch.float64)
    rows = [draft.trees.row(0) for _, draft in drafts]
    texts, num_accepted = committed_texts(
        rows, [distributions(draft) for _, draft in drafts], target, verify, monkeypatch
    )
    error = 0.5 * (weight_D @ texts - target.texts).abs().sum()
    return float(error), float(weight_D @ num_accepted)
