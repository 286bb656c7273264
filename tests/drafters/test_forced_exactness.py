"""Forced tokens beside drawn ones are lossless: every draw and every coin of a round, through the real session.

Rows of one batch have grammars of their own, which force some tokens; what is *told* to be forced is drafted without
chance, and need not be true. Everything that the session can propose, and everything that the verification can make of
it, is enumerated: what is committed, continued with p, must be distributed as p^L to the precision of float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trees.layered
import trees.token_source
from specdec import acceptance
from specdec.acceptance import coins as coins_module
from specdec.drafters import Drafter
from specdec.drafters.composite.forced import Forced
from tests.support.acceptance_oracles import outcomes_of
from tests.support.enumeration import EXACT, LENGTH, MAX_DEPTH, VOCAB_SIZE, Script, ToyModel, grow, prefixes
from tests.support.exact_rounds import CAUGHT, VERIFIERS, Enumeration, distributions
from trees import Chain, Draft, DySpec, Fixed, GrowthPolicy, TokenTree, TreeBatch
from trees.draft import Part

Committed = dict[tuple[int, tuple[int, ...]], Tensor]
"""(row, accepted tokens) -> float64 [V]: how likely they are, with each token after them."""


class Framed(ToyModel):
    """Under a grammar that forces the token at some places of a text."""

    def __init__(self, seed: int, forced: Mapping[int, int]):
        super().__init__(seed)
        for prefix, scores_V in self._scores.items():
            if len(prefix) in forced:
                others = torch.arange(VOCAB_SIZE) != forced[len(prefix)]
                self._scores[prefix] = scores_V.masked_fill(others, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What its grammar forces, by place, and what the grammar tells of it."""

    forced: Mapping[int, int]
    told: Sequence[int]


ROWS = {
    "free": Row(forced={}, told=[]),
    "two": Row(forced={0: 2, 1: 0}, told=[2, 0]),
    "all": Row(forced={0: 1, 1: 1, 2: 0, 3: 2}, told=[1, 1, 0, 2]),
    "one": Row(forced={0: 1}, told=[1]),
    "too much": Row(forced={0: 2}, told=[2, 1, 0]),
    "wrong": Row(forced={0: 2}, told=[0, 1]),
    "a hint": Row(forced={}, told=[1]),
    "two hints": Row(forced={}, told=[1, 0]),
}
POLICIES = {"chain": Chain(2), "fixed": Fixed((2,)), "dyspec": DySpec(2)}


class Drawing:
    """A session that draws from toy models, one for each row.

    Args:
        keeps: a first token without which a row's draft is thrown away, which is biased; None: no draft is.
    """

    takes_rows, runs_target, grows_trees = True, False, True

    def __init__(self, policy: GrowthPolicy, models: Sequence[ToyModel], keeps: int | None):
        self.policy, self._models, self._keeps = policy, models, keeps

    def propose(self, max_depths: Sequence[int]) -> Draft:
        draft = grow(self.policy, self._models, max_depths)
        if self._keeps is None or draft.trees.row(0).tokens[0] == self._keeps:
            return draft
        return Draft(trees=TreeBatch.empty(1))


def forced_session(rows: Sequence[Row], policy: GrowthPolicy, keeps: int | None) -> Any:
    # a chain goes on drawing for rows that may not draft: from these in one way only
    unread = dict.fromkeys(range(LENGTH), 0)
    models = [Framed(seed, row.forced if len(row.told) < 2 else unread) for seed, row in enumerate(rows, 40)]
    sampler = SimpleNamespace(forced=lambda index, sequences: list(rows[index].told))
    run = SimpleNamespace(sampler=sampler, sequences=None, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))
    drafter = SimpleNamespace(start=lambda run: Drawing(policy, models, keeps), needs_exits=False)
    return Forced(as_drafter(drafter)).start(as_run(run))


def as_drafter(stand_in: Any) -> Drafter:
    return stand_in


def as_run(stand_in: Any) -> Any:
    return stand_in


def every_proposal(
    rows: Sequence[Row], policy: GrowthPolicy, monkeypatch: pytest.MonkeyPatch, keeps: int | None = None
) -> Iterator[tuple[float, Draft]]:
    script, total = Script(), 0.0
    monkeypatch.setattr(trees.layered, "batch_size", lambda batch, num_slots: 1)
    monkeypatch.setattr(trees.token_source, "draw_index", script.draw_index)
    while script.advance():
        draft = forced_session(rows, policy, keeps).propose([MAX_DEPTH] * len(rows))
        total += script.prob
        yield script.prob, draft
    assert total == pytest.approx(1, abs=EXACT)


def repeated(draft: Draft, rows: Sequence[int]) -> Draft:
    """A batch of some rows of a draft, whichever it was made of."""
    batch = TreeBatch.stack([draft.trees.row(row) for row in rows])
    if draft.parts is not None:
        parts = [
            Part(draft=repeated(part.draft, rows), nodes=[part.nodes[row] for row in rows]) for part in draft.parts
        ]
        return Draft(trees=batch, parts=parts)
    if not draft.is_drawn:
        return Draft(trees=batch)
    own = [distributions(draft, row) for row in rows]
    q_BTV = torch.stack([torch.nn.functional.pad(q_TV, (0, 0, 0, batch.num_slots - len(q_TV))) for q_TV in own])
    return Draft(trees=batch, q_BTV=q_BTV)


def verified(draft: Draft, targets: Sequence[ToyModel], verify: str, monkeypatch: pytest.MonkeyPatch) -> Committed:
    """As `Sampler.accept` verifies it."""
    return (_tested if draft.is_drawn else _walked)(draft, targets, verify, monkeypatch)


def _tested(draft: Draft, targets: Sequence[ToyModel], verify: str, monkeypatch: pytest.MonkeyPatch) -> Committed:
    own = [draft.trees.row(row) for row in range(len(targets))]
    coins = Enumeration.of(own)
    index = {id(tree): row for row, tree in enumerate(own)}
    rows = [index[id(tree)] for tree in coins.tree_of_row]
    p_BTV = _processed(own, targets, draft.trees.num_slots)[rows]
    monkeypatch.setattr(coins_module, "bernoulli", coins.throw)
    monkeypatch.setattr(coins_module, "sample", coins.draw_one)
    accepted = VERIFIERS[verify](repeated(draft, rows), p_BTV.log())
    assert coins.last_BV is not None
    committed: Committed = {}
    for row, (path, _), weight, last_V in zip(rows, outcomes_of(accepted), coins.weight_B, coins.last_BV, strict=True):
        key = row, tuple(own[row].tokens[node] for node in path)
        committed[key] = committed.get(key, 0) + weight * last_V
    return committed


def _walked(draft: Draft, targets: Sequence[ToyModel], verify: str, monkeypatch: pytest.MonkeyPatch) -> Committed:
    """No chance was involved in it: the target chooses after every slot, here in every way that there is."""
    own = [draft.trees.row(row) for row in range(len(targets))]
    chosen_BT = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=draft.trees.num_slots)))
    committed: Committed = {}
    for row, p_TV in enumerate(_processed(own, targets, draft.trees.num_slots)):
        outcomes = outcomes_of(acceptance.walk(repeated(draft, [row] * len(chosen_BT)).trees, chosen_BT))
        weight_B = p_TV.expand(len(chosen_BT), -1, -1).gather(2, chosen_BT[:, :, None])[:, :, 0].prod(1)
        for (path, last), weight in zip(outcomes, weight_B, strict=True):
            key = row, tuple(own[row].tokens[node] for node in path)
            committed.setdefault(key, torch.zeros(VOCAB_SIZE, dtype=torch.float64))[last] += weight
    return committed


def _processed(own: Sequence[TokenTree], targets: Sequence[ToyModel], num_slots: int) -> Tensor:
    """p of every slot; past a row's tree anything."""
    p_BTV = torch.full((len(own), num_slots, VOCAB_SIZE), 1 / VOCAB_SIZE, dtype=torch.float64)
    for row, (tree, target) in enumerate(zip(own, targets, strict=True)):
        p_BTV[row, : len(tree) + 1] = torch.stack([*map(target.probs, prefixes(tree))])
    return p_BTV


def joint_texts(
    names: Sequence[str],
    policy: GrowthPolicy,
    verify: str,
    monkeypatch: pytest.MonkeyPatch,
    keeps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the texts of every row [B, V^L], and of the first and the last row together, what is and what must be."""
    rows = [ROWS[name] for name in names]
    targets = [Framed(seed, row.forced) for seed, row in enumerate(rows, 20)]
    size = VOCAB_SIZE**LENGTH
    found_BX, together = torch.zeros(len(rows), size, dtype=torch.float64), torch.zeros(size, size).double()
    for prob, draft in every_proposal(rows, policy, monkeypatch, keeps):
        texts_BX = torch.zeros_like(found_BX)
        for (row, text), last_V in verified(draft, targets, verify, monkeypatch).items():
            texts_BX[row] += targets[row].completed(text, last_V)
        found_BX += prob * texts_BX
        together += prob * torch.outer(texts_BX[0], texts_BX[-1])
    expected_BX = torch.stack([target.texts for target in targets])
    errors = 0.5 * (found_BX - expected_BX).abs().sum(1)
    return errors, together, torch.outer(expected_BX[0], expected_BX[-1])


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_alone_is_exact(name: str, verify: str, monkeypatch: pytest.MonkeyPatch):
    for policy in POLICIES.values():
        errors, _, _ = joint_texts([name], policy, verify, monkeypatch)
        assert errors.max() < EXACT


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_rows_are_exact_and_independent(policy: str, verify: str, monkeypatch: pytest.MonkeyPatch):
    names = ["free", "two", "all", "too much", "wrong", "two hints", "one"]
    errors, together, expected = joint_texts(names, POLICIES[policy], verify, monkeypatch)
    assert errors.max() < EXACT
    assert 0.5 * (together - expected).abs().sum() < EXACT, "a row that draws, and one that draws under a grammar"


@pytest.mark.parametrize("verify", VERIFIERS)
def test_a_forced_token_where_a_draw_was_not_liked_is_caught(verify: str, monkeypatch: pytest.MonkeyPatch):
    errors, _, _ = joint_texts(["a hint"], Chain(1), verify, monkeypatch, keeps=0)
    assert errors.max() > CAUGHT
