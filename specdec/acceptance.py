"""Which drafted nodes survive: pure functions of (draft tokens, q, p, generator). No model, no cache, no config.

A node's chance to survive, *given that it is tested*, depends on no coin: a test presumes that all tests before it
failed. So the chances of all nodes are computed first, then all coins are thrown at once, and the path is read off.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), F = B * T slots of all rows, I slots that have
children, D depth, V vocabulary. p is the target's and q the draft's distribution at a slot, both after the user's
processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import verification
from trees import Draft, TreeBatch
from trees.blocks import argmax
from trees.urn import Urn


@dataclass(frozen=True, kw_only=True, eq=False)
class Acceptance:
    """The outcome of a verification.

    Args:
        path_BD: int64 accepted node indices from the root down; entries past the row's count are not meaningful.
        counts_B: int64 number of accepted nodes.
        next_B: int64 the token after the path: the bonus if the path ends in a leaf, else the correction. -1 where
            it was noticed that the target's scores are no numbers.
    """

    path_BD: Tensor
    counts_B: Tensor
    next_B: Tensor

    @property
    def has_next(self) -> bool:
        """Whether there is a token after every path."""
        return bool((self.next_B >= 0).all())

    @property
    def last_B(self) -> Tensor:
        """int64 slot at which the path ends."""
        slots_BT = torch.nn.functional.pad(self.path_BD + 1, (1, 0))
        return slots_BT.gather(1, self.counts_B[:, None])[:, 0]


class HostAcceptance(Acceptance):
    """One that was found on the host; its tensors are made when they are asked for.

    Attributes:
        paths: accepted nodes of each row.
        following: the tokens after them.
    """

    paths: list[list[int]]
    following: list[int]

    def __init__(self, paths: list[list[int]], following: list[int], device: torch.device):
        vars(self).update(paths=paths, following=following, _device=device)

    @property
    def has_next(self) -> bool:
        return min(self.following) >= 0

    @cached_property
    def path_BD(self) -> Tensor:
        depth = max(map(len, self.paths))
        padded = [[*path, *[0] * (depth - len(path))] for path in self.paths]
        return self._tensor(padded).view(len(padded), depth)

    @cached_property
    def counts_B(self) -> Tensor:
        return self._tensor([len(path) for path in self.paths])

    @cached_property
    def next_B(self) -> Tensor:
        return self._tensor(self.following)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=vars(self)["_device"])


class Accepted(NamedTuple):
    """For each row the accepted nodes, and its candidate tokens: theirs, then the next one."""

    paths: list[list[int]]
    candidates: list[list[int]]


def to_host(trees: TreeBatch, acceptance: Acceptance) -> Accepted:
    """The outcome of a verification on the host, in one copy at most."""
    if isinstance(acceptance, HostAcceptance) and trees.rows is not None:
        found = zip(trees.rows, acceptance.paths, acceptance.following, strict=True)
        candidates = [[*(tree.tokens[node] for node in path), token] for tree, path, token in found]
        return Accepted(acceptance.paths, candidates)
    path_BD = acceptance.path_BD
    token_BD = trees.tokens_BN.gather(1, path_BD) if trees.width else path_BD
    heads_B2 = torch.stack([acceptance.counts_B, acceptance.next_B], 1)
    depth = path_BD.shape[1]
    paths, candidates = [], []
    for count, next_token, *rest in torch.cat([heads_B2, path_BD, token_BD], 1).tolist():
        paths.append(rest[:count])
        candidates.append([*rest[depth : depth + count], next_token])
    return Accepted(paths, candidates)


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


def follow(trees: TreeBatch, scores_BTV: Tensor) -> Acceptance:
    """`walk` where the target chooses its greatest score, which is looked for only where the way leads (on a CPU).

    Returns:
        `next_B` is -1 where a score on the way is not a number.
    """
    draft = Draft(trees=trees)
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "walk"), trees.device)
    best_BT = argmax(scores_BTV.flatten(0, 1)).view(scores_BTV.shape[:2])
    is_nan_BT = scores_BTV.gather(2, best_BT.unsqueeze(2))[:, :, 0].isnan()
    return walk(trees, torch.where(is_nan_BT, -1, best_BT))


def topdown(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Multi-round residual verification (SpecInfer; without replacement as in DySpec, algorithm 3).

    A child y drawn from q is kept with probability min(1, p(y)/q(y)); otherwise p becomes norm(max(p - q, 0)),
    q loses y, and the next sibling is tried. On a chain this is speculative sampling (Leviathan et al. 2023).
    The tokens have exactly the target's distribution if the trees were drawn from the draft's q. Work over the
    vocabulary is done only for the slots that are come to and the children that are refused.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    assert draft.is_drawn, "a deterministic draft is walked"
    trees = draft.trees
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "topdown", generator), trees.device)
    if trees.is_chain:
        return _topdown_chain(draft, scores_BTV, generator)
    families = _Families.of(trees)
    tokens_BT = torch.nn.functional.pad(trees.tokens_BN, (1, 0))
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B, counts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B)
    arrived_B = torch.ones_like(rows_B, dtype=torch.bool)
    path, left_BV = [], scores_BTV[:, 0]
    for depth, num_siblings in enumerate(families.most_siblings):
        p_BV = scores_BTV[rows_B, slot_B].softmax(-1)
        left_BV = torch.where(arrived_B[:, None], p_BV, left_BV)
        child_B = torch.where(arrived_B, families.first_child_BT[rows_B, slot_B], 0)
        arrived_B = torch.zeros_like(arrived_B)
        if not num_siblings or _none(child_B > 0):
            break
        q_BV, scale_B = draft.q_at(depth, rows_B, slot_B), p_BV.new_ones(len(p_BV))
        for _ in range(num_siblings):
            token_B1 = tokens_BT.gather(1, child_B[:, None])
            chance_B = (left_BV.gather(1, token_B1) / q_BV.gather(1, token_B1))[:, 0] / scale_B
            kept_B = _throw(torch.where(child_B > 0, chance_B, 0), generator)
            slot_B, arrived_B = torch.where(kept_B, child_B, slot_B), arrived_B | kept_B
            refused_B = (child_B > 0) & ~kept_B
            if _none(refused_B):
                break
            residual_BV = left_BV.addcmul(q_BV, scale_B[:, None], value=-1).clamp_min_(0)
            mass_B = residual_BV.sum(-1)
            # nothing is left only where p == q, and then the refusal was a rounding accident
            left_BV = torch.where((refused_B & (mass_B > 0))[:, None], residual_BV, left_BV)
            scale_B = mass_B / q_BV.scatter_(1, token_B1, 0).sum(-1)
            child_B = torch.where(refused_B, families.next_sibling_BT[rows_B, child_B], 0)
        path.append((slot_B - 1).clamp_min(0))
        counts_B += arrived_B
    return Acceptance(path_BD=torch.stack(path, 1), counts_B=counts_B, next_B=_draw_one(left_BV, generator))


def traversal(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Traversal verification (Weng et al. 2025): from the leaves up, so that a whole path is judged at once.

    A node is entered with the reach min(1, r p(y)/q(y)), r the reach of its parent. Leaves come first, in draw order:
    a leaf is kept, with all its path, with its reach as probability; otherwise it is dropped, its parent's p becomes
    norm(max(r p - q, 0)), of mass s, and its parent's r becomes s / (s + 1 - r). A slot that has lost all its
    children is a leaf. On a chain this is block verification (Sun et al. 2024). Accepts at least as many tokens as
    `topdown` and is as exact.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    assert draft.is_drawn, "a deterministic draft is walked"
    trees = draft.trees
    if verification.can_verify(draft, scores_BTV):
        return HostAcceptance(*verification.verify(draft, scores_BTV, "traversal", generator), trees.device)
    scores_FV = scores_BTV.flatten(0, 1)
    tokens_F = torch.nn.functional.pad(trees.tokens_BN, (1, 0)).flatten()
    slots_I, contests = _contests(trees)
    # p_IV is not renormalised: it is a distribution once divided by mass_I; so is q_NV after the first rank
    p_IV = scores_FV.index_select(0, slots_I).softmax(-1)
    mass_I, reach_F = p_IV.new_ones(len(p_IV)), p_IV.new_ones(len(scores_FV))
    tiny = torch.finfo(p_IV.dtype).tiny
    for start, depth, rank, children_N in contests:
        mine = slice(start, start + len(children_N))
        slots_N, p_NV, mass_N = slots_I[mine], p_IV[mine], mass_I[mine].clamp_min(tiny)
        if rank == 0:
            q_NV, scale_N = draft.q_at(depth, slots_N // trees.num_slots, slots_N % trees.num_slots), mass_N
        else:
            q_NV = q_NV[: len(children_N)]
            scale_N = mass_N / q_NV.sum(-1)
        reach_N, token_N1 = reach_F[slots_N], tokens_F[children_N].unsqueeze(1)
        chance_N = reach_N * (p_NV.gather(1, token_N1) / q_NV.gather(1, token_N1))[:, 0] / scale_N
        reach_F[children_N] = chance_N.clamp_max_(1)
        p_NV.addcmul_(q_NV, torch.where(reach_N > 0, scale_N / reach_N, 0)[:, None], value=-1).clamp_min_(0)
        mass_I[mine] = p_NV.sum(-1)
        left_N = reach_N * mass_I[mine] / mass_N
        reach_F[slots_N] = left_N / (left_N + 1 - reach_N).clamp_min_(tiny)
        q_NV.scatter_(1, token_N1, 0)
    kept_BT = _throw(reach_F, generator).view(trees.num_rows, -1)
    kept_beneath_BT = (trees.ancestors_BTT & (kept_BT & trees.real_BT).unsqueeze(2)).any(1)
    path_BD, counts_B, last_B = _descend(trees, kept_beneath_BT[:, 1:])
    last_B = last_B + torch.arange(trees.num_rows, device=trees.device) * trees.num_slots
    p_BV = scores_FV.index_select(0, last_B).softmax(-1)
    if contests:
        index_F = torch.full_like(tokens_F, -1)
        index_F[slots_I] = torch.arange(len(slots_I), device=trees.device)
        index_B = index_F[last_B]
        left_BV = torch.where((index_B >= 0)[:, None], p_IV.index_select(0, index_B.clamp_min(0)), 0)
        p_BV = _or_else(left_BV, p_BV)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(p_BV, generator))


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
    path, parent_slots_BN = [], trees.parents_BN + 1
    for _ in range(trees.depth):
        found_B, node_B = (open_BN & (parent_slots_BN == slot_B[:, None])).max(1)
        path.append(node_B)
        counts_B += found_B
        slot_B = torch.where(found_B, node_B + 1, slot_B)
        if _none(found_B):
            break
    return torch.stack(path, 1), counts_B, slot_B


def _topdown_chain(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None) -> Acceptance:
    """`topdown`, but the residual is computed only where a chain breaks."""
    trees = draft.trees
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    p_BTV = scores_BTV.softmax(-1)
    if not trees.width:
        nothing_B = torch.zeros_like(rows_B)
        return Acceptance(path_BD=trees.tokens_BN, counts_B=nothing_B, next_B=_draw_one(p_BTV[:, 0], generator))
    q_BNV = torch.stack([draft.q_at(slot, rows_B, torch.full_like(rows_B, slot)) for slot in range(trees.width)], 1)
    drafted_BN1 = trees.tokens_BN.unsqueeze(-1)
    p_BN, q_BN = (x.gather(2, drafted_BN1).squeeze(-1) for x in (p_BTV[:, :-1], q_BNV))
    path_BD, counts_B, _ = _descend(trees, _throw(p_BN / q_BN, generator))
    final_BV = p_BTV[rows_B, counts_B]
    refused_B = counts_B < torch.tensor(trees.sizes, device=trees.device)
    left_BV = (final_BV - q_BNV[rows_B, counts_B.clamp_max(trees.width - 1)]).clamp_min(0)
    final_BV = torch.where(refused_B[:, None], _or_else(left_BV, final_BV), final_BV)
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=_draw_one(final_BV, generator))


class _Families(NamedTuple):
    """Who follows whom, as slots of the same row; 0 where there is none.

    Args:
        first_child_BT: int64.
        next_sibling_BT: int64.
        most_siblings: size of the largest family below the slots of each depth.
    """

    first_child_BT: Tensor
    next_sibling_BT: Tensor
    most_siblings: list[int]

    @classmethod
    def of(cls, trees: TreeBatch) -> _Families:
        links = np.zeros((2, trees.num_rows, trees.num_slots), np.int64)
        most_siblings = [0] * (trees.depth + 1)
        for row, (parents, size) in enumerate(zip(trees.host_parents_BN.tolist(), trees.sizes, strict=True)):
            depths, families = [0], [list[int]() for _ in range(size + 1)]
            for node, parent in enumerate(parents[:size]):
                depth, family = depths[parent + 1], families[parent + 1]
                links[(1, row, family[-1]) if family else (0, row, parent + 1)] = node + 1
                family.append(node + 1)
                depths.append(depth + 1)
                most_siblings[depth] = max(most_siblings[depth], len(family))
        first_child_BT, next_sibling_BT = torch.from_numpy(links).to(trees.device)
        return cls(first_child_BT, next_sibling_BT, most_siblings)


class _Contest(NamedTuple):
    """Children of one depth and rank, which are tried together; their parents stand in I from `start` on."""

    start: int
    depth: int
    rank: int
    children_N: Tensor


def _contests(trees: TreeBatch) -> tuple[Tensor, list[_Contest]]:
    """Slots that have children, by depth and then the largest families first; and the contests, from the root down."""
    row_N, node_N = np.nonzero(np.arange(trees.width) < np.array(trees.sizes)[:, None])
    parent_N = row_N * trees.num_slots + trees.host_parents_BN[row_N, node_N] + 1
    by_family_N = np.argsort(parent_N, kind="stable")
    parent_N, slot_N = parent_N[by_family_N], (row_N * trees.num_slots + node_N + 1)[by_family_N]
    rank_N = np.arange(len(parent_N)) - np.searchsorted(parent_N, parent_N)
    depth_N = trees.host_depths_BT.ravel()[parent_N]
    first = np.flatnonzero(rank_N == 0)
    size_I = np.diff(first, append=len(rank_N))
    order_I = np.lexsort((-size_I, depth_N[first]))
    index_N = np.repeat(np.argsort(order_I), size_I)
    order_N = np.lexsort((index_N, rank_N, depth_N))
    slot_N, index_N, rank_N, depth_N = (x[order_N] for x in (slot_N, index_N, rank_N, depth_N))
    starts = np.flatnonzero(np.diff(depth_N, prepend=-1) | np.diff(rank_N, prepend=-1))
    sizes = np.diff(starts, append=len(rank_N))
    numbers = torch.from_numpy(np.concatenate([parent_N[first][order_I], slot_N])).to(trees.device)
    slots_I, *children = numbers.split([len(first), *sizes.tolist()])
    heads = np.stack([x[starts] for x in (index_N, depth_N, rank_N)], 1).tolist()
    return slots_I, [_Contest(start, depth, rank, c) for (start, depth, rank), c in zip(heads, children, strict=True)]


def _none(mask: Tensor) -> bool:
    """Whether nothing is True, where that can be known at once: a GPU would have to be waited for."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _throw(chance: Tensor, generator: torch.Generator | None) -> Tensor:
    """bool: independent coins that show True with these chances."""
    return torch.rand(chance.shape, dtype=chance.dtype, generator=generator, device=chance.device) < chance


def _or_else(left_BV: Tensor, p_BV: Tensor) -> Tensor:
    """Weights, or p where there are none (p == q there, and the refusal was a rounding accident)."""
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)


def _draw_one(p_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    urn = Urn(p_BV, sample=True, generator=generator)
    token_B1, _ = urn.take(torch.arange(len(p_BV), device=p_BV.device), 1)
    return token_B1.squeeze(1)
