"""The four rules. `walk` and `follow` take the target's own choice; `topdown` and `traversal` test draws against q.

A node's chance to survive, *given that it is tested*, depends on no coin: a test presumes that all tests before it
failed. So the chances of all nodes are computed first, then all coins are thrown at once, and the path is read off.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), F = B * T slots of all rows, I slots that have
children, D depth, V vocabulary. p is the target's and q the draft's distribution at a slot, both after the user's
processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.acceptance import coins
from specdec.acceptance.families import Contest, contests_of, links_of
from specdec.acceptance.outcome import Acceptance, HostAcceptance
from specdec.kernels.trees import verification
from trees import Draft, Ragged, TreeBatch
from trees.blocks import argmax
from trees.randomness import Randomness


def walk(trees: TreeBatch, chosen_BT: Tensor) -> Acceptance:
    """Follow the target's own choice from the root for as long as the tree contains it.

    Exact for every greedy target, and for a sampling target whose trees are deterministic: then the walk's
    tokens are the target's samples (a drafted token x is accepted with probability p(x)).

    Args:
        chosen_BT: int64 token that the target chose (argmax or sample) after each slot.
    """
    wanted_BN = chosen_BT[:, :-1] if trees.is_chain else chosen_BT.gather(1, trees.parents_BN + 1)
    path_BD, counts_B, last_B = _descend(trees, trees.tokens_BN == wanted_BN)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=chosen_BT.gather(1, last_B[:, None])[:, 0])


def follow(trees: TreeBatch, scores_BTV: Tensor | Ragged) -> Acceptance:
    """`walk` where the target chooses its greatest score, which is looked for only where the way leads (on a CPU).

    Returns:
        `next_B` is -1 where a score on the way is not a number.
    """
    draft = Draft(trees=trees)
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "walk"), trees.device)
    assert not isinstance(scores_BTV, Ragged), "packed layers are native"
    return walk(trees, greatest(scores_BTV))


def greatest(scores_BTV: Tensor) -> Tensor:
    """int64 [B, T] the token of the greatest score after every slot; -1 where a score is not a number."""
    best_BT = argmax(scores_BTV.flatten(0, 1)).view(scores_BTV.shape[:2])
    is_nan_BT = scores_BTV.gather(2, best_BT.unsqueeze(2))[:, :, 0].isnan()
    return torch.where(is_nan_BT, -1, best_BT)


def topdown(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Multi-round residual verification (SpecInfer; without replacement as in DySpec, algorithm 3).

    A child y drawn from q is kept with probability min(1, p(y)/q(y)); otherwise p becomes norm(max(p - q, 0)),
    q loses y, and the next sibling is tried: sources in order, see `families.py`. On a chain this is speculative
    sampling (Leviathan et al. 2023). The tokens have exactly the target's distribution if the trees were drawn from the
    draft's q. Work over the vocabulary is done only for the slots that are come to.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    assert draft.is_drawn, "a deterministic draft is walked"
    trees = draft.trees
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "topdown", generator), trees.device)
    if trees.is_chain and draft.parts is None:
        q_BNV = drawn_from(draft, trees.width) if trees.width else scores_BTV[:, :0]
        return topdown_chain(trees, scores_BTV, q_BNV, generator)
    tokens_BT = torch.nn.functional.pad(trees.tokens_BN, (1, 0))
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B, counts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B)
    arrived_B = torch.ones_like(rows_B, dtype=torch.bool)
    path, left_BV, all_links = [], scores_BTV[:, 0], links_of(draft)
    for depth in range(trees.depth + 1):
        here_B, open_B = slot_B, arrived_B
        left_BV = torch.where(open_B[:, None], scores_BTV[rows_B, here_B].softmax(-1), left_BV)
        arrived_B = torch.zeros_like(open_B)
        for links in all_links:
            child_B = torch.where(open_B, links.first_child_BT[rows_B, here_B], 0)
            for rank in range(links.most_siblings[depth]):
                if coins.none(child_B > 0):
                    break
                token_B1 = tokens_BT.gather(1, child_B[:, None])
                if rank == 0 or not links.source.draft.is_drawn:
                    q_BV = links.source.q_at(depth, rows_B, here_B, token_B1, left_BV)
                scale_B = left_BV.sum(-1) / q_BV.sum(-1)
                chance_B = (left_BV.gather(1, token_B1) / q_BV.gather(1, token_B1))[:, 0] / scale_B
                kept_B = coins.bernoulli(torch.where(child_B > 0, chance_B, 0), generator)
                slot_B, arrived_B, open_B = torch.where(kept_B, child_B, slot_B), arrived_B | kept_B, open_B & ~kept_B
                refused_B = (child_B > 0) & ~kept_B
                if coins.none(refused_B):
                    break
                residual_BV = left_BV.addcmul(q_BV, scale_B[:, None], value=-1).clamp_min_(0)
                # nothing is left only where p == q, and then the refusal was a rounding accident
                left_BV = torch.where((refused_B & (residual_BV.sum(-1) > 0))[:, None], residual_BV, left_BV)
                q_BV.scatter_(1, token_B1, 0)
                child_B = torch.where(refused_B, links.next_sibling_BT[rows_B, child_B], 0)
        if depth == trees.depth:
            break
        path.append((slot_B - 1).clamp_min(0))
        counts_B += arrived_B
        if coins.none(arrived_B):
            break
    return Acceptance(path_BD=torch.stack(path, 1), counts_B=counts_B, next_B=coins.sample(left_BV, generator))


def traversal(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Traversal verification (Weng et al. 2025): from the leaves up, so that a whole path is judged at once.

    A node is entered with the reach min(1, r p(y)/q(y)), r the reach of its parent. Leaves come first, in draw order:
    a leaf is kept, with all its path, with its reach as probability; otherwise it is dropped, its parent's p becomes
    norm(max(r p - q, 0)), of mass s, and its parent's r becomes s / (s + 1 - r). A slot that has lost all its
    children is a leaf. On a chain this is block verification (Sun et al. 2024). Accepts at least as many tokens as
    `topdown` and is as exact. A node that several sources propose is entered by the first of its tests; the others come
    when it has been dropped, and then they have no chance.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    assert draft.is_drawn, "a deterministic draft is walked"
    trees = draft.trees
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "traversal", generator), trees.device)
    scores_FV, tokens_F = scores_BTV.flatten(0, 1), torch.nn.functional.pad(trees.tokens_BN, (1, 0)).flatten()
    contests = contests_of(draft)
    reach_F, left = _reaches(contests, scores_FV, tokens_F, trees.num_slots)
    kept_BT = coins.bernoulli(reach_F, generator).view(trees.num_rows, -1)
    kept_beneath_BT = (trees.ancestors_BTT & (kept_BT & trees.real_BT).unsqueeze(2)).any(1)
    path_BD, counts_B, last_B = _descend(trees, kept_beneath_BT[:, 1:])
    last_B = last_B + torch.arange(trees.num_rows, device=trees.device) * trees.num_slots
    p_BV = scores_FV.index_select(0, last_B).softmax(-1)
    if contests:
        p_BV = coins.or_else(left.at(last_B), p_BV)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=coins.sample(p_BV, generator))


class _Left(NamedTuple):
    """What is left of p at the slots that have children. Not renormalised: a distribution once divided by its mass.

    Args:
        p_IV, mass_I: float, and the sums of the rows.
        index_F: int64 where a slot stands in I; -1 for leaves.
    """

    p_IV: Tensor
    mass_I: Tensor
    index_F: Tensor

    def at(self, slots_B: Tensor) -> Tensor:
        """[B, V] at some flat slots; zero at leaves."""
        index_B = self.index_F[slots_B]
        return torch.where((index_B >= 0)[:, None], self.p_IV.index_select(0, index_B.clamp_min(0)), 0)


def _reaches(contests: Sequence[Contest], scores_FV: Tensor, tokens_F: Tensor, num_slots: int) -> tuple[Tensor, _Left]:
    """The reach of every slot, given that all that is tested before it is dropped, and what that leaves of p."""
    slots_I = torch.cat([contest.parents_N for contest in contests if contest.rank == 0] or [tokens_F[:0]]).unique()
    index_F = torch.full_like(tokens_F, -1)
    index_F[slots_I] = torch.arange(len(slots_I), device=tokens_F.device)
    p_IV = scores_FV.index_select(0, slots_I).softmax(-1)
    mass_I, reach_F = p_IV.new_ones(len(p_IV)), p_IV.new_ones(len(scores_FV))
    tiny = torch.finfo(p_IV.dtype).tiny
    for depth, source, rank, slots_N, children_N, is_first_N in contests:
        index_N, token_N1 = index_F[slots_N], tokens_F[children_N].unsqueeze(1)
        p_NV, mass_N, reach_N = p_IV[index_N], mass_I[index_N].clamp_min(tiny), reach_F[slots_N]
        if rank == 0 or not source.draft.is_drawn:
            q_NV = source.q_at(depth, slots_N // num_slots, slots_N % num_slots, token_N1, p_NV)
        else:
            q_NV = q_NV[: len(slots_N)]
        scale_N = mass_N / q_NV.sum(-1)
        chance_N = reach_N * (p_NV.gather(1, token_N1) / q_NV.gather(1, token_N1))[:, 0] / scale_N
        reach_F[children_N] = torch.where(is_first_N, chance_N.clamp_max(1), reach_F[children_N])
        p_NV = p_NV.addcmul_(q_NV, torch.where(reach_N > 0, scale_N / reach_N, 0)[:, None], value=-1).clamp_min_(0)
        p_IV[index_N], mass_I[index_N] = p_NV, p_NV.sum(-1)
        left_N = reach_N * mass_I[index_N] / mass_N
        reach_F[slots_N] = left_N / (left_N + 1 - reach_N).clamp_min_(tiny)
        q_NV.scatter_(1, token_N1, 0)
    return reach_F, _Left(p_IV, mass_I, index_F)


def _descend(trees: TreeBatch, open_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the root always on to the first open child: path_BD, counts_B, and the slot where the way ends."""
    open_BN = open_BN & trees.real_BN
    if trees.is_chain:
        counts_B = open_BN.long().cumprod(1).sum(1)
        path_BD = torch.arange(trees.width, device=trees.device).expand(trees.num_rows, trees.width)
        return path_BD, counts_B, counts_B
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B, counts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B)
    path, parent_slots_BN = [], trees.parents_BN + 1
    for _ in range(trees.depth):
        found_B, node_B = (open_BN & (parent_slots_BN == slot_B[:, None])).max(1)
        path.append(node_B)
        counts_B += found_B
        slot_B = torch.where(found_B, node_B + 1, slot_B)
        if coins.none(found_B):
            break
    return torch.stack(path, 1), counts_B, slot_B


def drawn_from(draft: Draft, num_slots: int) -> Tensor:
    """float32 [B, S, V] the distributions of the first so many slots of drawn trees. Not to be written to."""
    num_rows, device = draft.trees.num_rows, draft.trees.device
    if draft.q_BTV is not None:
        return draft.q_BTV[:, :num_slots]
    slots_BS = torch.arange(num_slots, device=device).expand(num_rows, num_slots)
    rows_BS = torch.arange(num_rows, device=device).unsqueeze(1).expand(num_rows, num_slots)
    return draft.q_at(0, rows_BS.flatten(), slots_BS.flatten()).unflatten(0, slots_BS.shape)


def topdown_chain(trees: TreeBatch, scores_BTV: Tensor, q_BNV: Tensor, generator: Randomness) -> Acceptance:
    """`topdown` of chains, whose residual is computed only where one breaks.

    Args:
        q_BNV: float32, what every node was drawn from.
    """
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    p_BTV = scores_BTV.softmax(-1)
    if not trees.width:
        nothing_B = torch.zeros_like(rows_B)
        return Acceptance(path_BD=trees.tokens_BN, counts_B=nothing_B, next_B=coins.sample(p_BTV[:, 0], generator))
    drafted_BN1 = trees.tokens_BN.unsqueeze(-1)
    p_BN, q_BN = (x.gather(2, drafted_BN1).squeeze(-1) for x in (p_BTV[:, :-1], q_BNV))
    path_BD, counts_B, _ = _descend(trees, coins.bernoulli(p_BN / q_BN, generator))
    final_BV = p_BTV[rows_B, counts_B]
    refused_B = counts_B < trees.sizes_B
    left_BV = (final_BV - q_BNV[rows_B, counts_B.clamp_max(trees.width - 1)]).clamp_min(0)
    final_BV = torch.where(refused_B[:, None], coins.or_else(left_BV, final_BV), final_BV)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=coins.sample(final_BV, generator))


def topdown_steps(
    trees: TreeBatch,
    scores_BTV: Tensor,
    q_BTV: Tensor,
    links: tuple[Tensor, Tensor],
    num_steps: int,
    generator: Randomness,
) -> Acceptance:
    """`topdown` of trees that one source has drawn, in steps of one test a row: the host need not know where rows are.

    Args:
        q_BTV: float32, what the children of every slot were drawn from.
        links: int64 [B, T] the first child and the next sibling of every slot, 0 where there is none.
        num_steps: at least as many as there are tests on the longest way; see `families.most_tests`.
    """
    num_rows, num_slots, (first_child_BT, next_sibling_BT) = trees.num_rows, trees.num_slots, links
    tokens_BT, rows_B = torch.nn.functional.pad(trees.tokens_BN, (1, 0)), torch.arange(num_rows, device=trees.device)
    slot_B, counts_B, path_BX = torch.zeros_like(rows_B), torch.zeros_like(rows_B), torch.zeros_like(tokens_BT)
    child_B, left_BV, q_BV = first_child_BT[:, 0], scores_BTV[:, 0].softmax(-1), q_BTV[:, 0]
    for _ in range(num_steps):
        is_tested_B, token_B1 = child_B > 0, tokens_BT.gather(1, child_B[:, None])
        scale_B = left_BV.sum(-1) / q_BV.sum(-1)
        chance_B = (left_BV.gather(1, token_B1) / q_BV.gather(1, token_B1))[:, 0] / scale_B
        kept_B = coins.bernoulli(torch.where(is_tested_B, chance_B, 0), generator)
        refused_B = is_tested_B & ~kept_B
        residual_BV = left_BV.addcmul(q_BV, scale_B[:, None], value=-1).clamp_min_(0)
        left_BV = torch.where((refused_B & (residual_BV.sum(-1) > 0))[:, None], residual_BV, left_BV)
        q_BV = q_BV.scatter(1, token_B1, 0)
        # a row that goes on writes its node, another one past the end
        place_B1 = torch.where(kept_B, counts_B, num_slots - 1)[:, None]
        path_BX = path_BX.scatter(1, place_B1, (child_B - 1)[:, None])
        slot_B, counts_B = torch.where(kept_B, child_B, slot_B), counts_B + kept_B
        left_BV = torch.where(kept_B[:, None], scores_BTV[rows_B, slot_B].softmax(-1), left_BV)
        q_BV = torch.where(kept_B[:, None], q_BTV[rows_B, slot_B], q_BV)
        sibling_B = torch.where(refused_B, next_sibling_BT[rows_B, child_B], 0)
        child_B = torch.where(kept_B, first_child_BT[rows_B, slot_B], sibling_B)
    path_BD = path_BX[:, : trees.depth].clamp_min(0)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=coins.sample(left_BV, generator))
