"""Which nodes of a *merged* draft survive (`trees.merge`): pure functions, as in `acceptance.py`.

Every source's child of a slot is tested with the q that it was drawn from, sources in order, the children of each in
the order of their draws. A token that two sources propose is one node and two tests; when the second comes, the first
has failed, which leaves nothing of p at this token: it only takes its part out of p. What a source has
drafted below a node was drawn given the same prefix whichever test accepted the node, so it is tested like any other. A
deterministic source is one whose q has all its mass on the token that is being tested.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), F = B * T slots of all rows, I slots that have
children, D depth, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec import acceptance
from specdec.acceptance import Acceptance
from trees import Draft
from trees.growth import LEFT_OUT
from trees.merging import flattened


def topdown(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Multi-round residual verification (see `acceptance.topdown`) of a merged draft.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    trees = draft.trees
    sources = _sources(draft)
    tokens_BT = torch.nn.functional.pad(trees.tokens_BN, (1, 0))
    rows_B = torch.arange(trees.num_rows, device=trees.device)
    slot_B, counts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B)
    arrived_B = torch.ones_like(rows_B, dtype=torch.bool)
    path, left_BV = [], scores_BTV[:, 0]
    for depth in range(trees.depth + 1):
        here_B, open_B = slot_B, arrived_B
        left_BV = torch.where(open_B[:, None], scores_BTV[rows_B, here_B].softmax(-1), left_BV)
        arrived_B = torch.zeros_like(open_B)
        for source in sources:
            child_B = torch.where(open_B, source.first_child_BT[rows_B, here_B], 0)
            q_BV = None
            for _ in range(source.most_siblings[depth]):
                if acceptance._none(child_B > 0):
                    break
                token_B1 = tokens_BT.gather(1, child_B[:, None])
                if q_BV is None or not source.draft.is_drawn:
                    q_BV = source.q_at(depth, rows_B, here_B, token_B1, left_BV)
                scale_B = left_BV.sum(-1) / q_BV.sum(-1)
                chance_B = (left_BV.gather(1, token_B1) / q_BV.gather(1, token_B1))[:, 0] / scale_B
                kept_B = acceptance._throw(torch.where(child_B > 0, chance_B, 0), generator)
                slot_B, arrived_B, open_B = torch.where(kept_B, child_B, slot_B), arrived_B | kept_B, open_B & ~kept_B
                refused_B = (child_B > 0) & ~kept_B
                residual_BV = left_BV.addcmul(q_BV, scale_B[:, None], value=-1).clamp_min_(0)
                # nothing is left only where p == q, and then the refusal was a rounding accident
                left_BV = torch.where((refused_B & (residual_BV.sum(-1) > 0))[:, None], residual_BV, left_BV)
                q_BV = q_BV.scatter(1, token_B1, 0)
                child_B = torch.where(refused_B, source.next_sibling_BT[rows_B, child_B], 0)
        if depth == trees.depth:
            break
        path.append((slot_B - 1).clamp_min(0))
        counts_B += arrived_B
        if acceptance._none(arrived_B):
            break
    return Acceptance(path_BD=torch.stack(path, 1), counts_B=counts_B, next_B=acceptance._draw_one(left_BV, generator))


def traversal(draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None = None) -> Acceptance:
    """Traversal verification (see `acceptance.traversal`) of a merged draft.

    A node is entered by the first of its tests. The others come when it has been dropped: then they have no chance.

    Args:
        scores_BTV: float32 processed scores of the target after each slot; p is their softmax.
    """
    trees = draft.trees
    scores_FV = scores_BTV.flatten(0, 1)
    tokens_F = torch.nn.functional.pad(trees.tokens_BN, (1, 0)).flatten()
    slots_I = torch.from_numpy(np.unique(_flat_parents(draft))).to(trees.device)
    index_F = torch.full_like(tokens_F, -1)
    index_F[slots_I] = torch.arange(len(slots_I), device=trees.device)
    p_IV = scores_FV.index_select(0, slots_I).softmax(-1)
    mass_I, reach_F = p_IV.new_ones(len(p_IV)), p_IV.new_ones(len(scores_FV))
    tiny = torch.finfo(p_IV.dtype).tiny
    for contest in _contests(draft):
        slots_N, token_N1 = contest.parents_N, tokens_F[contest.children_N].unsqueeze(1)
        index_N = index_F[slots_N]
        p_NV, mass_N, reach_N = p_IV[index_N], mass_I[index_N].clamp_min(tiny), reach_F[slots_N]
        source = contest.source
        if contest.rank == 0 or not source.draft.is_drawn:
            rows_N, places_N = slots_N // trees.num_slots, slots_N % trees.num_slots
            q_NV = source.q_at(contest.depth, rows_N, places_N, token_N1, p_NV)
        else:
            q_NV = q_NV[: len(slots_N)]
        scale_N = mass_N / q_NV.sum(-1)
        chance_N = reach_N * (p_NV.gather(1, token_N1) / q_NV.gather(1, token_N1))[:, 0] / scale_N
        is_new_N = contest.is_first_N
        reach_F[contest.children_N[is_new_N]] = chance_N[is_new_N].clamp_max(1)
        p_NV = p_NV.addcmul(q_NV, torch.where(reach_N > 0, scale_N / reach_N, 0)[:, None], value=-1).clamp_min_(0)
        p_IV[index_N], mass_I[index_N] = p_NV, p_NV.sum(-1)
        left_N = reach_N * mass_I[index_N] / mass_N
        reach_F[slots_N] = left_N / (left_N + 1 - reach_N).clamp_min(tiny)
        q_NV = q_NV.scatter(1, token_N1, 0)
    kept_BT = acceptance._throw(reach_F, generator).view(trees.num_rows, -1)
    kept_beneath_BT = (trees.ancestors_BTT & (kept_BT & trees.real_BT).unsqueeze(2)).any(1)
    path_BD, counts_B, last_B = acceptance._descend(trees, kept_beneath_BT[:, 1:])
    last_B = last_B + torch.arange(trees.num_rows, device=trees.device) * trees.num_slots
    index_B = index_F[last_B]
    left_BV = torch.where((index_B >= 0)[:, None], p_IV.index_select(0, index_B.clamp_min(0)), 0)
    p_BV = acceptance._or_else(left_BV, scores_FV.index_select(0, last_B).softmax(-1))
    return Acceptance(path_BD=path_BD, counts_B=counts_B, next_B=acceptance._draw_one(p_BV, generator))


class _Source(NamedTuple):
    """One source of a merged draft, in slots of the merged trees.

    Args:
        own_BT: int64 the source's own slot; 0 where it has none.
        first_child_BT: int64 its first child of a slot; 0 if it has none.
        next_sibling_BT: int64 its next child of the same parent; 0 if there is none.
        most_siblings: size of its largest family below the slots of each depth of the merged trees.
    """

    draft: Draft
    own_BT: Tensor
    first_child_BT: Tensor
    next_sibling_BT: Tensor
    most_siblings: list[int]

    def q_at(self, depth: int, rows_N: Tensor, slots_N: Tensor, token_N1: Tensor, like_NV: Tensor) -> Tensor:
        """Its distributions at some slots; of a deterministic source all mass on the token that it proposes."""
        if self.draft.is_drawn:
            return self.draft.q_at(depth, rows_N, self.own_BT[rows_N, slots_N])
        return torch.zeros_like(like_NV).scatter_(1, token_N1, 1)


def _families(draft: Draft) -> Iterator[tuple[Draft, list[tuple[int, int, int, list[int]]]]]:
    """For each source the children that it has of merged slots, in order: (row, slot, own slot, children)."""
    for part in flattened(draft):
        families = []
        for row, nodes in enumerate(part.nodes):
            if not nodes:
                continue
            for own, children in enumerate(part.draft.trees.row(row).children):
                kept = [nodes[child] + 1 for child in children if nodes[child] != LEFT_OUT]
                if kept:
                    families.append((row, nodes[own - 1] + 1 if own else 0, own, kept))
        yield part.draft, families


def _sources(draft: Draft) -> list[_Source]:
    trees = draft.trees
    depths = trees.host_depths_BT
    sources = []
    for source, families in _families(draft):
        links = np.zeros((3, trees.num_rows, trees.num_slots), np.int64)
        most_siblings = [0] * (trees.depth + 1)
        for row, slot, own, children in families:
            links[0, row, slot] = own
            links[1, row, slot] = children[0]
            links[2, row, children[:-1]] = children[1:]
            depth = depths[row, slot]
            most_siblings[depth] = max(most_siblings[depth], len(children))
        own_BT, first_child_BT, next_sibling_BT = torch.from_numpy(links).to(trees.device)
        sources.append(_Source(source, own_BT, first_child_BT, next_sibling_BT, most_siblings))
    return sources


class _Contest(NamedTuple):
    """Children of one depth, source and rank, which are tried together; the largest families come first.

    Args:
        parents_N: int64 flat slots, as are the children.
        is_first_N: bool: whether this is the child's first test.
    """

    depth: int
    source: _Source
    rank: int
    parents_N: Tensor
    children_N: Tensor
    is_first_N: Tensor


def _flat_parents(draft: Draft) -> list[int]:
    num_slots = draft.trees.num_slots
    return [row * num_slots + slot for _, families in _families(draft) for row, slot, _, _ in families]


def _contests(draft: Draft) -> list[_Contest]:
    """From the root down; at each slot sources in order, and the children of each in theirs."""
    trees = draft.trees
    by_depth: dict[tuple[int, int], list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for number, (_, families) in enumerate(_families(draft)):
        for row, slot, _, children in families:
            first = row * trees.num_slots
            flat = [first + child for child in children]
            by_depth[int(trees.host_depths_BT[row, slot]), number].append((first + slot, flat))
    sources, contests, seen = _sources(draft), [], set[int]()
    for (depth, number), group in sorted(by_depth.items(), key=lambda item: item[0]):
        group.sort(key=lambda family: -len(family[1]))
        for rank in range(len(group[0][1])):
            taking = [(parent, children[rank]) for parent, children in group if rank < len(children)]
            parents_N, children_N = torch.tensor(taking, device=trees.device).unbind(1)
            is_first_N = torch.tensor([child not in seen for _, child in taking], device=trees.device)
            seen.update(child for _, child in taking)
            contests.append(_Contest(depth, sources[number], rank, parents_N, children_N, is_first_N))
    return contests
