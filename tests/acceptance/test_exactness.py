"""Sampling is lossless: every draw, every coin and every last token of a round is enumerated, through the real code.

A target p and a draft q over a small vocabulary depend on the whole prefix. For each sequence of draws that a grower
can make (`trees.token_source.draw_index` is scripted), and each outcome of the coins of the verification
(`specdec.acceptance.coins.bernoulli` is scripted; all of them are rows of one batch), we have the committed tokens and
the exact distribution of the last one. Continued with p they must be distributed as p^L, to the precision of float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import trees.token_source
from specdec import acceptance
from specdec.acceptance import coins as coins_module
from specdec.decoding.sampling import Sampler
from specdec.drafters.model.growing import target_scores
from tests.support.acceptance_oracles import (
    TREES,
    as_batch,
    as_scores,
    outcomes_of,
    random_distributions,
    repeated,
    sequences_without_replacement,
    topdown_oracle,
    traversal_oracle,
)
from tests.support.enumeration import EXACT, VOCAB_SIZE, Prefix, ToyModel, every_draft
from tests.support.exact_rounds import CAUGHT, VERIFIERS, Enumeration, committed_texts, distributions, total_variation
from tests.support.goodness import assert_drawn_from
from trees import (
    ROOT,
    Calibration,
    Chain,
    ConfidentChain,
    Draft,
    DySpec,
    DySpecThreshold,
    Fixed,
    GainLimitedChain,
    Grower,
    GrowthPolicy,
    Round,
    Sequoia,
    TokenTree,
    TreeBatch,
)
from trees.layered import ChildByChildGrower, Node

CALIBRATION = Calibration(before=(0.6, 0.5), after=((0.3, 0.4, 0.5, 0.6, 0.7, 0.9), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))


class Broom(GrowthPolicy):
    """A policy as users write it (docs/write-your-own.md)."""

    def start(self, round_: Round) -> Grower:
        return _BroomGrower(round_)


class _BroomGrower(ChildByChildGrower):
    def wants(self, slot: Node, value: float) -> bool:
        return len(slot.taken) < (2 if slot.parent is None else 1) and value > 0.1


POLICIES = {
    "chain": Chain(3),
    "confident chain": ConfidentChain(3, threshold=0.35),
    "gain-limited chain": GainLimitedChain(prices=(0.4, 0.2), chance=lambda prob: prob**0.5, next_chance=0.9),
    "gain-limited leaves": GainLimitedChain(
        prices=(0.4,), chance=lambda prob: prob**0.5, next_chance=0.9, leaf_prices=(0.0, 0.0, 0.3, 0.4)
    ),
    "child by child": Broom(),
    "fixed": Fixed((2, 2)),
    "fixed deep": Fixed((2, 1, 1)),
    "sequoia": Sequoia(5, (0.6, 0.3)),
    "dyspec": DySpec(4),
    "dyspec shallow": DySpec(5, max_depth=2),
    "dyspec calibrated": DySpec(4, calibration=CALIBRATION),
    "threshold": DySpecThreshold(0.2, max_nodes=50),
    "threshold over budget": DySpecThreshold(0.1, max_nodes=3),
}
WARPERS = {
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top-k": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(2)],
    "top-p": [TopPLogitsWarper(0.8)],
}


@pytest.mark.rotated
@pytest.mark.parametrize("warper", WARPERS)
@pytest.mark.parametrize("name", POLICIES)
def test_committed_tokens_are_distributed_as_the_targets(name: str, warper: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = (ToyModel(seed, WARPERS[warper]) for seed in (1, 2))
    drafts = every_draft(POLICIES[name], [draft_model], monkeypatch)
    expected_accepted = {}
    for verify in VERIFIERS:
        error, expected_accepted[verify] = total_variation(drafts, target, verify, monkeypatch)
        assert error < EXACT, f"{name}, {verify}"
    assert expected_accepted["traversal"] >= expected_accepted["topdown"] - EXACT


@pytest.mark.parametrize("verify", VERIFIERS)
def test_a_draft_warped_otherwise_than_its_target_is_exact_too(verify: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = ToyModel(3), ToyModel(4, [TopKLogitsWarper(1)])
    for policy in (Fixed((2, 2)), DySpec(4)):
        error, _ = total_variation(every_draft(policy, [draft_model], monkeypatch), target, verify, monkeypatch)
        assert error < EXACT


@pytest.mark.rotated
@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("policy", [Fixed((2, 1)), DySpec(3, max_depth=2)], ids=["fixed", "dyspec"])
def test_batches_of_draws_may_repeat_themselves(policy: GrowthPolicy, verify: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = ToyModel(14), ToyModel(15)
    drafts = every_draft(policy, [draft_model], monkeypatch, batch_size=2)
    assert total_variation(drafts, target, verify, monkeypatch)[0] < EXACT


@pytest.mark.parametrize("verify", VERIFIERS)
def test_larger_vocabularies_have_blocks_of_several_tokens(verify: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = (ToyModel(seed, vocab_size=5) for seed in (5, 6))
    drafts = every_draft(DySpec(3, max_depth=2), [draft_model], monkeypatch)
    assert total_variation(drafts, target, verify, monkeypatch)[0] < EXACT


class Padded:
    """A draft model whose vocabulary has other padding rows than the target's, as its sessions read and score it."""

    def __init__(self, seed: int, vocab_size: int):
        self._model = ToyModel(seed, vocab_size=vocab_size)
        sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.7)]), do_sample=True)
        self._run = SimpleNamespace(vocab_size=VOCAB_SIZE, sampler=sampler, device=torch.device("cpu"))

    def scores(self, prefix: Prefix) -> Tensor:
        readable = tuple(min(token, self._model.vocab_size - 1) for token in prefix)
        return target_scores(self._run, self._model.scores(readable)[None, None], None)[0, 0].double()


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("policy", [Chain(3), Fixed((2, 2)), DySpec(4)], ids=["chain", "fixed", "dyspec"])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE + 1], ids=["fewer", "more"])
def test_a_draft_of_another_padding_is_exact(
    vocab_size: int, policy: GrowthPolicy, verify: str, monkeypatch: pytest.MonkeyPatch
):
    """What the draft lacks has no chance in q, and what the target lacks none at all."""
    target, draft_model = ToyModel(30, WARPERS["temperature"]), Padded(31, vocab_size)
    drafts = every_draft(policy, [draft_model], monkeypatch)
    assert all(token < min(vocab_size, VOCAB_SIZE) for _, draft in drafts for token in draft.trees.row(0).tokens)
    assert total_variation(drafts, target, verify, monkeypatch)[0] < EXACT


@pytest.mark.parametrize("verify", VERIFIERS)
def test_rows_that_share_a_budget_stay_independent(verify: str, monkeypatch: pytest.MonkeyPatch):
    target, *draft_models = (ToyModel(seed) for seed in (7, 8, 9))
    drafts = every_draft(DySpec(2, max_depth=2, shared=True), draft_models, monkeypatch)
    assert {draft.trees.sizes for _, draft in drafts} >= {(1, 3), (2, 2)}
    texts = [
        committed_texts(
            [draft.trees.row(row) for _, draft in drafts],
            [distributions(draft, row) for _, draft in drafts],
            target,
            verify,
            monkeypatch,
        )[0]
        for row in (0, 1)
    ]
    weight_D = torch.tensor([prob for prob, _ in drafts], dtype=torch.float64)
    joint = torch.einsum("d,dx,dy->xy", weight_D, *texts)
    expected = torch.outer(target.texts, target.texts)
    assert 0.5 * (joint - expected).abs().sum() < EXACT


# the check can fail


def keep(draft: Draft, kept: Sequence[int]) -> Draft:
    """A draft cut down to these nodes."""
    tree = draft.trees.row(0)
    number = {ROOT: ROOT, **{node: index for index, node in enumerate(kept)}}
    pruned = TokenTree(
        tokens=[tree.tokens[node] for node in kept], parents=[number[tree.parents[node]] for node in kept]
    )
    q_TV = distributions(draft)[[0, *(node + 1 for node in kept)]]
    return Draft(trees=TreeBatch.stack([pruned]), q_BTV=q_TV[None])


def path_probs(tree: TokenTree, q_TV: Tensor) -> list[float]:
    """Product of q over each node's path, its own token included."""
    probs: list[float] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        above = 1.0 if parent == ROOT else probs[parent]
        probs.append(above * float(q_TV[parent + 1, token]))
    return probs


def likeliest_paths(draft: Draft) -> Draft:
    """Biased: prunes by what the drawn tokens turned out to be."""
    tree = draft.trees.row(0)
    probs = path_probs(tree, distributions(draft))
    best = sorted(range(len(tree)), key=lambda node: (-probs[node], tree.depths[node]))[:3]
    return keep(draft, sorted(best))


def best_size_in_hindsight(draft: Draft) -> Draft:
    """Biased: chooses the budget by looking at what was drawn, with a cost that grows in it."""
    tree = draft.trees.row(0)
    probs = path_probs(tree, distributions(draft))
    order = sorted(range(len(tree)), key=lambda node: (-tree.values[node], node))
    rates = [(1 + sum(probs[node] for node in order[:size])) / (1 + 0.3 * size) for size in range(len(tree) + 1)]
    return keep(draft, sorted(order[: rates.index(max(rates))]))


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("rule", [likeliest_paths, best_size_in_hindsight])
def test_biased_pruning_is_caught(rule: Callable[[Draft], Draft], verify: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = ToyModel(10), ToyModel(11)
    drafts = every_draft(Fixed((2, 2)), [draft_model], monkeypatch)
    pruned = [(prob, rule(draft)) for prob, draft in drafts]
    assert total_variation(pruned, target, verify, monkeypatch)[0] > CAUGHT


@pytest.mark.parametrize("verify", VERIFIERS)
def test_a_q_that_was_not_drawn_from_is_caught(verify: str, monkeypatch: pytest.MonkeyPatch):
    target, draft_model = ToyModel(12), ToyModel(13)
    drafts = every_draft(DySpec(3), [draft_model], monkeypatch)
    colder = [
        (prob, Draft(trees=draft.trees, q_BTV=(distributions(draft).log() / 0.8).softmax(-1).nan_to_num()[None]))
        for prob, draft in drafts
    ]
    assert total_variation(colder, target, verify, monkeypatch)[0] > CAUGHT


# traversal verification on given trees


@pytest.mark.rotated
@pytest.mark.parametrize("zeros", [False, True], ids=["full support", "holes in the target"])
@pytest.mark.parametrize("name", TREES)
def test_traversal_follows_the_oracle(name: str, zeros: bool):
    """Real coins: 50 000 rows, chi-square with a false-alarm probability of 1e-6."""
    tree = TREES[name]
    p = random_distributions(len(tree) + 1, 4, seed=23, zeros=zeros)
    q = random_distributions(len(tree) + 1, 4, seed=24)
    draft = Draft(trees=repeated(tree), q_BTV=as_batch(q))
    accepted = acceptance.traversal(draft, as_scores(p), torch.Generator().manual_seed(25))
    assert_drawn_from(outcomes_of(accepted), traversal_oracle(tree, p, q), name)


@st.composite
def drafted_trees(draw_from: st.DrawFn) -> tuple[TokenTree, list[list[Fraction]], list[list[Fraction]]]:
    """A tree, and p and q of its slots, with zeros; its tokens are such as can be drawn from q without replacement."""
    vocab_size = 3
    weights = st.lists(st.integers(0, 4), min_size=vocab_size, max_size=vocab_size).filter(any)
    tokens: list[int] = []
    parents: list[int] = []
    p, q = ([_normed(draw_from(weights))] for _ in range(2))
    untried = [[token for token in range(vocab_size) if q[0][token]]]
    for _ in range(draw_from(st.integers(1, 6))):
        slots = [slot for slot, left in enumerate(untried) if left]
        slot = draw_from(st.sampled_from(slots))
        tokens.append(untried[slot].pop(draw_from(st.integers(0, len(untried[slot]) - 1))))
        parents.append(slot - 1)
        p.append(_normed(draw_from(weights)))
        q.append(_normed(draw_from(weights)))
        untried.append([token for token in range(vocab_size) if q[-1][token]])
    return TokenTree(tokens=tokens, parents=parents), p, q


def _normed(weights: Sequence[int]) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


@settings(max_examples=150, deadline=None)
@given(drafted_trees())
def test_verification_of_any_tree_follows_the_oracles(case: tuple):
    tree, p, q = case
    p_TV, q_TV = (torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64) for rows in (p, q))
    for verify, reference in {"topdown": topdown_oracle, "traversal": traversal_oracle}.items():
        coins = Enumeration.of([tree])
        num_rows = len(coins.tree_of_row)
        batch = TreeBatch.stack(coins.tree_of_row)
        draft = Draft(trees=batch, q_BTV=q_TV.expand(num_rows, -1, -1))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(coins_module, "bernoulli", coins.throw)
            monkeypatch.setattr(coins_module, "sample", coins.draw_one)
            accepted = VERIFIERS[verify](draft, p_TV.log().expand(num_rows, -1, -1))
        found: Counter = Counter()
        for (path, _), weight, last_V in zip(outcomes_of(accepted), coins.weight_B, coins.last_BV, strict=True):
            for token, mass in enumerate(last_V):
                found[path, token] += float(weight * mass)
        expected = reference(tree, p, q)
        for outcome in found.keys() | expected.keys():
            assert found[outcome] == pytest.approx(float(expected[outcome]), abs=EXACT), (verify, outcome)


def block_oracle(
    tokens: Sequence[int], p: Sequence[Sequence[Fraction]], q: Sequence[Sequence[Fraction]]
) -> dict[tuple[tuple[int, ...], int], Fraction]:
    """Block verification (Sun et al. 2024, algorithm 2): the longest accepted block, then its residual."""
    reaches = [Fraction(1)]
    for slot, token in enumerate(tokens):
        reaches.append(min(Fraction(1), reaches[-1] * p[slot][token] / q[slot][token]))
    outcomes: Counter = Counter()
    shorter = Fraction(1)
    for size in range(len(tokens), -1, -1):
        if size == len(tokens):
            accept, last = reaches[size], p[size]
        else:
            last = [max(reaches[size] * p_x - q_x, Fraction(0)) for p_x, q_x in zip(p[size], q[size], strict=True)]
            accept = sum(last) / (sum(last) + 1 - reaches[size]) if size else Fraction(1)
        for token, mass in enumerate(last):
            outcomes[tuple(range(size)), token] += shorter * accept * mass / (sum(last) or 1)
        shorter *= 1 - accept
    return outcomes


def test_traversal_of_a_chain_is_block_verification():
    for seed in range(20):
        p, q = (random_distributions(4, 4, seed=seed + offset) for offset in (100, 200))
        assert traversal_oracle(TREES["chain"], p, q) == block_oracle(TREES["chain"].tokens, p, q)


def test_traversal_leaves_a_round_without_drafts_to_the_target():
    p = random_distributions(1, 4, seed=26)
    draft = Draft(trees=TreeBatch.empty(50_000), q_BTV=as_batch(p))
    accepted = acceptance.traversal(draft, as_scores(p), torch.Generator().manual_seed(27))
    assert_drawn_from(outcomes_of(accepted), {((), token): mass for token, mass in enumerate(p[0])})


# real draws


@pytest.mark.parametrize("vocab_size", [4, 7])
def test_samplers_draw_without_replacement(vocab_size: int):
    (q,) = random_distributions(1, vocab_size, seed=28)
    q_MV = as_batch([q])[:, 0].clone()
    sampler = trees.token_source.CandidateSampler(q_MV, sample=True, generator=torch.Generator().manual_seed(29))
    slots_M = torch.arange(len(q_MV))
    batches = [sampler.take(slots_M, 4) for _ in range(6)]
    sampler.refill()
    assert torch.equal(q_MV, as_batch([q])[:, 0])
    tokens_MK, probs_MK = (torch.cat(column, 1) for column in zip(*batches, strict=True))
    drawn = [
        tuple(dict.fromkeys(token for token, prob in zip(tokens, probs, strict=True) if prob))[:3]
        for tokens, probs in zip(tokens_MK.tolist(), probs_MK.tolist(), strict=True)
    ]
    assert_drawn_from(drawn, dict(sequences_without_replacement(q, 3)))


def test_samplers_draw_from_large_vocabularies():
    """Blocks of 17 tokens and a last one of 11; 100 000 draws, false alarm 1e-6."""
    q_V = (1.5 * torch.randn(300, generator=torch.Generator().manual_seed(31))).softmax(-1)
    sampler = trees.token_source.CandidateSampler(
        q_V[None].clone(), sample=True, generator=torch.Generator().manual_seed(32)
    )
    drawn_N1, _ = sampler.take(torch.zeros(100_000, dtype=torch.long), 1)
    assert_drawn_from(drawn_N1[:, 0].tolist(), dict(enumerate(q_V.tolist())))
