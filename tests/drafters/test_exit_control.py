"""Which exit drafts: DEL's rule against its formulas in lists and loops, and tokens per second in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from specdec.drafters import Outcome
from specdec.drafters.early_exit import choice as exit_choice
from specdec.drafters.early_exit.choice import TokensPerSecond
from specdec.drafters.early_exit.costs import ExitCosts
from specdec.drafters.early_exit.del_rule import TokensPerLayer
from specdec.drafters.early_exit.rule import ExitChoice, ExitRule, reached_slots
from specdec.drafters.early_exit.shadows import Seen
from specdec.drafters.early_exit.sources import likely_averages
from trees import ROOT, ConfidentChain, Draft, GainLimitedChain, TokenTree, TreeBatch

NUM_LAYERS = 8
EXITS = range(1, NUM_LAYERS)


# --- DEL's formulas (arXiv 2504.05598), straightforwardly -------------------------------------------------------------


@dataclass
class Slot:
    """A position whose hidden states are known: the target's token, and every exit's token with its confidence."""

    target: int
    tokens: list[int]
    confidences: list[float]


class Reference:
    """State and choice of DEL. Layer l is element l - 1 of every list."""

    def __init__(self) -> None:
        self.matches = [0.0] * len(EXITS)
        self.mismatches = [0.0] * len(EXITS)
        self.match_confidence = [0.0] * len(EXITS)
        self.mismatch_confidence = [0.0] * len(EXITS)

    def update(self, slots: Sequence[Slot], decay: float = 0.95) -> None:
        for layer in range(len(EXITS)):
            equal = [slot.confidences[layer] for slot in slots if slot.tokens[layer] == slot.target]
            unequal = [slot.confidences[layer] for slot in slots if slot.tokens[layer] != slot.target]
            self.matches[layer] = decay * self.matches[layer] + len(equal)
            self.mismatches[layer] = decay * self.mismatches[layer] + len(unequal)
            self.match_confidence[layer] = decay * self.match_confidence[layer] + sum(equal)
            self.mismatch_confidence[layer] = decay * self.mismatch_confidence[layer] + sum(unequal)

    def tokens_per_layer(self, exit_layer: int, length: int) -> float:
        matches, mismatches = self.matches[exit_layer - 1], self.mismatches[exit_layer - 1]
        tokens = 1.0
        for _ in range(length):
            tokens = 1.0 + matches / (matches + mismatches) * tokens
        return tokens / (length * exit_layer + NUM_LAYERS)

    def choose(self) -> tuple[int, int, float]:
        """Exit layer, length, threshold (NaN, below which no confidence lies, if it is not defined)."""
        best = (-math.inf, 0, 0)
        for exit_layer in EXITS:
            for length in range(18):
                rate = self.tokens_per_layer(exit_layer, length)
                if rate > best[0]:
                    best = (rate, exit_layer, length)
        _, exit_layer, length = best
        return exit_layer, length, self.threshold(exit_layer)

    def threshold(self, exit_layer: int) -> float:
        matches, mismatches = self.matches[exit_layer - 1], self.mismatches[exit_layer - 1]
        if matches == 0 or mismatches == 0:
            return math.nan
        right = self.match_confidence[exit_layer - 1] / matches
        wrong = self.mismatch_confidence[exit_layer - 1] / mismatches
        return (right + wrong) / 2


def play_round(text: Sequence[Slot], exit_layer: int, length: int, threshold: float) -> tuple[list[Slot], int]:
    """The slots of a round that begins at the first slot of a text, and how many of them count."""
    num_drafted = 0
    while num_drafted < length:
        confidence = text[num_drafted].confidences[exit_layer - 1]
        num_drafted += 1
        if confidence < threshold:
            break
    slots = list(text[: num_drafted + 1])
    for place, slot in enumerate(slots):
        if slot.tokens[exit_layer - 1] != slot.target:
            return slots, place + 1
    return slots, len(slots)


def random_text(rng: random.Random, num_slots: int) -> list[Slot]:
    """Deeper exits agree more often, agreeing exits are surer, and skill drifts."""
    text = []
    skill = rng.random()
    for _ in range(num_slots):
        skill = min(1.0, max(0.0, skill + rng.uniform(-0.1, 0.1)))
        hits = [rng.random() < skill * (0.5 + layer / (2 * NUM_LAYERS)) for layer in EXITS]
        target = rng.randrange(50)
        confidences = [rng.uniform(0.3, 1.0) if hit else rng.uniform(0.0, 0.7) for hit in hits]
        text.append(Slot(target, [target if hit else 50 + target for hit in hits], confidences))
    return text


def shadows(slots: Sequence[Slot]) -> list[Seen]:
    """What some slots show of every exit."""
    return [
        Seen(
            exit_layer,
            confidences=[slot.confidences[exit_layer - 1] for slot in slots],
            agreements=[float(slot.tokens[exit_layer - 1] == slot.target) for slot in slots],
        )
        for exit_layer in EXITS
    ]


@pytest.mark.parametrize("seed", range(12))
def test_tokens_per_layer_chooses_as_the_reference_does(seed: int) -> None:
    rng = random.Random(seed)
    text = random_text(rng, 500)
    num_prompt = rng.choice([1, 5, 32])
    reference, rule = Reference(), TokensPerLayer(EXITS, num_layers=NUM_LAYERS)
    rule.seed(shadows(text[:num_prompt]))
    assert rule.choose([99]) == ExitChoice(1, ConfidentChain(1, threshold=0.0))
    slots, count = play_round(text[num_prompt:], exit_layer=1, length=1, threshold=0.0)
    reference.update(text[:num_prompt] + slots[:count])
    rule.observe(shadows(slots[:count]))
    place, chosen = num_prompt + count, set()
    while place < len(text) - 20:
        exit_layer, length, threshold = reference.choose()
        chosen.add((exit_layer, length))
        choice = rule.choose([99])
        assert (choice.exit_layer, choice.policy.length) == (exit_layer, 18)
        assert choice.policy.threshold == pytest.approx(0.0 if math.isnan(threshold) else threshold, abs=1e-12)
        slots, count = play_round(text[place:], exit_layer, 18, threshold)
        reference.update(slots[:count])
        rule.observe(shadows(slots[:count]))
        place += count
    assert len(chosen) > 3, "the stream should make the choice move"


def test_ties_go_to_the_lowest_layer() -> None:
    rule = TokensPerLayer([2, 3], num_layers=NUM_LAYERS)
    rule.observe([Seen(layer, [0.5], [0.0]) for layer in (2, 3)])
    assert rule.choose([99]).exit_layer == 2


def test_no_more_is_drafted_than_can_be_used() -> None:
    rule = TokensPerLayer([2, 3], num_layers=NUM_LAYERS, max_length=6)
    rule.observe([Seen(layer, [0.5], [1.0]) for layer in (2, 3)])
    assert [rule.choose([depth, 1]).policy.length for depth in (99, 4)] == [6, 4]
    assert rule.choose([0, 0]) is None


def test_overlaps_count_as_fractions_of_tokens() -> None:
    """When sampling, a token that would be accepted with probability 0.25 is a quarter of a match."""
    rule = TokensPerLayer([2, 3], num_layers=NUM_LAYERS)
    rule.observe([Seen(2, [0.2, 0.6], [0.25, 0.75]), Seen(3, [0.4, 0.8], [1.0, 0.5])])
    np.testing.assert_allclose(rule.acceptance_E, [0.5, 0.75])
    right, wrong = 0.25 * 0.2 + 0.75 * 0.6, 0.75 * 0.2 + 0.25 * 0.6
    np.testing.assert_allclose(rule.midpoint_E, [(right + wrong) / 2, (0.8 / 1.5 + 0.8) / 2])


def test_an_exit_that_nothing_compares_is_known_by_its_drafts() -> None:
    """Others age meanwhile; what was drafted past a refused token says nothing."""
    rule = TokensPerLayer([2, 3], num_layers=NUM_LAYERS)
    rule.observe([Seen(2, [0.5], [1.0]), Seen(3, [0.5], [0.0])])
    assert rule.choose([9]).exit_layer == 2
    chain = TokenTree.chain([5, 6, 7], probs=[0.9, 0.4, 0.8])
    rule.learn(Draft(trees=TreeBatch.stack([chain])), Outcome(paths=[[0]], tokens=[[5, 9]]), [[0, 1]])
    np.testing.assert_allclose(rule.acceptance_E, [1.95 / 2.95, 0.0])
    assert rule.midpoint_E[0] == pytest.approx(((0.95 * 0.5 + 0.9) / 1.95 + 0.4) / 2)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_extreme_streams_are_survived(agreement: float, confidence: float) -> None:
    rule = TokensPerLayer([2, 3], num_layers=NUM_LAYERS)
    with np.errstate(all="raise"):
        for count in (0, 3, *[4] * 200):
            choice = rule.choose([99])
            assert 0.0 <= choice.policy.threshold <= 1.0
            rule.observe([Seen(layer, [confidence] * count, [agreement] * count) for layer in (2, 3)])
    np.testing.assert_allclose(rule.acceptance_E, agreement)


# --- tokens per second ------------------------------------------------------------------------------------------------


def test_reached_slots_are_those_that_the_target_came_to() -> None:
    """A chain of two with a leaf beside each; the second row's tree tells no probabilities."""
    tree = TokenTree(tokens=[1, 2, 3, 4], parents=[ROOT, 0, ROOT, 0], probs=[0.6, 0.5, 0.3, 0.2])
    trees = TreeBatch.stack([tree, TokenTree.chain([1, 2])])
    assert list(reached_slots(trees, [[0, 3], []])) == [([0.6, 0.3], 0), ([0.5, 0.2], 1), ([0.5], None)]
    assert list(reached_slots(trees, [[2], [0, 1]])) == [([0.6, 0.3], 1), ([0.5], 0), ([0.5], 0)]
    assert list(reached_slots(TreeBatch.empty(2), [[], []])) == []


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_a_likely_averages_is_that_of_a_chain_that_stops_where_it_does_not_pay(chance: float) -> None:
    prices = [0.1, 0.2, 0.3, 0.4]
    length = 1
    while length <= len(prices) and 2 * chance ** (length + 1) >= prices[length - 1]:
        length += 1
    expected = likely_averages(chance, prices, num_rows=2)
    assert (expected.steps, expected.nodes) == (length, length)
    assert expected.tokens == pytest.approx(sum(chance**depth for depth in range(length + 1)))


class VirtualTime:
    """Runs a rule's rounds in seconds that are exactly those of its costs.

    Args:
        agreement: what each exit's tokens are accepted with; may be changed between rounds.
        steps: seconds of a draft step of each exit; verifying a token takes one, each further one `node_seconds`.
        is_watched: whether shadow tokens tell of exits that do not draft.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        steps: dict[int, float],
        agreement: dict[int, float],
        *,
        is_watched: bool = False,
        node_seconds: float = 0.02,
        num_rows: int = 1,
    ):
        self.now, self.num_tokens, self.steps, self.agreement = 0.0, 0, steps, agreement
        self.forward = {width: 1 + node_seconds * (width - 1) for width in (1, 2, 4, 8, 16, 32, 64)}
        self.num_rows = num_rows
        self._random = random.Random(0)
        depths = {layer + 1: seconds for layer, seconds in steps.items()}
        costs = lambda *_: ExitCosts(self.forward, depths, num_rows)  # noqa: E731
        monkeypatch.setattr(exit_choice, "exit_costs", costs)
        monkeypatch.setattr(exit_choice, "clock_of", lambda _: lambda: self.now)
        sampler = SimpleNamespace(do_sample=False)
        run: Any = SimpleNamespace(sampler=sampler, target=SimpleNamespace(device=torch.device("cpu")))
        weights = nn.Linear(1, 1)
        heads: Any = [SimpleNamespace(layer=layer, weights=weights) for layer in steps]
        self._weights = weights  # what is known of exits goes with them
        shadows: Any = self if is_watched else None
        self.rule: ExitRule = TokensPerSecond(run, heads, max_length=16, shadows=shadows)

    def play(self, num_rounds: int) -> list[int | None]:
        """The exits that drafted."""
        exits = []
        for _ in range(num_rounds):
            choice = self.rule.choose([99] * self.num_rows)
            exits.append(None if choice is None else choice.exit_layer)
            lengths = [0 if choice is None else self._draft(choice.policy)] * self.num_rows
            chains = [TokenTree.chain([1] * length, probs=[0.7] * length) for length in lengths]
            self.now += 0 if choice is None else lengths[0] * self.steps[choice.exit_layer]
            self.rule.drafted(lengths[0])
            paths = [list(range(self._num_accepted(length, exits[-1]))) for length in lengths]
            tokens = [[1] * (len(path) + 1) for path in paths]
            self.num_tokens += sum(map(len, tokens))
            self.now += np.interp(self.num_rows * (lengths[0] + 1), list(self.forward), list(self.forward.values()))
            slots = [[0, *(node + 1 for node in path)] for path in paths]
            self.rule.learn(Draft(trees=TreeBatch.stack(chains)), Outcome(paths=paths, tokens=tokens), slots)
        return exits

    @property
    def speed_up(self) -> float:
        """Over plain decoding."""
        return self.num_tokens / self.num_rows / self.now

    def _draft(self, policy: Any) -> int:
        assert isinstance(policy, GainLimitedChain)
        length = 1
        while policy.goes_on([[0.7] * length] * self.num_rows):
            length += 1
        return length

    def _num_accepted(self, length: int, exit_layer: int | None) -> int:
        chance = 0.0 if exit_layer is None else self.agreement[exit_layer]
        return next((place for place in range(length) if self._random.random() >= chance), length)

    # as shadow tokens, of one position a round

    seconds = 0.0

    def prepare(self, centre: int) -> None:
        pass

    def compare(self, slots: Any, outcome: Any) -> list[Seen]:
        return [Seen(layer, [0.7], [float(self._random.random() < chance)]) for layer, chance in self.agreement.items()]


@pytest.mark.parametrize("is_watched", [False, True])
def test_it_stops_drafting_where_nothing_agrees_and_starts_again_where_all_does(
    is_watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = VirtualTime(monkeypatch, {2: 0.1}, {2: 0.0}, is_watched=is_watched)
    exits = world.play(400)
    assert exits[-50:].count(None) >= 48
    assert world.speed_up > 0.95, "never slower, but for what finding out takes"
    world.agreement[2] = 1.0
    assert world.play(600)[-50:].count(2) >= 48
    world.agreement[2] = 0.0
    assert world.play(400)[-50:].count(None) >= 48


def test_an_exit_that_always_agrees_drafts_long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    world = VirtualTime(monkeypatch, {2: 0.1}, {2: 1.0})
    world.play(300)
    assert world.speed_up > 0.8 * 17 / (1 + 16 * 0.12)


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize(
    ("steps", "agreement", "best"),
    [
        ({2: 0.1, 5: 0.3}, {2: 0.85, 5: 0.9}, 2),
        ({2: 0.1, 5: 0.12}, {2: 0.2, 5: 0.9}, 5),
        ({2: 0.6, 5: 0.7}, {2: 0.5, 5: 0.6}, None),  # tokens per layer would draft: it does not see the dear head
    ],
)
def test_the_exit_that_makes_most_tokens_per_second_drafts(
    steps: dict[int, float],
    agreement: dict[int, float],
    best: int | None,
    is_watched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits = VirtualTime(monkeypatch, steps, agreement, is_watched=is_watched).play(500)
    assert exits[-200:].count(best) > 150


def test_shadow_tokens_move_the_choice_to_an_exit_that_has_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = VirtualTime(monkeypatch, {2: 0.1, 5: 0.11}, {2: 0.8, 5: 0.1}, is_watched=True)
    assert world.play(100)[-20:].count(2) >= 19
    world.agreement = {2: 0.1, 5: 0.9}
    assert world.play(200)[-50:].count(5) >= 45


def test_large_batches_draft_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every token costs its own time, rows that all draft gain nothing."""
    alone, together = (
        VirtualTime(monkeypatch, {2: 0.3}, {2: 0.8}, node_seconds=seconds, num_rows=rows).play(200)
        for rows, seconds in ((1, 0.02), (8, 0.6))
    )
    assert alone[-50:].count(2) >= 45
    assert together[-50:].count(None) >= 45


def test_depths_between_those_that_were_timed_and_what_rounds_add() -> None:
    costs = ExitCosts({1: 1.0, 64: 4.0}, {3: 0.1, 9: 0.4}, num_rows=1)
    assert costs.step_seconds(5) == pytest.approx(0.25)
    for _ in range(9):
        costs.forward.update(1, 2.0)  # the machine is busy: steps take twice as long too
    assert costs.step_seconds(5) == pytest.approx(0.5)
    for _ in range(9):
        costs.update_step(2, 0.2)
    assert costs.step_seconds(2) == pytest.approx(0.2), "it was busy, and that is all"
