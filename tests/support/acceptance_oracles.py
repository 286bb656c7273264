"""What verification of a drawn tree must do: the distribution of its outcomes in rational arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from specdec.acceptance import Acceptance
from trees import ROOT, TokenTree, TreeBatch

NUM_ROWS = 50_000
Distribution = Sequence[Fraction]
Outcome = tuple[tuple[int, ...], int]
TREES = {
    "leaf": TokenTree(tokens=[2], parents=[ROOT]),
    "chain": TokenTree.chain([1, 0, 3]),
    "fork": TokenTree(tokens=[1, 3], parents=[ROOT, ROOT]),
    "star of all tokens": TokenTree(tokens=[2, 0, 3, 1], parents=[ROOT] * 4),
    "bush": TokenTree(tokens=[0, 2, 1, 3, 0, 2, 2], parents=[ROOT, ROOT, 0, 0, 1, 1, 3]),
}


def random_distributions(num_slots: int, vocab_size: int, seed: int, zeros: bool = False) -> list[Distribution]:
    """Rational distributions; with `zeros` about a third of the entries is 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 12, (num_slots, vocab_size), generator=generator)
    if zeros:
        weights[torch.rand(weights.shape, generator=generator) < 0.35] = 0
        weights[:, 0].clamp_(min=1)
    return [[Fraction(weight, sum(row)) for weight in row] for row in weights.tolist()]


def residual(p: Distribution, q: Distribution) -> Distribution:
    left = [max(p_x - q_x, Fraction(0)) for p_x, q_x in zip(p, q, strict=True)]
    return [mass / sum(left) for mass in left]


def without(q: Distribution, token: int) -> Distribution:
    left = [Fraction(0) if x == token else q_x for x, q_x in enumerate(q)]
    return [mass / sum(left) for mass in left] if any(left) else left


def topdown_oracle(tree: TokenTree, p: Sequence[Distribution], q: Sequence[Distribution]) -> dict[Outcome, Fraction]:
    """Probability of every outcome of multi-round residual verification."""
    outcomes: Counter[Outcome] = Counter()

    def visit(slot: int, path: tuple[int, ...], weight: Fraction) -> None:
        target, draft = p[slot], q[slot]
        for child in tree.children[slot]:
            token = tree.tokens[child]
            kept = min(Fraction(1), target[token] / draft[token])
            visit(child + 1, (*path, child), weight * kept)
            weight *= 1 - kept
            if not weight:
                return
            target, draft = residual(target, draft), without(draft, token)
        for token, mass in enumerate(target):
            outcomes[path, token] += weight * mass

    visit(0, (), Fraction(1))
    return outcomes


def as_scores(rows: Sequence[Distribution], *shape: int | None) -> Tensor:
    """Scores of which these distributions are the softmax."""
    return as_batch(rows, *shape).log()


def as_batch(rows: Sequence[Distribution], num_rows: int = NUM_ROWS, num_slots: int | None = None) -> Tensor:
    """float32 [num_rows, T, V]: the same distributions in every row, with slots of zeros up to `num_slots`."""
    probs_TV = torch.tensor([[float(x) for x in row] for row in rows])
    probs_TV = torch.nn.functional.pad(probs_TV, (0, 0, 0, (num_slots or len(rows)) - len(rows)))
    return probs_TV.expand(num_rows, *probs_TV.shape)


def repeated(tree: TokenTree, num_rows: int = NUM_ROWS) -> TreeBatch:
    """The same tree in every row."""
    one = TreeBatch.stack([tree])
    return TreeBatch(
        tokens_BN=one.tokens_BN.expand(num_rows, -1),
        parents_BN=one.parents_BN.expand(num_rows, -1),
        sizes=one.sizes * num_rows,
        depth=one.depth,
        is_chain=one.is_chain,
    )


def outcomes_of(acceptance: Acceptance) -> list[Outcome]:
    paths, counts = acceptance.path_BD.tolist(), acceptance.counts_B.tolist()
    return [
        (tuple(path[:count]), token)
        for path, count, token in zip(paths, counts, acceptance.next_B.tolist(), strict=True)
    ]


def traversal_oracle(
    tree: TokenTree, p: Sequence[Sequence[Fraction]], q: Sequence[Sequence[Fraction]]
) -> dict[tuple[tuple[int, ...], int], Fraction]:
    """Probability of every outcome, by walking through the tree as the paper's algorithm does."""
    outcomes: Counter = Counter()
    one = Fraction(1)

    def visit(slot: int, path: tuple[int, ...], reach: Fraction, arrived: Fraction) -> Fraction:
        """Try the subtree of a slot, arrived at with a probability; returns the probability of refusing all of it."""
        target, draft = list(p[slot]), list(q[slot])
        for child in tree.children[slot]:
            token = tree.tokens[child]
            child_reach = min(one, reach * target[token] / draft[token])
            arrived = visit(child + 1, (*path, child), child_reach, arrived)
            if not arrived:
                return arrived
            left = [max(reach * p_x - q_x, Fraction(0)) for p_x, q_x in zip(target, draft, strict=True)]
            mass = sum(left)
            reach = mass / (mass + 1 - reach)
            target = [x / mass for x in left] if mass else target
            draft[token] = Fraction(0)
            draft = [x / sum(draft) for x in draft] if any(draft) else draft
        for token, mass in enumerate(target):
            outcomes[path, token] += arrived * reach * mass
        return arrived * (1 - reach)

    assert visit(0, (), one, one) == 0
    return outcomes


def sequences_without_replacement(q: Sequence[Fraction], count: int) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    if not count:
        yield (), Fraction(1)
        return
    for first, mass in enumerate(q):
        if mass:
            rest = [Fraction(0) if x == first else q_x / (1 - mass) for x, q_x in enumerate(q)]
            for tail, chance in sequences_without_replacement(rest, count - 1):
                yield (first, *tail), mass * chance
