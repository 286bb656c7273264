"""Combs: a chain, and beside its tokens others as leaves.

To verify one node more costs a target little, while another draft step costs the drafter a whole forward: so only the
chain is drafted from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trees.tree import ROOT, TokenTree


class Leaf(NamedTuple):
    """slot: of the chain, what it hangs on. prob: draft probability."""

    token: int
    prob: float
    slot: int


def comb(tokens: Sequence[int], probs: Sequence[float], leaves: Sequence[Leaf]) -> TokenTree:
    """The chain, then the leaves: the nodes that the drafter has passed stand where it passed them."""
    return TokenTree(
        tokens=[*tokens, *(leaf.token for leaf in leaves)],
        parents=[*range(ROOT, len(tokens) + ROOT), *(leaf.slot + ROOT for leaf in leaves)],
        probs=[*probs, *(leaf.prob for leaf in leaves)],
    )


def chain_length(tree: TokenTree) -> int:
    """Nodes of a comb's chain: those before the first that does not follow the one before it."""
    return next((node for node, parent in enumerate(tree.parents) if parent != node + ROOT), len(tree))


def comb_places(combs: Sequence[TokenTree]) -> list[list[int]] | None:
    """`Draft.places` of combs of which nothing was asked of the last token of the longest chain."""
    lengths = list(map(chain_length, combs))
    if min(lengths) == max(lengths):
        return None
    num_passed = max(lengths) - 1
    return [
        [node if node < min(length, num_passed) else -1 for node in range(len(tree))]
        for length, tree in zip(lengths, combs, strict=True)
    ]
