"""Chains with leaves: a chain, and beside its tokens others that nothing follows.

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


def chain_with_leaves(tokens: Sequence[int], probs: Sequence[float], leaves: Sequence[Leaf]) -> TokenTree:
    """The chain, then the leaves: the nodes that the drafter has forwarded stand where it forwarded them."""
    return TokenTree(
        tokens=[*tokens, *(leaf.token for leaf in leaves)],
        parents=[*range(ROOT, len(tokens) + ROOT), *(leaf.slot + ROOT for leaf in leaves)],
        probs=[*probs, *(leaf.prob for leaf in leaves)],
    )


def chain_length(tree: TokenTree) -> int:
    """Nodes of the chain: those before the first that does not follow the one before it."""
    return next((node for node, parent in enumerate(tree.parents) if parent != node + ROOT), len(tree))


def chain_grown_indices(trees: Sequence[TokenTree], num_scored: int | None = None) -> list[list[int]] | None:
    """`Draft.grown_indices` of chains with leaves.

    Args:
        num_scored: tokens of every chain after which something was asked; None: all but the last of the longest chain.
    """
    lengths = list(map(chain_length, trees))
    if num_scored is None:
        if min(lengths) == max(lengths):
            return None
        num_scored = max(lengths) - 1
    return [
        [node if node < min(length, num_scored) else -1 for node in range(len(tree))]
        for length, tree in zip(lengths, trees, strict=True)
    ]
