"""The choice of an exit against two oracles: DEL's formulas in lists and loops, and rounds enumerated one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from specdec.control.exits import (
    PLAIN,
    THRESHOLDS,
    ExitChoice,
    ExitControl,
    ExitCosts,
    ExitObjective,
    TokensPerLayer,
    TokensPerSecond,
)

NUM_LAYERS = 8
EXITS = range(1, NUM_LAYERS)
CHEAP = ExitCosts(plain=1.0, draft=[0.1, 0.2], verify=[1.0 + 0.02 * n for n in range(19)], saved=[0.1, 0.2])


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


def shadows(slots: Sequence[Slot]) -> tuple[np.ndarray, np.ndarray]:
    """Agreement and confidence [1, E, T] of some slots."""
    agreement_TE = [[token == slot.target for token in slot.tokens] for slot in slots]
    confidence_TE = [slot.confidences for slot in slots]
    return np.array([agreement_TE]).swapaxes(1, 2), np.array([confidence_TE]).swapaxes(1, 2)


@pytest.mark.parametrize("fixed_length", [False, True], ids=["DEL", "DEL-E"])
@pytest.mark.parametrize("seed", range(12))
def test_tokens_per_layer_chooses_as_the_reference_does(seed: int, fixed_length: bool) -> None:
    rng = random.Random(seed)
    text = random_text(rng, 500)
    num_prompt = rng.choice([1, 5, 32])
    reference = Reference()
    control = ExitControl(EXITS, num_rows=1, objective=TokensPerLayer(num_layers=NUM_LAYERS, fixed_length=fixed_length))
    control.seed(*shadows(text[:num_prompt]))
    assert control.choose() == ExitChoice(exit_layer=1, length=1, threshold=0.0)
    slots, count = play_round(text[num_prompt:], exit_layer=1, length=1, threshold=0.0)
    reference.update(text[:num_prompt] + slots[:count])
    control.observe(*shadows(slots), [count])
    place = num_prompt + count
    exits_and_lengths = set()
    while place < len(text) - 20:
        exit_layer, length, threshold = reference.choose()
        exits_and_lengths.add((exit_layer, length))
        choice = control.choose()
        if fixed_length:
            expected = (exit_layer, length) if length else (None, 0)
            assert (choice.exit_layer, choice.length, choice.threshold) == (*expected, 0.0)
            slots, count = play_round(text[place:], exit_layer, length, 0.0)
        else:
            assert (choice.exit_layer, choice.length) == (exit_layer, 18)
            assert choice.threshold == pytest.approx(0.0 if math.isnan(threshold) else threshold, abs=1e-12)
            slots, count = play_round(text[place:], exit_layer, 18, threshold)
        reference.update(slots[:count])
        control.observe(*shadows(slots), [count])
        place += count
    assert len(exits_and_lengths) > 3, "the stream should make the choice move"


def test_ties_go_to_the_lowest_layer() -> None:
    control = ExitControl([2, 3], num_rows=1, objective=TokensPerLayer(num_layers=NUM_LAYERS))
    control.choose()
    control.observe(np.zeros((1, 2, 1)), np.full((1, 2, 1), 0.5), [1])
    assert control.choose() == ExitChoice(exit_layer=2, length=18, threshold=0.0)


# --- rounds enumerated one by one -------------------------------------------------------------------------------------


Observations = Sequence[Sequence[tuple[bool, float]]]
"""Of a row: for every exit what was seen of it, agreement and confidence."""


def enumerated_rate(rows: Sequence[Observations], costs: ExitCosts, place: int, length: int, threshold: float) -> float:
    """Tokens per second of an exit if every drafted position is like one of a row's observations, equally likely."""
    tokens = seconds = 0.0
    for drafts in itertools.product(*(itertools.product(row[place], repeat=length) for row in rows)):
        longest = 0
        for draft in drafts:
            stops = [index + 1 for index, (_, confidence) in enumerate(draft) if confidence < threshold]
            num_drafted = min([length, *stops])
            agreed = [agreement for agreement, _ in draft[:num_drafted]]
            tokens += 1 + len(list(itertools.takewhile(bool, agreed)))
            longest = max(longest, num_drafted)
        saved = costs.saved[place]
        seconds += longest * costs.draft[place] + costs.shadow
        seconds += (1 - saved) * costs.verify[longest] + saved * costs.verify[0]
    return tokens / seconds


def random_observation(rng: random.Random) -> tuple[bool, float]:
    confidence = rng.choice([0.2, 0.5, 0.9])
    return rng.random() < confidence, confidence


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_tokens_per_second_is_the_maximum_over_enumerated_rounds(seed: int, num_rows: int) -> None:
    rng = random.Random(seed)
    exits, num_seen, max_length = [2, 5], 4, 3
    rows = [[[random_observation(rng) for _ in range(num_seen)] for _ in exits] for _ in range(num_rows)]
    costs = ExitCosts(
        plain=100.0,
        draft=[rng.uniform(0.02, 0.6), rng.uniform(0.1, 0.8)],
        verify=list(itertools.accumulate([1.0, *(rng.uniform(0.0, 0.2) for _ in range(max_length))])),
        saved=[0.2, 0.5],
        shadow=0.05,
    )
    rates: dict[tuple[int | None, int, float], float] = {
        (exit_layer, length, threshold): enumerated_rate(rows, costs, place, length, threshold)
        for place, exit_layer in enumerate(exits)
        for length in range(1, max_length + 1)
        for threshold in THRESHOLDS
    }
    best = max(rates.values())
    observed = np.array(rows, dtype=float)

    def choose(costs: ExitCosts) -> ExitChoice:
        control = ExitControl(exits, num_rows=num_rows, objective=TokensPerSecond(costs, prior_tokens=1e-9))
        control.seed(observed[..., 0], observed[..., 1])
        return control.choose(max_length)

    choice = choose(costs)
    assert rates[choice.exit_layer, choice.length, choice.threshold] == pytest.approx(best, rel=1e-6)
    assert choose(replace(costs, plain=num_rows / best * 1.001)) == choice
    assert choose(replace(costs, plain=num_rows / best * 0.999)) == PLAIN


# --- tokens per second: when to speculate -----------------------------------------------------------------------------


def control_of(
    objective: ExitObjective, exits: Sequence[int] = (2, 4), num_rows: int = 1, **options: Any
) -> ExitControl:
    return ExitControl(exits, num_rows=num_rows, objective=objective, **options)


def play(control: ExitControl, agreement: float, num_rounds: int, confidence: float = 0.7) -> list[ExitChoice]:
    """Rounds in which every exit agrees everywhere (1) or nowhere (0)."""
    choices = []
    for _ in range(num_rounds):
        choice = control.choose()
        shape = (1, 2, choice.length + 1)
        control.observe(np.full(shape, agreement), np.full(shape, confidence), [choice.length + 1 if agreement else 1])
        choices.append(choice)
    return choices


def test_it_stops_speculating_where_nothing_agrees_and_starts_again_where_all_does() -> None:
    control = control_of(TokensPerSecond(CHEAP), decay=0.98, decay_per_token=True)
    control.seed(np.zeros((1, 2, 32)), np.full((1, 2, 32), 0.7))
    assert set(play(control, 0.0, 50)) == {PLAIN}
    predictable = play(control, 1.0, 50)
    assert predictable[0] == PLAIN
    assert predictable[-1].exit_layer == 2
    assert predictable[-1].length == 18
    assert set(play(control, 0.0, 200)[-20:]) == {PLAIN}


def test_after_a_plain_round_speculation_must_promise_a_margin() -> None:
    """Half of the tokens agree: one drafted token makes 1.5 tokens in 1.118 s."""
    plain = 1.118 / 1.5

    def choose(plain: float, previous: ExitChoice | None) -> ExitChoice:
        objective = TokensPerSecond(replace(CHEAP, plain=plain), margin=0.05)
        control = control_of(objective, max_length=1)
        control.seed([[[0, 1] * 8] * 2], np.full((1, 2, 16), 0.7))
        control.choice = previous
        return control.choose()

    speculate = ExitChoice(exit_layer=2, length=1, threshold=0.0)
    assert choose(plain * 1.04, None) == choose(plain * 1.04, speculate) == speculate
    assert choose(plain * 1.04, PLAIN) == PLAIN
    assert choose(plain * 1.06, PLAIN) == speculate
    assert choose(plain * 0.99, speculate) == PLAIN


def test_the_threshold_separates_what_confidence_separates() -> None:
    """Sure tokens are right and unsure ones wrong: a draft should end at the first unsure one."""
    agreement = np.array([[[1, 1, 1, 0] * 8] * 2])
    control = control_of(TokensPerSecond(CHEAP))
    control.seed(agreement, np.where(agreement, 0.9, 0.4))
    choice = control.choose()
    assert 0.4 < choice.threshold <= 0.9
    assert choice.length > 5, "the threshold ends the draft, not its length"


def test_a_dear_head_is_counted() -> None:
    """Tokens per layer sees a shallow exit that is right half the time; on the clock its head costs too much."""
    costs = replace(CHEAP, draft=[0.6, 0.7])
    agreement, confidence = np.array([[[1, 0] * 16] * 2]), np.full((1, 2, 32), 0.5)
    paper, clock = (
        control_of(TokensPerLayer(num_layers=NUM_LAYERS, fixed_length=True)),
        control_of(TokensPerSecond(costs)),
    )
    for control in (paper, clock):
        control.seed(agreement, confidence)
        control.choose()
    assert paper.choose().exit_layer == 2
    assert clock.choose() == PLAIN


def test_leaves_count_for_what_they_bring_and_cost() -> None:
    def choose(**leaves: float) -> ExitChoice:
        control = control_of(TokensPerSecond(costs, **leaves))
        return play(control, 0.2, 40)[-1]

    costs = ExitCosts(plain=1.0, draft=[0.3] * 2, verify=[1.0, 1.05, 1.1], saved=[0.0] * 2)
    assert choose() == PLAIN  # 1.2 tokens in 1.35 seconds
    choice = choose(rescue=0.5, num_siblings=2)  # 1.6 tokens in 1.45
    assert choice.exit_layer is not None
    assert choice.sibling == pytest.approx(0.05), "a leaf is worth the tokens that its time would bring"
    assert choose(rescue=0.5, num_siblings=6) == PLAIN


def test_the_prior_decides_until_tokens_do() -> None:
    def choose(num_wrong: int, **prior: Any) -> ExitChoice:
        control = control_of(TokensPerSecond(CHEAP, **prior))
        control.seed(np.zeros((1, 2, num_wrong)), np.full((1, 2, num_wrong), 0.5))
        return control.choose()

    assert choose(0, prior_acceptance=[0.1, 0.9]).exit_layer == 4
    assert choose(0, prior_acceptance=0.01) == PLAIN
    assert choose(1, prior_acceptance=0.9, prior_tokens=50.0).exit_layer == 2
    assert choose(32, prior_acceptance=0.9) == PLAIN


OBJECTIVES = {
    "clock": TokensPerSecond(CHEAP),
    "DEL": TokensPerLayer(num_layers=NUM_LAYERS),
    "DEL-E": TokensPerLayer(num_layers=NUM_LAYERS, fixed_length=True),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_no_more_is_drafted_than_can_be_used(objective: ExitObjective) -> None:
    control = control_of(objective, max_length=6)
    play(control, 1.0, 10)
    assert control.choose().length == 6
    assert control.choose(max_length=4).length == 4
    assert control.choose(max_length=99).length == 6
    assert control.choose(max_length=0) == PLAIN


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_extreme_streams_are_survived(objective: ExitObjective, agreement: float, confidence: float) -> None:
    control = control_of(objective, num_rows=2)
    with np.errstate(all="raise"):
        for counts in ([0, 0], [3, 1], [0, 4], *[[4, 4]] * 200):
            choice = control.choose()
            assert 0.0 <= choice.threshold <= 1.0
            assert (choice.exit_layer is None) == (choice.length == 0)
            agreement_BET, confidence_BET = np.full((2, 2, 4), agreement), np.full((2, 2, 4), confidence)
            for row, count in enumerate(counts):
                agreement_BET[row, :, count:] = confidence_BET[row, :, count:] = np.nan
            control.observe(agreement_BET, confidence_BET, counts)
    np.testing.assert_allclose(control.statistics.acceptance_BE, agreement)


def test_masked_prompt_positions_are_ignored() -> None:
    ragged, alone = control_of(TokensPerSecond(CHEAP)), control_of(TokensPerSecond(CHEAP))
    alone.seed([[[1, 0]] * 2], [[[0.9, 0.2]] * 2])
    ragged.seed([[[np.nan, 1, 0]] * 2], [[[np.nan, 0.9, 0.2]] * 2], np.array([[False, True, True]]))
    np.testing.assert_array_equal(ragged.statistics.counts_SBEK, alone.statistics.counts_SBEK)
    np.testing.assert_array_equal(ragged.statistics.confidence_SBE, alone.statistics.confidence_SBE)


@pytest.mark.parametrize("decay_per_token", [False, True])
def test_unobserved_exits_age_like_the_others(decay_per_token: bool) -> None:
    """In closed form: the sum over the rounds that saw an exit of decay^age, age in rounds or in committed tokens."""
    rng = np.random.default_rng(0)
    exits, num_rounds = (2, 4, 6), 30
    control = control_of(TokensPerLayer(num_layers=NUM_LAYERS), exits, decay=0.9, decay_per_token=decay_per_token)
    seen = [sorted(rng.choice(exits, size=rng.integers(0, 4), replace=False)) for _ in range(num_rounds)]
    counts = rng.integers(1, 6, size=num_rounds)
    agreements = [rng.random((1, len(layers), 5)) < 0.6 for layers in seen]
    for layers, agreement, count in zip(seen, agreements, counts, strict=True):
        control.observe(agreement, np.full(agreement.shape, 0.5), [count], exits=layers)
    ages = [sum(counts[index + 1 :]) if decay_per_token else num_rounds - 1 - index for index in range(num_rounds)]
    for place, layer in enumerate(exits):
        agreed = total = 0.0
        for layers, agreement, count, age in zip(seen, agreements, counts, ages, strict=True):
            if layer in layers:
                agreed += 0.9**age * agreement[0, layers.index(layer), :count].sum()
                total += 0.9**age * count
        assert control.statistics.acceptance_BE[0, place] == pytest.approx(agreed / total)


def test_overlaps_count_as_fractions_of_tokens() -> None:
    """When sampling, a token that would be accepted with probability 0.25 is a quarter of a match."""
    control = control_of(TokensPerLayer(num_layers=NUM_LAYERS))
    control.observe([[[0.25, 0.75], [1.0, 0.5]]], [[[0.2, 0.6], [0.4, 0.8]]], [2])
    np.testing.assert_allclose(control.statistics.acceptance_BE, [[0.5, 0.75]])
    right, wrong = 0.25 * 0.2 + 0.75 * 0.6, 0.75 * 0.2 + 0.25 * 0.6
    np.testing.assert_allclose(control.statistics.midpoint_E, [(right + wrong) / 2, (0.8 / 1.5 + 0.8) / 2])


def random_round(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    agreement_BET = rng.random((num_rows, 2, 5)) < np.linspace(0.3, 0.9, num_rows)[:, None, None]
    return agreement_BET, rng.random((num_rows, 2, 5)), rng.integers(1, 6, size=num_rows)


@pytest.mark.parametrize("decay_per_token", [False, True])
def test_rows_keep_to_themselves_and_leave(decay_per_token: bool) -> None:
    rng = np.random.default_rng(1)

    def control(num_rows: int) -> ExitControl:
        return control_of(TokensPerSecond(CHEAP), num_rows=num_rows, decay=0.9, decay_per_token=decay_per_token)

    batch, alone = control(3), [control(1) for _ in range(3)]
    rows = [0, 1, 2]
    for leaving in (1, 0):
        for _ in range(10):
            agreement_BET, confidence_BET, counts_B = random_round(rng, len(rows))
            batch.observe(agreement_BET, confidence_BET, counts_B)
            for place, row in enumerate(rows):
                one = slice(place, place + 1)
                alone[row].observe(agreement_BET[one], confidence_BET[one], counts_B[one])
        expected = [alone[row].statistics.acceptance_BE[0] for row in rows]
        np.testing.assert_allclose(batch.statistics.acceptance_BE, expected)
        batch.select_rows([place for place in range(len(rows)) if place != leaving])
        del rows[leaving]
    assert rows == [2]
    assert batch.choose() == alone[2].choose()


def test_a_batch_is_chosen_for_by_the_sum_of_its_rows() -> None:
    """The cheap exit is as good as the dear one for the first row, and useless for the second."""
    good, bad = [1] * 18 + [0] * 2, [0] * 20
    agreement = np.array([[good, good], [bad, good]])
    choices = []
    for rows in ([0], [1], [0, 1]):
        control = control_of(TokensPerSecond(replace(CHEAP, plain=float(len(rows)))), num_rows=2)
        control.seed(agreement, np.full(agreement.shape, 0.5))
        control.select_rows(rows)
        choices.append(control.choose().exit_layer)
    assert choices == [2, 4, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: control_of(TokensPerSecond(CHEAP), exits=[4, 2]), "increasing"),
        (lambda: control_of(TokensPerSecond(CHEAP), exits=[]), "increasing"),
        (lambda: control_of(TokensPerSecond(CHEAP), decay=0.0), "decay"),
        (lambda: control_of(TokensPerSecond(CHEAP), max_length=0), "max_length"),
        (lambda: TokensPerSecond(CHEAP, prior_tokens=0.0), "prior_tokens"),
        (lambda: replace(CHEAP, saved=[0.1]), "one per exit"),
        (lambda: replace(CHEAP, verify=[1.0]), "root"),
        (lambda: replace(CHEAP, plain=0.0), "positive"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
