"""Acceptance against oracles: rational arithmetic for what must happen, many rows in one batch for what does.

A fixed draft has a distribution of outcomes (accepted path, next token), which `topdown_oracle` works out exactly
from the definition. One test shows that the definition is lossless, the others that the code follows it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from specdec.acceptance import coins, draw, topdown, walk
from tests.support.acceptance_oracles import (
    NUM_ROWS,
    TREES,
    Outcome,
    as_batch,
    as_scores,
    outcomes_of,
    random_distributions,
    repeated,
    topdown_oracle,
    without,
)
from tests.support.enumeration import ToyModel, grow
from tests.support.goodness import assert_drawn_from
from trees import ROOT, Draft, Fixed, TokenTree, TreeBatch

# the definition


def test_the_oracle_is_lossless():
    """Over all drafts of two siblings with a child each, the first two tokens are distributed as the target's."""
    vocab = range(3)
    p = dict(zip([(), *((x,) for x in vocab)], random_distributions(4, 3, seed=1), strict=True))
    q = dict(zip([(), *((x,) for x in vocab)], random_distributions(4, 3, seed=2), strict=True))
    joint: Counter[tuple[int, int]] = Counter()
    for first, second in itertools.permutations(vocab, 2):
        for below_first, below_second in itertools.product(vocab, repeat=2):
            chance = q[()][first] * without(q[()], first)[second] * q[first,][below_first] * q[second,][below_second]
            tree = TokenTree(tokens=[first, second, below_first, below_second], parents=[ROOT, ROOT, 0, 1])
            leaf = [Fraction(1, 3)] * 3
            slots = [(), (first,), (second,)]
            for (path, token), mass in topdown_oracle(
                tree, [*(p[slot] for slot in slots), leaf, leaf], [*(q[slot] for slot in slots), leaf, leaf]
            ).items():
                committed = [*(tree.tokens[node] for node in path), token]
                if len(committed) > 1:
                    joint[committed[0], committed[1]] += chance * mass
                else:
                    for follower in vocab:
                        joint[token, follower] += chance * mass * p[token,][follower]
    assert joint == {(x, y): p[()][x] * p[x,][y] for x in vocab for y in vocab}


# topdown


@pytest.mark.rotated
@pytest.mark.parametrize("zeros", [False, True], ids=["full support", "holes in the target"])
@pytest.mark.parametrize("name", TREES)
def test_topdown_follows_the_oracle(name: str, zeros: bool):
    tree = TREES[name]
    # with these seeds second siblings are neither sure to be kept nor sure to be refused
    p = random_distributions(len(tree) + 1, 4, seed=58, zeros=zeros)
    q = random_distributions(len(tree) + 1, 4, seed=108)
    draft = Draft(trees=repeated(tree), q_BTV=as_batch(q))
    accepted = topdown(draft, as_scores(p), torch.Generator().manual_seed(5))
    assert_drawn_from(outcomes_of(accepted), topdown_oracle(tree, p, q), name)


def test_rows_of_one_batch_have_trees_of_their_own():
    kinds = [*TREES.values(), TokenTree(tokens=[], parents=[])]
    rows_each = 3_000
    num_slots = max(map(len, kinds)) + 1
    ps = [random_distributions(num_slots, 4, seed=10 + kind) for kind in range(len(kinds))]
    qs = [random_distributions(num_slots, 4, seed=20 + kind) for kind in range(len(kinds))]
    order = torch.randperm(rows_each * len(kinds), generator=torch.Generator().manual_seed(6))
    trees = [tree for tree in kinds for _ in range(rows_each)]
    draft = Draft(
        trees=TreeBatch.stack([trees[row] for row in order]),
        q_BTV=torch.cat([as_batch(q, rows_each) for q in qs])[order],
    )
    p_BTV = torch.cat([as_batch(p, rows_each) for p in ps])[order]
    found = outcomes_of(topdown(draft, p_BTV.log(), torch.Generator().manual_seed(7)))
    for kind, (tree, p, q) in enumerate(zip(kinds, ps, qs, strict=True)):
        own = [outcome for outcome, row in zip(found, order.tolist(), strict=True) if row // rows_each == kind]
        assert_drawn_from(own, topdown_oracle(tree, p, q), f"tree {kind}")


@pytest.mark.parametrize("branching", [(1, 1), (2, 1), (3, 2)], ids=str)
def test_drawn_trees_leave_the_target_distribution(branching: tuple[int, int]):
    """Trees are drawn from q here, so the committed tokens must follow p, whatever q is."""
    vocab_size, (num_first, num_second) = 5, branching
    generator = torch.Generator().manual_seed(8)
    p = as_batch(random_distributions(vocab_size + 1, vocab_size, seed=9), 1)[0]
    q = as_batch(random_distributions(vocab_size + 1, vocab_size, seed=10), 1)[0]
    first_BM = torch.multinomial(q[0].expand(NUM_ROWS, -1), num_first, generator=generator)
    second_BN = torch.multinomial(q[first_BM.flatten() + 1], num_second, generator=generator).view(NUM_ROWS, -1)
    parents = [ROOT] * num_first + [node for node in range(num_first) for _ in range(num_second)]
    trees = TreeBatch(
        tokens_BN=torch.cat([first_BM, second_BN], 1),
        parents_BN=torch.tensor(parents).expand(NUM_ROWS, -1),
        sizes=(len(parents),) * NUM_ROWS,
        depth=2,
        is_chain=branching == (1, 1),
    )
    contexts_BT = torch.cat([torch.zeros(NUM_ROWS, 1, dtype=torch.long), trees.tokens_BN + 1], 1)
    accepted = topdown(Draft(trees=trees, q_BTV=q[contexts_BT]), p[contexts_BT].log(), generator)
    pairs = []
    for tokens, (path, last) in zip(trees.tokens_BN.tolist(), outcomes_of(accepted), strict=True):
        committed = [*(tokens[node] for node in path), last]
        if len(committed) == 1:
            committed += torch.multinomial(p[last + 1], 1, generator=generator).tolist()
        pairs.append(tuple(committed[:2]))
    expected = {(x, y): float(p[0, x] * p[x + 1, y]) for x in range(vocab_size) for y in range(vocab_size)}
    assert_drawn_from(pairs, expected)


@pytest.mark.parametrize("name", TREES)
def test_equal_distributions_accept_the_first_child_all_the_way(name: str):
    tree = TREES[name]
    p_BTV = torch.rand(2_000, len(tree) + 1, 50, generator=torch.Generator().manual_seed(11)).softmax(-1)
    accepted = topdown(Draft(trees=repeated(tree, 2_000), q_BTV=p_BTV), p_BTV.log())
    leftmost: list[int] = []
    while children := tree.children[leftmost[-1] + 1 if leftmost else 0]:
        leftmost.append(children[0])
    assert {path for path, _ in outcomes_of(accepted)} == {tuple(leftmost)}


def test_disjoint_supports_accept_nothing():
    p = [[Fraction(0), Fraction(0), Fraction(1, 3), Fraction(2, 3)]] * 4
    q = [[Fraction(1, 4), Fraction(3, 4), Fraction(0), Fraction(0)]] * 4
    for tree in (TokenTree.chain([0, 1, 0]), TokenTree(tokens=[1, 0, 1], parents=[ROOT, ROOT, 0])):
        draft = Draft(trees=repeated(tree), q_BTV=as_batch(q))
        accepted = topdown(draft, as_scores(p), torch.Generator().manual_seed(12))
        assert_drawn_from(outcomes_of(accepted), {((), token): mass for token, mass in enumerate(p[0])})


def test_a_draft_that_has_used_up_its_support_leaves_the_residual():
    """Both tokens that the draft knows are tried; what is left of the target is not touched by the empty q."""
    p = [[Fraction(1, 10), Fraction(2, 10), Fraction(3, 10), Fraction(4, 10)]] * 3
    q = [[Fraction(1, 2), Fraction(1, 2), Fraction(0), Fraction(0)]] * 3
    tree = TokenTree(tokens=[0, 1], parents=[ROOT, ROOT])
    expected = topdown_oracle(tree, p, q)
    assert sum(expected.values()) == 1
    draft = Draft(trees=repeated(tree), q_BTV=as_batch(q))
    accepted = topdown(draft, as_scores(p), torch.Generator().manual_seed(13))
    assert_drawn_from(outcomes_of(accepted), expected)


@pytest.mark.parametrize("name", ["chain", "bush"])
def test_a_generator_reproduces_and_leaves_the_global_one_alone(name: str):
    tree = TREES[name]
    p_BTV, q_BTV = (as_batch(random_distributions(len(tree) + 1, 4, seed), 500) for seed in (14, 15))
    draft = Draft(trees=repeated(tree, 500), q_BTV=q_BTV)
    state = torch.get_rng_state()
    runs = [outcomes_of(topdown(draft, p_BTV.log(), torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_device_that_is_not_asked_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    """On a GPU no loop ends early."""
    monkeypatch.setattr(coins, "none", lambda mask: False)
    tree = TREES["bush"]
    p, q = (random_distributions(len(tree) + 1, 4, seed=seed) for seed in (58, 108))
    accepted = topdown(Draft(trees=repeated(tree), q_BTV=as_batch(q)), as_scores(p), torch.Generator().manual_seed(5))
    assert_drawn_from(outcomes_of(accepted), topdown_oracle(tree, p, q))
    grown = grow(Fixed((2, 2)), [ToyModel(1)], [9])
    assert topdown(grown, torch.zeros(1, grown.trees.num_slots, 3)).counts_B <= 2


def test_only_slots_on_the_way_are_looked_at():
    """Scores of refused nodes, and q of leaves, may be anything."""
    tree = TREES["bush"]
    p, q = ([[Fraction(1), Fraction(0), Fraction(0), Fraction(0)]] * (len(tree) + 1) for _ in range(2))
    scores_BTV, q_BTV = as_scores(p, 5).clone(), as_batch(q, 5).clone()
    off_the_way = [slot for slot in range(len(tree) + 1) if slot not in (0, 1)]
    scores_BTV[:, off_the_way], q_BTV[:, [5, 6, 7]] = torch.nan, torch.nan
    accepted = topdown(Draft(trees=repeated(tree, 5), q_BTV=q_BTV), scores_BTV)
    assert outcomes_of(accepted) == [((0,), 0)] * 5
    assert accepted.last_B.tolist() == [1] * 5


# walk and draw


def followed(tree: TokenTree, chosen: Sequence[int]) -> Outcome:
    """The definition of a walk."""
    path: list[int] = []
    slot = 0
    while children := [child for child in tree.children[slot] if tree.tokens[child] == chosen[slot]]:
        path.append(children[0])
        slot = children[0] + 1
    return tuple(path), chosen[slot]


def random_tree(generator: torch.Generator, chain: bool) -> TokenTree:
    size = int(torch.randint(0, 9, (), generator=generator))
    tokens = torch.randint(0, 3, (size,), generator=generator).tolist()
    if chain:
        return TokenTree.chain(tokens)
    parents = [int(torch.randint(ROOT, node, (), generator=generator)) for node in range(size)]
    return TokenTree(tokens=tokens, parents=parents)


@pytest.mark.parametrize("chain", [True, False], ids=["chains", "trees"])
def test_walk_follows_the_choice_for_as_long_as_the_tree_has_it(chain: bool):
    generator = torch.Generator().manual_seed(16)
    rows = [random_tree(generator, chain) for _ in range(2_000)]
    trees = TreeBatch.stack(rows)
    chosen_BT = torch.randint(0, 3, (len(rows), trees.num_slots), generator=generator)
    expected = [followed(tree, chosen) for tree, chosen in zip(rows, chosen_BT.tolist(), strict=True)]
    assert outcomes_of(walk(trees, chosen_BT)) == expected
    assert max(len(path) for path, _ in expected) >= 3


def test_walking_samples_is_lossless_on_trees_without_chance():
    """The tree is fixed, the target's samples are walked: first token p(x), second p(y | x) below a drafted x."""
    tree = TREES["bush"]
    p = random_distributions(len(tree) + 1, 4, seed=17)
    chosen_BT = draw(as_batch(p), torch.Generator().manual_seed(18))
    found = outcomes_of(walk(repeated(tree), chosen_BT))
    expected: Counter[Outcome] = Counter()

    def visit(slot: int, path: tuple[int, ...], weight: Fraction) -> None:
        below = {tree.tokens[child]: child for child in tree.children[slot]}
        for token, mass in enumerate(p[slot]):
            if token in below:
                visit(below[token] + 1, (*path, below[token]), weight * mass)
            else:
                expected[path, token] += weight * mass

    visit(0, (), Fraction(1))
    assert_drawn_from(found, expected)


def test_draw_is_the_draw_of_plain_decoding():
    p_B1V = torch.rand(7, 1, 20, generator=torch.Generator().manual_seed(19)).softmax(-1)
    drawn_B1 = draw(p_B1V, torch.Generator().manual_seed(20))
    assert torch.equal(drawn_B1, torch.multinomial(p_B1V[:, 0], 1, generator=torch.Generator().manual_seed(20)))


def test_no_draft_at_all_draws_from_the_target():
    p = random_distributions(1, 4, seed=21)
    draft = Draft(trees=TreeBatch.empty(NUM_ROWS), q_BTV=as_batch(p))
    accepted = topdown(draft, as_scores(p), torch.Generator().manual_seed(22))
    assert_drawn_from(outcomes_of(accepted), {((), token): mass for token, mass in enumerate(p[0])})
