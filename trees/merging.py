"""Several drafts in one tree: shared prefixes are one path, and every source keeps the q that it drew from.

A node that two sources propose is one node for the target and the caches, and two tests for the verification
(`specdec.acceptance.families`). Which nodes of a drawn source a budget leaves out depends on nothing but what was drawn
before them, in the order of drawing, and on sources before this one: anything else is biased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trees.draft import LEFT_OUT, Draft, Part
from trees.tree import ROOT, TokenTree, TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """One draft made of several.

    Args:
        draft: to be verified.
        nodes: for each source and row the merged node of every node of its own, `LEFT_OUT` for those that have none.
    """

    draft: Draft
    nodes: Sequence[Sequence[Sequence[int]]]

    def own_paths(self, source: int, paths: Sequence[Sequence[int]]) -> list[list[int]]:
        """What a source itself drafted of some paths through the merged trees: from the root down, its own nodes.

        Args:
            paths: for each row, nodes of the merged tree from the root down.
        """
        return [_own_path(nodes, path) for nodes, path in zip(self.nodes[source], paths, strict=True)]


def merge(drafts: Sequence[Draft], *, budget: int | None = None, grown_by: int | None = None) -> Merged:
    """Merge drafts for the same rows into one tree a row. As exact as its sources.

    Args:
        drafts: of the sources, in the order of their tests; they may themselves be merged.
        budget: see `Merger`.
        grown_by: the source whose nodes have passed lower layers of the target, if one has: the merged draft then has
            the `grown_indices` of its nodes.

    Raises:
        ValueError: as of `Merger.add`.
    """
    if not drafts:
        raise ValueError("merge([]): there is nothing to merge")
    merger = Merger(drafts[0].trees.num_rows, budget)
    for draft in drafts:
        merger.add(draft)
    return merger.finish(grown_by)


class Merger:
    """Merges drafts one after the other.

    Sources are tested in the order in which they are added. If a source looked at what another one drew (at how much
    room it has left, for instance), it must be added after it.

    Args:
        num_rows: rows of every draft.
        budget: most nodes of a row. Later sources get what is left: of a drawn tree the nodes of the greatest values,
            of a drawn chain the first ones, of a deterministic tree the likeliest paths (the first layers, if it has no
            probabilities). None: no limit.
    """

    def __init__(self, num_rows: int, budget: int | None = None):
        self._budget = budget
        self._rows = [_MergedRow() for _ in range(num_rows)]
        self._drafts: list[Draft] = []
        self._nodes: list[list[list[int]]] = []

    def within_budget(self, max_depths: Sequence[int]) -> list[int]:
        """For each row how deep the next source may draft, so that there is room for a chain of its own."""
        if self._budget is None:
            return list(max_depths)
        return [min(depth, self._budget - len(row.tokens)) for depth, row in zip(max_depths, self._rows, strict=True)]

    def add(self, draft: Draft) -> None:
        """Merge one more source's draft.

        Raises:
            ValueError: a drawn tree that is no chain and has no values is over the budget: what could be cut off it
                without bias is not known.
        """
        self._nodes.append([_add(row, draft, index, self._budget) for index, row in enumerate(self._rows)])
        self._drafts.append(draft)

    def finish(self, grown_by: int | None = None) -> Merged:
        """All drafts in one; a draft that nothing was added to or taken from is returned as it is."""
        pairs = zip(self._drafts, self._nodes, strict=True)
        parts = [Part(draft=draft, nodes=nodes) for draft, nodes in pairs if draft.trees.width]
        source = None if grown_by is None else self._drafts[grown_by]
        if len(parts) == 1 and parts[0].is_whole and source in (None, parts[0].draft):
            return Merged(draft=parts[0].draft, nodes=self._nodes)
        trees = TreeBatch.stack([row.tree() for row in self._rows], self._drafts[0].trees.device)
        indices = (
            None if grown_by is None else _grown_indices(self._drafts[grown_by], self._nodes[grown_by], self._rows)
        )
        draft = Draft(trees=trees, parts=parts if trees.width else None, grown_indices=indices)
        return Merged(draft=draft, nodes=self._nodes)


@dataclass(eq=False)
class _MergedRow:
    """The merged tree of one row while sources are added."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _index: dict[tuple[int, int], int] = field(default_factory=dict)

    def find(self, parent: int, token: int) -> int | None:
        return self._index.get((parent, token))

    def put(self, parent: int, token: int) -> int:
        """The node of this token below this parent, which is made if there is none."""
        node = self._index.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def tree(self) -> TokenTree:
        return TokenTree(tokens=self.tokens, parents=self.parents)


def _add(row: _MergedRow, draft: Draft, index: int, budget: int | None) -> list[int]:
    """Add a source's tree for a row; returns the merged node of each of its own.

    Whether there is room for a drawn node is settled before its token is looked at, even if the token turns out to be
    in the tree already. A deterministic node that is in the tree costs nothing.
    """
    if not draft.trees.sizes[index]:
        return []
    tree = draft.trees.row(index)
    merged = [LEFT_OUT] * len(tree)
    for node in _in_order(draft, tree, len(tree) if budget is None else budget - len(row.tokens)):
        parent = tree.parents[node]
        above = ROOT if parent == ROOT else merged[parent]
        token = int(tree.tokens[node])
        if budget is not None and len(row.tokens) >= budget:
            if draft.is_drawn:
                break
            if above == LEFT_OUT or row.find(above, token) is None:
                continue
        merged[node] = row.put(above, token)
    return merged


def _in_order(draft: Draft, tree: TokenTree, room: int) -> Sequence[int]:
    """A source's nodes, those first that are to be kept where there is no room for all; parents before children."""
    if len(tree) <= room:
        return range(len(tree))
    if draft.is_drawn:
        if tree.values is not None:
            values = tree.values
            return sorted(range(len(tree)), key=lambda node: -values[node])
        if list(tree.parents) != list(range(ROOT, len(tree) - 1)):
            raise ValueError(
                f"a drawn tree of {len(tree)} nodes has room for {room} of them, and no values that say which to leave "
                "out without bias: give its drafter a smaller tree or a chain, or the merged tree a larger budget"
            )
        return range(len(tree))
    if tree.probs is None:
        return sorted(range(len(tree)), key=lambda node: tree.depths[node])
    reach: list[float] = []
    for parent, prob in zip(tree.parents, tree.probs, strict=True):
        reach.append(min(prob, 1.0) * (1.0 if parent == ROOT else reach[parent]))
    return sorted(range(len(tree)), key=lambda node: -reach[node])


def _own_path(nodes: Sequence[int], path: Sequence[int]) -> list[int]:
    own_of = {merged: own for own, merged in enumerate(nodes)}
    own_path = []
    for merged in path:
        if merged not in own_of:
            break
        own_path.append(own_of[merged])
    return own_path


def _grown_indices(draft: Draft, nodes: Sequence[Sequence[int]], rows: Sequence[_MergedRow]) -> list[list[int]]:
    grown_indices = [[-1] * len(row.tokens) for row in rows]
    for row, own_nodes in enumerate(nodes):
        for own, merged in enumerate(own_nodes):
            if merged != LEFT_OUT:
                grown_indices[row][merged] = own if draft.grown_indices is None else draft.grown_indices[row][own]
    return grown_indices


def flattened(draft: Draft) -> Iterator[Part]:
    """The drafts that a merged one comes from in the end, in the order in which they are tested.

    Parts that were merged themselves are resolved; their nodes are those of the whole tree.
    """
    for part in draft.parts or ():
        if part.draft.parts is None:
            yield part
        for inner in flattened(part.draft):
            outer = [
                [LEFT_OUT if node == LEFT_OUT else nodes[node] for node in row]
                for nodes, row in zip(part.nodes, inner.nodes, strict=True)
            ]
            yield Part(draft=inner.draft, nodes=outer)
