"""Which continuations of a text are likely, from how often each followed before.

The chance of a token is estimated as text compressors do it (prediction by partial matching: Cleary & Witten 1984;
escapes of method C: Moffat 1990; interpolated over the lengths of context). A context of k tokens that was followed T
times, by D different tokens, gives each of these its count over T + D, and leaves D / (T + D) to the context of k - 1
tokens. Shorter contexts than `shortest` are not asked: what is left then belongs to tokens unknown.

So a long context that always went on in one way makes a long narrow tree, a short or an ambiguous one a bushy tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.drafters.lookup.suffix_automaton import Context, SuffixAutomaton
from trees import ROOT, TokenTree

_NEGLIGIBLE = 1 / 128
"""Shorter contexts are not asked about less than this. A context leaves half or less: at most seven are asked."""

_MAX_FOLLOWERS = 64
"""Of a context that more tokens have followed, only the first ones seen are looked at."""


class Continuation(NamedTuple):
    """A token that may come next: its estimated probability, and the longest known context that ends in it."""

    prob: float
    context: Context


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row's continuations are copied from: what of `text` stands at the row's end, and how deep to draft."""

    text: SuffixAutomaton
    context: Context
    max_depth: int


def predict(text: SuffixAutomaton, context: Context, shortest: int) -> dict[int, Continuation]:
    """Tokens that followed the context, or the shorter ones in it, and how likely each is to come next.

    Args:
        shortest: length of the shortest context that is asked, positive.
    """
    found: dict[int, Continuation] = {}
    left = 1.0
    while context.length >= shortest and left > _NEGLIGIBLE:
        shorter = text.shorter(context.state)
        followers = text.followers(context.state, _MAX_FOLLOWERS)
        if followers:
            counts = [text.count(state) for state in followers.values()]
            total, num_lengths = sum(counts), context.length - max(shorter.length, shortest - 1)
            escaped = left * (len(followers) / (total + len(followers))) ** num_lengths
            for (token, state), count in zip(followers.items(), counts, strict=True):
                known = found.get(token, Continuation(0.0, Context(state, context.length + 1)))
                found[token] = known._replace(prob=known.prob + (left - escaped) * count / total)
            left = escaped
        context = shorter
    return found


def likeliest_paths(sources: Sequence[Source], *, budget: int, shortest: int, vocab_size: int) -> list[TokenTree]:
    """The `budget` likeliest nodes of all rows together, the more recent ones on ties: one tree a row.

    A node is as likely as its whole path. Only tokens from 0 up to `vocab_size` are taken.
    """
    trees = [_GrowingTree(row, source, shortest, vocab_size) for row, source in enumerate(sources)]
    heap = [candidate for tree in trees for candidate in tree.below_root()]
    heapq.heapify(heap)
    for _ in range(budget):
        if not heap:
            break
        best = heapq.heappop(heap)
        for candidate in trees[best.row].add(best):
            heapq.heappush(heap, candidate)
    return [tree.finish() for tree in trees]


class _Candidate(NamedTuple):
    """A node that may be taken next. The smaller one of two is to be taken first."""

    neg_reach: float
    neg_recent: int
    row: int
    parent: int
    depth: int
    token: int
    continuation: Continuation


class _GrowingTree:
    """One row's tree, taken from the root down."""

    def __init__(self, row: int, source: Source, shortest: int, vocab_size: int):
        self._row = row
        self._source = source
        self._shortest = shortest
        self._vocab_size = vocab_size
        self._nodes: list[_Candidate] = []

    def below_root(self) -> list[_Candidate]:
        return self._children(ROOT, depth=0, reach=1.0, context=self._source.context)

    def add(self, node: _Candidate) -> list[_Candidate]:
        """Take a node; returns its children."""
        self._nodes.append(node)
        return self._children(len(self._nodes) - 1, node.depth, -node.neg_reach, node.continuation.context)

    def finish(self) -> TokenTree:
        return TokenTree(
            tokens=[node.token for node in self._nodes],
            parents=[node.parent for node in self._nodes],
            probs=[node.continuation.prob for node in self._nodes],
            values=[-node.neg_reach for node in self._nodes],
        )

    def _children(self, parent: int, depth: int, reach: float, context: Context) -> list[_Candidate]:
        if depth == self._source.max_depth:
            return []
        text = self._source.text
        return [
            _Candidate(
                neg_reach=-reach * continuation.prob,
                neg_recent=-text.position_after(continuation.context.state),
                row=self._row,
                parent=parent,
                depth=depth + 1,
                token=token,
                continuation=continuation,
            )
            for token, continuation in predict(text, context, self._shortest).items()
            if 0 <= token < self._vocab_size
        ]
