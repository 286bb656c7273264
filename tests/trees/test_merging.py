"""Drafts of several sources in one tree: what the tree is, and that its verification is lossless (by enumeration)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import trees.layered
import trees.token_source
from specdec import acceptance
from specdec.acceptance import coins as coins_module
from tests.support.acceptance_oracles import outcomes_of
from tests.support.enumeration import EXACT, LENGTH, MAX_DEPTH, Script, ToyModel, grow, prefixes
from tests.support.exact_rounds import CAUGHT, Enumeration, distributions
from trees import ROOT, Chain, ConfidentChain, Draft, DySpec, Fixed, GrowthPolicy, TokenTree, TreeBatch, merge
from trees.merging import flattened

VERIFIERS = {"topdown": acceptance.topdown, "traversal": acceptance.traversal}


@dataclass
class Drawn:
    """A draft model that samples."""

    model: ToyModel
    policy: GrowthPolicy

    def __call__(self, before: list[Draft]) -> Draft:
        return grow(self.policy, [self.model], [MAX_DEPTH])


@dataclass
class Told:
    """A source without chance, such as prompt lookup."""

    tree: TokenTree

    def __call__(self, before: list[Draft]) -> Draft:
        return Draft(trees=TreeBatch.stack([self.tree]))


Source = Callable[[list[Draft]], Draft]


def every_mix(sources: Sequence[Source], monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[Draft]]]:
    """All that the sources, asked in turn, can draw together, with the probabilities."""
    script, mixes = Script(), []
    monkeypatch.setattr(trees.layered, "batch_size", lambda batch, num_slots: 1)
    monkeypatch.setattr(trees.token_source, "draw_index", script.draw_index)
    while script.advance():
        drafts: list[Draft] = []
        for source in sources:
            drafts.append(source(drafts))
        mixes.append((script.prob, drafts))
    assert sum(prob for prob, _ in mixes) == pytest.approx(1, abs=EXACT)
    return mixes


def together(drafts: Sequence[Draft], numbers: Sequence[int]) -> Draft:
    """A batch whose rows are these drafts, of one row each."""
    batch = TreeBatch.stack([drafts[number].trees.row(0) for number in numbers])
    if not drafts[0].is_drawn:
        return Draft(trees=batch)
    q = [torch.nn.functional.pad(q_TV, (0, 0, 0, batch.num_slots - len(q_TV))) for q_TV in map(distributions, drafts)]
    return Draft(trees=batch, q_BTV=torch.stack([q[number] for number in numbers]))


def total_variation(
    mixes: Sequence[tuple[float, list[Draft]]],
    target: ToyModel,
    verify: str,
    monkeypatch: pytest.MonkeyPatch,
    budget: int | None = None,
) -> tuple[float, float]:
    """Between what is committed and p^L; and the expected number of accepted nodes."""
    merged_rows = [merge(drafts, budget=budget).draft.trees.row(0) for _, drafts in mixes]
    coins = Enumeration.of(merged_rows)
    index = {id(tree): number for number, tree in enumerate(merged_rows)}
    numbers = [index[id(tree)] for tree in coins.tree_of_row]
    drafts = [together([drafts[source] for _, drafts in mixes], numbers) for source in range(len(mixes[0][1]))]
    draft = merge(drafts, budget=budget).draft
    assert all(size == len(tree) for size, tree in zip(draft.trees.sizes, coins.tree_of_row, strict=True))
    p_BTV = torch.zeros((len(numbers), draft.trees.num_slots, target.vocab_size), dtype=torch.float64)
    p_of = [torch.stack([*map(target.probs, prefixes(tree))]) for tree in merged_rows]
    for row, number in enumerate(numbers):
        p_BTV[row, : len(p_of[number])] = p_of[number]
    monkeypatch.setattr(coins_module, "bernoulli", coins.throw)
    monkeypatch.setattr(coins_module, "sample", coins.draw_one)
    accepted = VERIFIERS[verify](draft, p_BTV.log())
    prob_B = torch.tensor([mixes[number][0] for number in numbers], dtype=torch.float64) * coins.weight_B
    texts, num_accepted = torch.zeros(target.vocab_size**LENGTH, dtype=torch.float64), 0.0
    groups: dict[tuple[int, ...], Tensor] = {}
    for (path, _), tree, prob, last_V in zip(
        outcomes_of(accepted), coins.tree_of_row, prob_B, coins.last_BV, strict=True
    ):
        text = tuple(tree.tokens[node] for node in path)
        groups[text] = groups.get(text, 0) + prob * last_V
        num_accepted += len(text) * float(prob)
    for text, last_V in groups.items():
        texts += target.completed(text, last_V)
    return float(0.5 * (texts - target.texts).abs().sum()), num_accepted


# what FIRST leaves of TARGET at the root has two tokens, so that there is something left to be wrong about
TARGET, FIRST, SECOND, THIRD = (ToyModel(seed) for seed in (57, 58, 59, 60))
TOLD = Told(TokenTree(tokens=[0, 2, 1, 1, 0], parents=[ROOT, ROOT, 0, 1, 2]))
MIXES: dict[str, list[Source]] = {
    "two chains": [Drawn(FIRST, Chain(2)), Drawn(SECOND, Chain(2))],
    "a chain and what is told": [Drawn(FIRST, Chain(3)), TOLD],
    "what is told and a chain": [TOLD, Drawn(FIRST, Chain(3))],
    "confident chains around what is told": [
        Drawn(FIRST, ConfidentChain(2, 0.4)),
        TOLD,
        Drawn(SECOND, ConfidentChain(2, 0.4)),
    ],
    "trees": [Drawn(FIRST, DySpec(3)), Drawn(SECOND, Fixed((2,)))],
    "siblings of one q": [Drawn(FIRST, Fixed((2,))), Drawn(FIRST, Fixed((2,)))],
    "all tokens": [Drawn(FIRST, Fixed((3,))), TOLD],
    "three": [Drawn(FIRST, Chain(1)), Drawn(SECOND, Fixed((2,))), Drawn(THIRD, Chain(2))],
    "one that is silent": [Told(TokenTree(tokens=[], parents=[])), Drawn(FIRST, DySpec(3))],
}


@pytest.mark.parametrize("name", MIXES)
def test_committed_tokens_are_distributed_as_the_targets(name: str, monkeypatch: pytest.MonkeyPatch):
    mixes, num_accepted = every_mix(MIXES[name], monkeypatch), {}
    for verify in VERIFIERS:
        error, num_accepted[verify] = total_variation(mixes, TARGET, verify, monkeypatch)
        assert error < EXACT, verify
    assert num_accepted["traversal"] >= num_accepted["topdown"] - EXACT


@pytest.mark.parametrize("budget", [1, 2, 3])
@pytest.mark.parametrize("name", ["two chains", "what is told and a chain", "a chain and a tree", "around"])
def test_a_budget_is_kept_without_bias(name: str, budget: int, monkeypatch: pytest.MonkeyPatch):
    sources: list[Source] = {
        **MIXES,
        "a chain and a tree": [Drawn(FIRST, Chain(2)), Drawn(SECOND, DySpec(3))],
        "around": [Drawn(FIRST, DySpec(2)), TOLD, Drawn(SECOND, ConfidentChain(2, 0.4))],
    }[name]
    mixes = every_mix(sources, monkeypatch)
    sizes = {merge(drafts, budget=budget).draft.trees.sizes[0] for _, drafts in mixes}
    assert max(sizes) == budget
    for verify in VERIFIERS:
        assert total_variation(mixes, TARGET, verify, monkeypatch, budget)[0] < EXACT, verify


def keep(draft: Draft, kept: Sequence[int]) -> Draft:
    """A draft cut down to these nodes."""
    tree = draft.trees.row(0)
    number = {ROOT: ROOT, **{node: index for index, node in enumerate(kept)}}
    cut = TokenTree(tokens=[tree.tokens[node] for node in kept], parents=[number[tree.parents[node]] for node in kept])
    return Draft(trees=TreeBatch.stack([cut]), q_BTV=distributions(draft)[[0, *(node + 1 for node in kept)]][None])


@dataclass
class Following:
    """A draft model whose length depends on what the source before it has drawn."""

    model: ToyModel

    def __call__(self, before: list[Draft]) -> Draft:
        length = before[0].trees.row(0).tokens[0]
        return keep(grow(Chain(2), [self.model], [MAX_DEPTH]), range(length))


@pytest.mark.parametrize("verify", VERIFIERS)
def test_later_sources_may_look_at_earlier_ones(verify: str, monkeypatch: pytest.MonkeyPatch):
    mixes = every_mix([Drawn(FIRST, Chain(2)), Following(SECOND)], monkeypatch)
    assert total_variation(mixes, TARGET, verify, monkeypatch)[0] < EXACT


# the check can fail


def in_the_wrong_order(drafts: list[Draft]) -> list[Draft]:
    """Biased: the source that looks at the other one's tokens is tested first."""
    return drafts[::-1]


def likelier_than_the_others(drafts: list[Draft]) -> list[Draft]:
    """Biased: the second source is left out where what it drew is unlikely."""
    second = drafts[1].trees.row(0)
    is_likely = len(second) and distributions(drafts[1])[0, second.tokens[0]] > 0.4
    return [drafts[0], keep(drafts[1], range(len(second) if is_likely else 0))]


def without_repetitions(drafts: list[Draft]) -> list[Draft]:
    """Biased: a token that the first source has drawn already is not tested for the second one."""
    first, second = (draft.trees.row(0).tokens for draft in drafts)
    return [drafts[0], keep(drafts[1], range(0 if first[:1] == second[:1] else len(second)))]


def all_of_one_q(drafts: list[Draft]) -> list[Draft]:
    """Biased: the second source is said to have drawn from the first one's q."""
    second = drafts[1]
    q_TV = distributions(second).clone()
    q_TV[0] = distributions(drafts[0])[0]
    return [drafts[0], Draft(trees=TreeBatch.stack([second.trees.row(0)]), q_BTV=q_TV[None])]


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("rule", [in_the_wrong_order, likelier_than_the_others, without_repetitions, all_of_one_q])
def test_biased_rules_are_caught(
    rule: Callable[[list[Draft]], list[Draft]], verify: str, monkeypatch: pytest.MonkeyPatch
):
    mixes = every_mix([Drawn(FIRST, Chain(1)), Following(SECOND)], monkeypatch)
    biased = [(prob, rule(drafts)) for prob, drafts in mixes]
    assert total_variation(biased, TARGET, verify, monkeypatch)[0] > CAUGHT


# the tree


def told(*rows: TokenTree) -> Draft:
    return Draft(trees=TreeBatch.stack(rows))


def test_shared_prefixes_are_one_path():
    left = TokenTree(tokens=[5, 6, 7], parents=[ROOT, 0, 0])
    right = TokenTree(tokens=[4, 5, 7, 6, 1], parents=[ROOT, ROOT, 1, 1, 3])
    merged = merge([told(left, right), told(right, left)])
    first, second = (merged.draft.trees.row(row) for row in (0, 1))
    assert (first.tokens, first.parents) == ([5, 6, 7, 4, 1], [ROOT, 0, 0, ROOT, 1])
    assert (second.tokens, second.parents) == (list(right.tokens), list(right.parents))
    assert merged.nodes == [[[0, 1, 2], [0, 1, 2, 3, 4]], [[3, 0, 2, 1, 4], [1, 3, 2]]]
    assert merged.own_paths(0, [[0, 1, 4], []]) == [[0, 1], []]
    assert merged.own_paths(1, [[0, 1, 4], [1, 3, 4]]) == [[1, 3, 4], [0, 1]]
    assert not merged.draft.is_drawn


def test_merged_drafts_merge_again():
    one, two, three = (told(TokenTree.chain(tokens)) for tokens in ([1, 2], [1, 3], [1, 3, 4]))
    inner = merge([two, one])
    outer = merge([three, inner.draft])
    assert outer.draft.trees.row(0).tokens == [1, 3, 4, 2]
    (path,) = outer.own_paths(1, [[0, 3]])
    assert path == [0, 2]
    assert inner.own_paths(1, [path]) == [[0, 1]]
    assert [part.nodes for part in flattened(outer.draft)] == [[[0, 1, 2]], [[0, 1]], [[0, 3]]]


def test_a_draft_that_is_alone_is_left_as_it_is():
    draft = grow(Chain(2), [FIRST], [MAX_DEPTH])
    nothing = Draft(trees=TreeBatch.empty(1))
    for drafts in ([draft], [nothing, draft], [draft, nothing]):
        assert merge(drafts).draft is draft
    assert merge([nothing, nothing]).draft.trees.sizes == (0,)
    cut = merge([draft], budget=1).draft
    assert cut.trees.sizes == (1,)
    assert cut.is_drawn


def test_grown_indices_are_those_of_the_source_that_has_them():
    grown = Draft(trees=TreeBatch.stack([TokenTree(tokens=[3, 4], parents=[ROOT, ROOT])]), grown_indices=[[2, -1]])
    chain = told(TokenTree.chain([4, 9]))
    assert merge([chain, grown], grown_by=1).draft.grown_indices == [[-1, -1, 2]]
    assert merge([grown, chain], grown_by=1).draft.grown_indices == [[-1, 0, 1]]
    assert merge([grown, chain]).draft.grown_indices is None
    empty = told(TokenTree.chain([]))
    assert merge([empty, chain], grown_by=0).draft.grown_indices == [[-1, -1]], "those of nobody's are not the chain's"


def test_what_is_told_gives_its_likeliest_paths():
    tree = TokenTree(tokens=[1, 2, 3, 4], parents=[ROOT, ROOT, 0, 1], probs=[0.3, 0.6, 0.9, 0.5])
    chain = told(TokenTree.chain([1]))
    kept = {budget: merge([chain, told(tree)], budget=budget).draft.trees.row(0).tokens for budget in (1, 2, 3, 4)}
    assert kept == {1: [1], 2: [1, 2], 3: [1, 2, 4], 4: [1, 2, 4, 3]}
    without_probs = TokenTree(tokens=tree.tokens, parents=tree.parents)
    assert merge([told(without_probs)], budget=2).draft.trees.row(0).tokens == [1, 2]


def test_what_cannot_be_cut_without_bias_is_refused():
    tree = TokenTree(tokens=[1, 2, 0], parents=[ROOT, ROOT, 0])
    drawn = Draft(trees=TreeBatch.stack([tree]), q_BTV=torch.full((1, 4, 3), 1 / 3))
    assert merge([drawn], budget=3).draft is drawn
    with pytest.raises(ValueError, match="a drawn tree of 3 nodes has room for 2"):
        merge([drawn], budget=2)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
