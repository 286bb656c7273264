"""Which drafted nodes survive: pure functions of (draft tokens, q, p, generator). No model, no cache, no config.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), D depth, V vocabulary.
p is the target's and q the draft's distribution at a slot, both after the user's processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trees import Draft, TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Acceptance:
    """The outcome of a verification.

    Args:
        path_BD: int64 accepted node indices from the root down; entries past the row's count are not meaningful.
        counts_B: int64 number of accepted nodes.
        next_B: int64 the token after the path: the bonus if the path ends in a leaf, else the correction.
    """

    path_BD: Tensor
    counts_B: Tensor
    next_B: Tensor


def walk(trees: TreeBatch, chosen_BT: Tensor) -> Acceptance:
    """Follow the target's own choice from the root for as long as the tree contains it.

    Exact for every greedy target, and for a sampling target whose trees are deterministic: then the walk's
    tokens are the target's samples (a drafted token x is accepted with probability p(x)).

    Args:
        chosen_BT: int64 token that the target chose (argmax or sample) after each slot.
    """
    if trees.is_chain:
        agree_BN = (trees.tokens_BN == chosen_BT[:, :-1]) & trees.real_BN
        return _chain_acceptance(trees, agree_BN, chosen_BT)
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B = torch.zeros_like(rows_B)
    counts_B = torch.zeros_like(rows_B)
    path = []
    for _ in range(trees.depth):
        wanted_B = chosen_BT[rows_B, slot_B]
        hit_BN = (trees.parents_BN + 1 == slot_B[:, None]) & (trees.tokens_BN == wanted_B[:, None])
        found_B, node_B = (hit_BN & trees.real_BN).max(1)
        path.append(node_B)
        counts_B += found_B
        slot_B = torch.where(found_B, node_B + 1, slot_B)
    return Acceptance(path_BD=torch.stack(path, 1), counts_B=counts_B, next_B=chosen_BT[rows_B, slot_B])


def topdown(draft: Draft, p_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Multi-round residual verification (SpecInfer; without replacement as in DySpec, algorithm 3).

    A child y drawn from q is kept with probability min(1, p(y)/q(y)); otherwise p becomes norm(max(p - q, 0)),
    q loses y, and the next sibling is tried. On a chain this is speculative sampling (Leviathan et al. 2023).
    The tokens have exactly the target's distribution if the trees were drawn from `draft.q_BTV`.

    Args:
        p_BTV: float32 target distribution after each slot.
    """
    trees, q_BTV = draft.trees, draft.q_BTV
    assert q_BTV is not None, "a deterministic draft is walked"
    if trees.is_chain:
        return _topdown_chain(trees, p_BTV, q_BTV, generator)
    return _topdown_tree(trees, p_BTV, q_BTV, generator)


def draw(p_BTV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token from every distribution: int64 [B, T]. With T = 1 the same draw as in `transformers`."""
    flat = torch.multinomial(p_BTV.flatten(0, 1), 1, generator=generator)
    return flat.view(p_BTV.shape[:2])


def _chain_acceptance(trees: TreeBatch, kept_BN: Tensor, next_BT: Tensor) -> Acceptance:
    counts_B = kept_BN.long().cumprod(1).sum(1)
    path_BD = torch.arange(trees.width, device=trees.device).expand(trees.num_rows, trees.width)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=next_BT.gather(1, counts_B[:, None])[:, 0])


def _topdown_chain(trees: TreeBatch, p_BTV: Tensor, q_BTV: Tensor, generator: torch.Generator | None) -> Acceptance:
    drafted_BN1 = trees.tokens_BN.unsqueeze(-1)
    p_BN = p_BTV[:, :-1].gather(2, drafted_BN1).squeeze(-1)
    q_BN = q_BTV[:, :-1].gather(2, drafted_BN1).squeeze(-1)
    coins_BN = torch.rand(p_BN.shape, generator=generator, device=p_BN.device)
    kept_BN = (coins_BN * q_BN < p_BN) & trees.real_BN
    counts_B = kept_BN.long().cumprod(1).sum(1)
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    final_BV = p_BTV[rows_B, counts_B]
    refused_B = counts_B < torch.tensor(trees.sizes, device=trees.device)
    final_BV = torch.where(refused_B[:, None], _residual(final_BV, q_BTV[rows_B, counts_B]), final_BV)
    path_BD = torch.arange(trees.width, device=trees.device).expand(trees.num_rows, trees.width)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(final_BV, generator))


def _topdown_tree(trees: TreeBatch, p_BTV: Tensor, q_BTV: Tensor, generator: torch.Generator | None) -> Acceptance:
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B = torch.zeros_like(rows_B)
    counts_B = torch.zeros_like(rows_B)
    target_BV, draft_BV = p_BTV[:, 0], q_BTV[:, 0]
    untested_BN = trees.real_BN.clone()
    path = []
    for _ in range(trees.depth):
        descended_B = torch.zeros_like(rows_B, dtype=torch.bool)
        node_B = torch.zeros_like(rows_B)
        for _ in range(_most_siblings(trees)):
            waiting_BN = untested_BN & (trees.parents_BN + 1 == slot_B[:, None]) & ~descended_B[:, None]
            testing_B, child_B = waiting_BN.max(1)
            token_B = trees.tokens_BN[rows_B, child_B]
            coin_B = torch.rand(rows_B.shape, generator=generator, device=trees.device)
            kept_B = testing_B & (coin_B * draft_BV[rows_B, token_B] < target_BV[rows_B, token_B])
            refused_B = testing_B & ~kept_B
            target_BV = torch.where(refused_B[:, None], _residual(target_BV, draft_BV), target_BV)
            draft_BV = torch.where(refused_B[:, None], _without(draft_BV, token_B), draft_BV)
            untested_BN[rows_B, child_B] &= ~testing_B
            node_B = torch.where(kept_B, child_B, node_B)
            descended_B |= kept_B
        path.append(node_B)
        counts_B += descended_B
        slot_B = torch.where(descended_B, node_B + 1, slot_B)
        target_BV = torch.where(descended_B[:, None], p_BTV[rows_B, slot_B], target_BV)
        draft_BV = torch.where(descended_B[:, None], q_BTV[rows_B, slot_B], draft_BV)
    return Acceptance(path_BD=torch.stack(path, 1), counts_B=counts_B, next_B=_draw_one(target_BV, generator))


def _most_siblings(trees: TreeBatch) -> int:
    parent_slots_BN = torch.where(trees.real_BN, trees.parents_BN + 1, trees.num_slots)
    family_sizes = torch.nn.functional.one_hot(parent_slots_BN, trees.num_slots + 1)[..., :-1].sum(1)
    return int(family_sizes.max())


def _residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """norm(max(p - q, 0)); p itself where nothing is left (p == q, where a refusal is a rounding accident)."""
    left_BV = (p_BV - q_BV).clamp_min(0)
    mass_B1 = left_BV.sum(-1, keepdim=True)
    return torch.where(mass_B1 > 0, left_BV / mass_B1, p_BV)


def _without(q_BV: Tensor, token_B: Tensor) -> Tensor:
    """q without a token, renormalised; all zero once its support is exhausted."""
    left_BV = q_BV.scatter(1, token_B[:, None], 0.0)
    mass_B1 = left_BV.sum(-1, keepdim=True)
    return torch.where(mass_B1 > 0, left_BV / mass_B1, left_BV)


def _draw_one(p_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(p_BV, 1, generator=generator).squeeze(1)
