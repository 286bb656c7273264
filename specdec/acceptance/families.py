"""Who is tested against whose q: the children that each source has drafted of each slot.

A plain draft has one source, itself. A *merged* draft (`trees.merge`) has several: every source's child of a slot is
tested with the q that it was drawn from, sources in order, the children of each in the order of their draws. A token
that two sources propose is one node and two tests; when the second comes, the first has failed, which leaves nothing of
p at this token: it only takes its part out of p. What a source has drafted below a node was drawn given the same prefix
whichever test accepted the node, so it is tested like any other. A deterministic source is one whose q has all its
mass on the token that is being tested.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root), V vocabulary. A flat slot is `row * T + slot`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trees import Draft
from trees.draft import LEFT_OUT
from trees.merging import flattened
from trees.uploads import upload


class Family(NamedTuple):
    """The children that one source has drafted of one slot, in the order of their draws.

    Args:
        slot: the parent, in the merged tree.
        own: the parent's slot in the source's own tree.
        children: slots in the merged tree.
    """

    row: int
    slot: int
    own: int
    children: list[int]


def families_of(draft: Draft) -> list[tuple[Draft, list[Family]]]:
    """The families of every source, sources in the order of their tests."""
    if draft.parts is None:
        return [(draft, list(_own_families(draft)))]
    return [(part.draft, list(_merged_families(part.draft, part.nodes))) for part in flattened(draft)]


def _own_families(draft: Draft) -> Iterator[Family]:
    trees = draft.trees
    for row, (parents, size) in enumerate(zip(trees.host_parents_BN.tolist(), trees.sizes, strict=True)):
        children: dict[int, list[int]] = defaultdict(list)
        for node, parent in enumerate(parents[:size]):
            children[parent + 1].append(node + 1)
        yield from (Family(row, slot, slot, family) for slot, family in children.items())


def _merged_families(draft: Draft, nodes_of_rows: Sequence[Sequence[int]]) -> Iterator[Family]:
    for family in _own_families(draft):
        nodes = nodes_of_rows[family.row]
        kept = [nodes[child - 1] + 1 for child in family.children if nodes[child - 1] != LEFT_OUT]
        if kept:
            yield Family(family.row, nodes[family.own - 1] + 1 if family.own else 0, family.own, kept)


class Source(NamedTuple):
    """One source's draft, and its place in the trees that are verified.

    Args:
        own_BT: int64 the source's own slot for a slot of the tree; 0 where it has none.
    """

    draft: Draft
    own_BT: Tensor

    def q_at(self, depth: int, rows_N: Tensor, slots_N: Tensor, token_N1: Tensor, like_NV: Tensor) -> Tensor:
        """Its distributions [N, V] at some slots; of a deterministic source all mass on the token that it proposes."""
        if self.draft.is_drawn:
            return self.draft.q_at(depth, rows_N, self.own_BT[rows_N, slots_N])
        return torch.zeros_like(like_NV).scatter_(1, token_N1, 1)


class Links(NamedTuple):
    """One source's families as links between slots of the same row; 0 where there is none.

    Args:
        first_child_BT, next_sibling_BT: int64.
        most_siblings: size of its largest family below the slots of each depth.
    """

    source: Source
    first_child_BT: Tensor
    next_sibling_BT: Tensor
    most_siblings: list[int]


def links_of(draft: Draft) -> list[Links]:
    """The links of every source, sources in the order of their tests."""
    trees = draft.trees
    depths, found = trees.host_depths_BT, []
    for source, families in families_of(draft):
        links = np.zeros((3, trees.num_rows, trees.num_slots), np.int64)
        most_siblings = [0] * (trees.depth + 1)
        for row, slot, own, children in families:
            links[0, row, slot], links[1, row, slot] = own, children[0]
            links[2, row, children[:-1]] = children[1:]
            depth = depths[row, slot]
            most_siblings[depth] = max(most_siblings[depth], len(children))
        own_BT, first_child_BT, next_sibling_BT = upload(links, trees.device)
        found.append(Links(Source(source, own_BT), first_child_BT, next_sibling_BT, most_siblings))
    return found


def most_tests(draft: Draft) -> int:
    """Of the tests that a row can come to, children of the root and of whatever is kept, as many as there can be."""
    tests: dict[tuple[int, int], int] = defaultdict(int)
    most = 0
    for row, slot, _, children in _own_families(draft):
        for rank, child in enumerate(children, 1):
            tests[row, child] = tests[row, slot] + rank
            most = max(most, tests[row, child])
    return most


class Contest(NamedTuple):
    """Children of one depth, source and rank, which are tested together; the largest families come first.

    Args:
        parents_N, children_N: int64 flat slots.
        is_first_N: bool, whether this is the child's first test.
    """

    depth: int
    source: Source
    rank: int
    parents_N: Tensor
    children_N: Tensor
    is_first_N: Tensor


def contests_of(draft: Draft) -> list[Contest]:
    """From the root down; at each slot sources in order, and the children of each in theirs."""
    trees, sources = draft.trees, [links.source for links in links_of(draft)]
    groups: dict[tuple[int, int], list[Family]] = defaultdict(list)
    for number, (_, families) in enumerate(families_of(draft)):
        for family in families:
            groups[int(trees.host_depths_BT[family.row, family.slot]), number].append(family)
    heads, tests, seen = [], [], set[int]()
    for (depth, number), group in sorted(groups.items(), key=lambda item: item[0]):
        group.sort(key=lambda family: -len(family.children))
        for rank in range(len(group[0].children)):
            pairs = [_flat(trees.num_slots, family, rank) for family in group if rank < len(family.children)]
            tests += [(parent, child, child not in seen) for parent, child in pairs]
            seen.update(child for _, child in pairs)
            heads.append((depth, sources[number], rank, len(pairs)))
    if not tests:
        return []
    columns = upload(tests, trees.device).T.contiguous()  # one upload for all contests
    parts = columns.split([count for *_, count in heads], 1)
    return [
        Contest(depth, source, rank, parents_N, children_N, is_first_N.bool())
        for (depth, source, rank, _), (parents_N, children_N, is_first_N) in zip(heads, parts, strict=True)
    ]


def _flat(num_slots: int, family: Family, rank: int) -> tuple[int, int]:
    return family.row * num_slots + family.slot, family.row * num_slots + family.children[rank]
