"""Which drafted nodes survive: pure functions of (draft tokens, q, p, generator). No model, no cache, no config.

A node's chance to survive, *given that it is tested*, depends on no coin: a test presumes that all tests before it
failed. So the chances of all nodes are computed first, then all coins are thrown at once, and the path is read off.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), F = B * T slots of all rows, I slots that have
children, D depth, V vocabulary. p is the target's and q the draft's distribution at a slot, both after the user's
processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trees import Draft, TreeBatch
from trees.urn import Urn


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
    wanted_BN = chosen_BT[:, :-1] if trees.is_chain else chosen_BT.gather(1, trees.parents_BN + 1)
    path_BD, counts_B, last_B = _descend(trees, trees.tokens_BN == wanted_BN)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=chosen_BT.gather(1, last_B[:, None])[:, 0])


def topdown(draft: Draft, p_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Multi-round residual verification (SpecInfer; without replacement as in DySpec, algorithm 3).

    A child y drawn from q is kept with probability min(1, p(y)/q(y)); otherwise p becomes norm(max(p - q, 0)),
    q loses y, and the next sibling is tried. On a chain this is speculative sampling (Leviathan et al. 2023).
    The tokens have exactly the target's distribution if the trees were drawn from `draft.q_BTV`.

    Args:
        p_BTV: float32 target distribution after each slot.
    """
    trees = draft.trees
    assert draft.q_BTV is not None, "a deterministic draft is walked"
    if trees.is_chain:
        return _topdown_chain(trees, p_BTV, draft.q_BTV, generator)
    trial = _Trial(draft, p_BTV, by_depth=False)
    chance_F = torch.zeros_like(trial.reach_F)
    for contest in trial.contests:
        chance_F[contest.children_N] = trial.refuse(contest)
    kept_BT = _throw(chance_F, generator).view(trees.num_rows, -1)
    return trial.outcome(kept_BT[:, 1:], generator)


def traversal(draft: Draft, p_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Traversal verification (Weng et al. 2025): from the leaves up, so that a whole path is judged at once.

    A node is entered with the reach min(1, r p(y)/q(y)), r the reach of its parent. Leaves come first, in draw order:
    a leaf is kept, with all its path, with its reach as probability; otherwise it is dropped, its parent's p becomes
    norm(max(r p - q, 0)), of mass s, and its parent's r becomes s / (s + 1 - r). A slot that has lost all its
    children is a leaf. On a chain this is block verification (Sun et al. 2024). Accepts at least as many tokens as
    `topdown` and is as exact.

    Args:
        p_BTV: float32 target distribution after each slot.
    """
    trees = draft.trees
    trial = _Trial(draft, p_BTV, by_depth=True)
    for contest in trial.contests:
        trial.reach_F[contest.children_N] = trial.refuse(contest)
    kept_BT = _throw(trial.reach_F, generator).view(trees.num_rows, -1)
    kept_beneath_BT = (trees.ancestors_BTT & (kept_BT & trees.real_BT).unsqueeze(2)).any(1)
    return trial.outcome(kept_beneath_BT[:, 1:], generator)


def draw(p_BTV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token from every distribution: int64 [B, T]. With T = 1 the same draw as in `transformers`."""
    flat = torch.multinomial(p_BTV.flatten(0, 1), 1, generator=generator)
    return flat.view(p_BTV.shape[:2])


def _descend(trees: TreeBatch, open_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the root always on to the first open child: path_BD, counts_B, and the slot where the way ends."""
    open_BN = open_BN & trees.real_BN
    if trees.is_chain:
        counts_B = open_BN.long().cumprod(1).sum(1)
        path_BD = torch.arange(trees.width, device=trees.device).expand(trees.num_rows, trees.width)
        return path_BD, counts_B, counts_B
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B, counts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B)
    path = []
    for _ in range(trees.depth):
        found_B, node_B = (open_BN & (trees.parents_BN + 1 == slot_B[:, None])).max(1)
        path.append(node_B)
        counts_B += found_B
        slot_B = torch.where(found_B, node_B + 1, slot_B)
    return torch.stack(path, 1), counts_B, slot_B


def _topdown_chain(trees: TreeBatch, p_BTV: Tensor, q_BTV: Tensor, generator: torch.Generator | None) -> Acceptance:
    """`topdown`, but the residual is computed only where a chain breaks."""
    drafted_BN1 = trees.tokens_BN.unsqueeze(-1)
    p_BN = p_BTV[:, :-1].gather(2, drafted_BN1).squeeze(-1)
    q_BN = q_BTV[:, :-1].gather(2, drafted_BN1).squeeze(-1)
    path_BD, counts_B, _ = _descend(trees, _throw(p_BN / q_BN, generator))
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    final_BV = p_BTV[rows_B, counts_B]
    refused_B = counts_B < torch.tensor(trees.sizes, device=trees.device)
    left_BV = (final_BV - q_BTV[rows_B, counts_B]).clamp_min(0)
    final_BV = torch.where(refused_B[:, None], _or_else(left_BV, final_BV), final_BV)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(final_BV, generator))


class _Contest(NamedTuple):
    """Children that are tried together: number `rank` of the slots that stand in I from `start` on."""

    start: int
    rank: int
    children_N: Tensor


class _Trial:
    """The distributions of all slots that have children, as they stand after the children tried so far.

    Args:
        by_depth: try children depth by depth, so that a slot's reach is known before its children are tried.

    Attributes:
        contests: in the order in which they take place.
        reach_F: chance that a slot is kept, given that it is tested and that all children tried so far are refused.
    """

    def __init__(self, draft: Draft, p_BTV: Tensor, *, by_depth: bool):
        assert draft.q_BTV is not None, "a deterministic draft is walked"
        self._trees = draft.trees
        self._tokens_F = torch.nn.functional.pad(draft.trees.tokens_BN, (1, 0)).flatten()
        self._p_FV = p_BTV.flatten(0, 1)
        self._slots_I, self.contests = _families(draft.trees, by_depth=by_depth)
        self._p_IV = self._p_FV.index_select(0, self._slots_I)
        self._q_IV = draft.q_BTV.flatten(0, 1).index_select(0, self._slots_I)
        self._p_mass_I = self._p_IV.new_ones(len(self._slots_I))
        self.reach_F = self._p_FV.new_ones(len(self._p_FV))

    def refuse(self, contest: _Contest) -> Tensor:
        """Try children and refuse them all; returns the chances that they had."""
        start, rank, children_N = contest
        mine = slice(start, start + len(children_N))
        p_NV, q_NV, slots_N = self._p_IV[mine], self._q_IV[mine], self._slots_I[mine]
        reach_N, token_N1 = self.reach_F[slots_N], self._tokens_F[children_N].unsqueeze(1)
        if rank:
            q_NV.div_(q_NV.sum(-1, keepdim=True))
        p_NV.mul_((reach_N / self._p_mass_I[mine].clamp_min(_tiny(p_NV))).unsqueeze(1))
        chance_N = p_NV.gather(1, token_N1)[:, 0] / q_NV.gather(1, token_N1)[:, 0]
        left_N = p_NV.sub_(q_NV).clamp_min_(0).sum(-1)
        self._p_mass_I[mine] = left_N
        self.reach_F[slots_N] = left_N / (left_N + 1 - reach_N).clamp_min(_tiny(p_NV))
        q_NV.scatter_(1, token_N1, 0)
        return chance_N.clamp_max(1)

    def outcome(self, open_BN: Tensor, generator: torch.Generator | None) -> Acceptance:
        """Descend through open nodes and draw the next token where the way ends."""
        path_BD, counts_B, last_B = _descend(self._trees, open_BN)
        slot_B = last_B + torch.arange(len(last_B), device=last_B.device) * self._trees.num_slots
        p_BV = self._p_FV[slot_B]
        if not self.contests:
            return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(p_BV, generator))
        index_F = torch.full_like(self._tokens_F, -1)
        index_F[self._slots_I] = torch.arange(len(self._slots_I), device=index_F.device)
        index_B = index_F[slot_B]
        has_children_B1 = index_B[:, None] >= 0
        final_BV = torch.where(has_children_B1, _or_else(self._p_IV[index_B.clamp_min(0)], p_BV), p_BV)
        return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(final_BV, generator))


def _families(trees: TreeBatch, *, by_depth: bool) -> tuple[Tensor, list[_Contest]]:
    """Slots that have children, and the contests of these."""
    parents_BN, num_slots = trees.host_parents_BN, trees.num_slots
    row_N, node_N = np.nonzero(np.arange(trees.width) < np.array(trees.sizes)[:, None])
    parent_N = row_N * num_slots + parents_BN[row_N, node_N] + 1
    in_families_N = np.argsort(parent_N, kind="stable")
    child_N = (row_N * num_slots + node_N + 1)[in_families_N]
    slot_I, first_I, size_I = np.unique(parent_N[in_families_N], return_index=True, return_counts=True)
    depth_I = _host_depths(trees).ravel()[slot_I] if by_depth else np.zeros_like(slot_I)
    order_I = np.lexsort((-size_I, depth_I))
    slot_I, first_I, size_I, depth_I = slot_I[order_I], first_I[order_I], size_I[order_I], depth_I[order_I]
    starts, ranks, children = [], [], []
    for depth in range(depth_I.max(initial=-1) + 1):
        start, stop = (int(index) for index in np.searchsorted(depth_I, (depth, depth + 1)))
        for rank in range(size_I[start]):
            stop = start + int(np.searchsorted(-size_I[start:stop], -rank))
            starts.append(start)
            ranks.append(rank)
            children.append(child_N[first_I[start:stop] + rank])
    numbers = torch.from_numpy(np.concatenate([slot_I, *children])).to(trees.device)
    slots_I, *on_device = numbers.split([len(slot_I), *map(len, children)])
    return slots_I, [_Contest(*contest) for contest in zip(starts, ranks, on_device, strict=True)]


def _host_depths(trees: TreeBatch) -> np.ndarray:
    """Depth of every slot [B, T]."""
    parent_BT = np.pad(trees.host_parents_BN + 1, ((0, 0), (1, 0)))
    above_BT, depth_BT = np.broadcast_to(np.arange(trees.num_slots), parent_BT.shape), np.zeros_like(parent_BT)
    for _ in range(trees.depth):
        depth_BT += above_BT > 0
        above_BT = np.take_along_axis(parent_BT, above_BT, 1)
    return depth_BT


def _throw(chance: Tensor, generator: torch.Generator | None) -> Tensor:
    """bool: independent coins that show True with these chances."""
    return torch.rand(chance.shape, dtype=chance.dtype, generator=generator, device=chance.device) < chance


def _or_else(left_BV: Tensor, p_BV: Tensor) -> Tensor:
    """Weights, or p where none is left (p == q there, and the refusal was a rounding accident)."""
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _draw_one(p_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    urn = Urn(p_BV, sample=True, generator=generator)
    token_B1, _ = urn.take(torch.arange(len(p_BV), device=p_BV.device), 1)
    return token_B1.squeeze(1)
