"""Steps, scores, budgets and policies, without a model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import routers
from routers import (
    AbstainBand,
    Arbitrage,
    DraftedStep,
    EarlyEscalation,
    EscalationBudget,
    FirstTokenEntropy,
    Oracle,
    RandomRouter,
    RewardThreshold,
    Segmenter,
    SelfConfidence,
    SelfScore,
    Signals,
    Steps,
)

PIECES = ["a", "b", "\n", "\n\n", ".\n\n", "\n\n\n", " ", "```", "``", "`", "x\ny", "\n\n  c"]


def segmenter(**options) -> Segmenter:
    return Segmenter(Steps(**options), lambda tokens: "".join(PIECES[token] for token in tokens))


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "end"),
    [
        (("a", "b"), None),
        (("a", "\n\n", "b"), 2),
        (("a", "\n", "\n", "b"), 3),
        (("a", ".\n\n", "b"), 2),
        (("a", "\n\n\n", "b"), 2),
        (("a", "\n\n  c", "b"), 2),
        (("x\ny", "\n", "b"), None),
        (("a", "\n", "b", "\n"), None),
        (("\n\n", "\n", "a", "\n\n"), 4),
        (("a", "```", "\n\n", "b", "```", "\n\n", "a"), 6),
        (("a", "``", "`", "\n\n", "b"), None),
    ],
)
def test_where_a_step_ends(pieces: tuple[str, ...], end: int | None):
    assert segmenter().end(ids(*pieces)) == end
    for known in range(end or len(pieces)):
        assert segmenter().end(ids(*pieces), known=known) == end


def test_a_step_without_separator_ends_at_its_limit():
    assert segmenter(max_tokens=3).end(ids("a", "b", "a", "b")) == 3
    assert segmenter(max_tokens=3).end(ids("```", "\n\n", "a", "b")) == 3


def test_code_blocks_that_a_step_leaves_open():
    finder = segmenter()
    assert finder.in_fence_after(ids("a", "```", "b"), False)
    assert not finder.in_fence_after(ids("a", "```", "b"), True)
    assert finder.end(ids("a", "\n\n"), in_fence=True) is None
    assert segmenter(fences=False).end(ids("a", "```", "\n\n"), in_fence=True) == 3


def test_other_separators():
    assert segmenter(separators=("b", "\n")).end(ids("a", "a", "x\ny", "b")) == 3


@pytest.mark.parametrize(
    "options", [{"separators": "\n"}, {"separators": ()}, {"separators": ("",)}, {"max_tokens": 0}]
)
def test_steps_that_cannot_be(options: dict):
    with pytest.raises(ValueError, match="Steps"):
        Steps(**options)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scores", ["uniform", "drifting", "five values", "constant"])
def test_a_rate_is_realised(rate: float, scores: str):
    chance = random.Random(0)
    draw = {
        "uniform": lambda index: chance.random(),
        "drifting": lambda index: chance.random() + index / 500,
        "five values": lambda index: chance.randrange(5),
        "constant": lambda index: 0.5,
    }[scores]
    budget = EscalationBudget(rate)
    escalated = [budget.decide(draw(index)) for index in range(1500)]
    assert abs(sum(escalated) / 1500 - rate) < 0.02
    assert abs(sum(escalated[:300]) / 300 - rate) < 0.03
    assert budget.num_escalated == sum(escalated)


def test_a_budget_prefers_high_scores():
    chance, budget = random.Random(0), EscalationBudget(0.3)
    decided = [(score, budget.decide(score)) for score in (chance.random() for _ in range(2000))]
    taken = sorted(score for score, escalated in decided[200:] if escalated)
    assert taken[len(taken) // 20] > 0.6


def test_steps_that_were_decided_otherwise_are_on_the_account():
    budget = EscalationBudget(0.5)
    for index in range(400):
        budget.count(True) if index % 4 == 0 else budget.decide(random.Random(index).random())
    assert abs(budget.num_escalated / budget.num_steps - 0.5) < 0.02


def step(text: str = "a step", *, row: int = 0, entropies: Sequence[float] = (0.1, 0.2)) -> DraftedStep:
    zeros = np.zeros(len(entropies), np.float32)
    signals = Signals(log_probs=zeros, entropies=np.array(entropies, np.float32), margins=zeros)
    return DraftedStep(
        row=row,
        prompt=[],
        previous=(),
        writers=(),
        tokens=[ord(char) for char in text],
        signals=signals,
        is_last=False,
        decode=lambda tokens: "".join(map(chr, tokens)),
    )


class Given:
    """Scores and rewards by text."""

    def __init__(self, **values: float):
        self.values = values
        self.asked: list[str] = []

    def score(self, steps, target):
        self.asked.extend(item.text for item in steps)
        return [self.values[item.text] for item in steps]

    rewards = score


class Target:
    """Answers like a target that is fond of the letter b."""

    def log_probs(self, steps):
        return [np.log([0.9 if token == ord("b") else 0.1 for token in item.tokens]) for item in steps]

    def regrets(self, steps):
        return [np.log([1.0 if token == ord("b") else 9.0 for token in item.tokens]) for item in steps]

    def answers(self, steps, question, opening, choices):
        assert len(choices) == 10
        return [np.eye(10)[9 if item.text == "b" else 2] for item in steps]

    def write(self, steps):
        return [step("b", row=item.row) for item in steps]


def verdicts(router: routers.Router, *texts: str) -> list[bool]:
    return [decision.escalate for decision in router.decide([step(text) for text in texts], Target())]


def test_thresholds():
    assert verdicts(Arbitrage(Given(a=0.4, b=0.5, c=0.6), threshold=0.5), "a", "b", "c") == [False, False, True]
    assert verdicts(RewardThreshold(Given(a=0.4, b=0.5, c=0.6), threshold=0.5), "a", "b", "c") == [True, False, False]
    assert verdicts(SelfScore(threshold=7), "a", "b") == [True, False]


def test_the_oracle_keeps_the_better_step():
    assert verdicts(Oracle(routers.TargetLikelihood()), "a", "b", "ab") == [True, False, True]
    (decision,) = Oracle(routers.TargetLikelihood()).decide([step("a")], Target())
    assert decision.score == pytest.approx(0.8)
    assert verdicts(Oracle(routers.TargetLikelihood(), threshold=0.85), "a") == [False]


def test_the_targets_own_steps_have_no_regrets():
    assert verdicts(Oracle(routers.TargetRegret()), "a", "b") == [True, False]
    (decision,) = Oracle(routers.TargetRegret()).decide([step("a")], Target())
    assert decision.score == pytest.approx(np.log(9))


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"escalation_rate": 0.0}])
def test_a_step_without_a_score_is_the_targets(options: dict):
    (decision,) = Arbitrage(Given(a=math.nan), **options).decide([step("a")], Target())
    assert decision.escalate
    assert decision.reason == "no score"
    assert verdicts(Oracle(Given(a=math.nan, b=1.0)), "a") == [True]


def test_final_answers_are_the_targets():
    scorer = Given(a=0.0, **{"so #### 4": 0.0})
    router = Arbitrage(scorer, threshold=0.5, guard=("####",))
    assert verdicts(router, "a", "so #### 4") == [False, True]
    assert scorer.asked == ["a"]
    assert verdicts(Arbitrage(scorer, threshold=0.5), "so #### 4") == [False]


def test_in_the_band_another_judge_decides():
    judge = Given(b=0.2, c=0.9)
    band = AbstainBand(low=0.3, high=0.7, judge=judge, threshold=0.5)
    router = Arbitrage(Given(a=0.1, b=0.6, c=0.4, d=0.8), threshold=0.5, band=band)
    assert verdicts(router, "a", "b", "c", "d") == [False, False, True, True]
    assert judge.asked == ["b", "c"]


def test_a_first_token_that_the_draft_is_unsure_of():
    router = Arbitrage(Given(), threshold=0.5, early=EarlyEscalation(entropy=1.0, tokens=2))
    assert router.peek == 2
    sure, unsure, late = (step(entropies=values) for values in ((0.5, 0.9), (0.1, 1.2), (0.1, 0.2, 3.0)))
    early = router.decide_early([sure, unsure, late])
    assert [decision is not None and decision.escalate for decision in early] == [False, True, False]


def test_random_routing_keeps_its_rate():
    router = RandomRouter(0.3, seed=1)
    early = router.decide_early([step()] * 3000)
    assert abs(sum(decision is not None for decision in early) / 3000 - 0.3) < 0.03


BAND = AbstainBand(low=0, high=1, judge=Given(), threshold=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arbitrage(Given()), "either a threshold or"),
        (lambda: Arbitrage(Given(), threshold=0.5, escalation_rate=0.5), "either a threshold or"),
        (lambda: Arbitrage(Given(), escalation_rate=1.5), "share of steps"),
        (lambda: Arbitrage(Given(), threshold=0.5, guard="####"), "sequence of texts"),
        (lambda: Arbitrage(Given(), escalation_rate=0.5, band=BAND), "around a threshold"),
        (lambda: AbstainBand(low=1, high=0, judge=Given(), threshold=0.5), "low is below high"),
        (lambda: EarlyEscalation(entropy=-1), "are positive"),
        (lambda: RandomRouter(-0.1), "share of steps"),
    ],
)
def test_routers_that_cannot_be(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def unsure(*probabilities: float, entropy: float = 0.5) -> DraftedStep:
    """A step whose tokens had these probabilities."""
    zeros = np.zeros(len(probabilities), np.float32)
    signals = Signals(
        log_probs=np.log(np.array(probabilities, np.float32)), entropies=zeros + np.float32(entropy), margins=zeros
    )
    return replace(step(), tokens=[0] * len(probabilities), signals=signals)


def test_the_least_likely_token_decides():
    router = SelfConfidence(threshold=0.6)
    decisions = router.decide([unsure(0.9, 0.5, 0.9), unsure(0.9, 0.3, 0.9), unsure()], Target())
    assert [decision.escalate for decision in decisions] == [False, True, True]
    assert decisions[1].score == pytest.approx(0.7)
    assert decisions[2].reason == "no score", "a draft that tells nothing is not trusted"


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_looks_at_a_growing_step_change_no_decision(threshold: float):
    router, chance = SelfConfidence(threshold=threshold, look_every=3), random.Random(0)
    for _ in range(200):
        probabilities = [1 - chance.random() ** 3 for _ in range(chance.randrange(1, 20))]
        (judged,) = router.decide([unsure(*probabilities)], Target())
        looks = [router.decide_early([unsure(*probabilities[:count])])[0] for count in range(3, len(probabilities), 3)]
        assert judged.escalate or not any(looks)
        assert all(look is None or look.escalate for look in looks)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_rate_is_realised_with_looks(rate: float):
    router, chance = SelfConfidence(escalation_rate=rate, look_every=4), random.Random(0)
    escalated = 0
    for _ in range(1500):
        probabilities = [1 - chance.random() ** 3 for _ in range(12)]
        for count in (4, 8):
            (look,) = router.decide_early([unsure(*probabilities[:count])])
            if look is not None:
                break
        escalated += (look or router.decide([unsure(*probabilities)], Target())[0]).escalate
    assert abs(escalated / 1500 - rate) < 0.03


def test_the_first_token_decides():
    router = FirstTokenEntropy(threshold=1.0)
    assert router.peek == 1
    early = router.decide_early([unsure(0.5, entropy=0.9), unsure(0.5, entropy=1.1), unsure()])
    assert [decision is not None and decision.escalate for decision in early] == [False, True, True]
    assert None not in early, "the rest of the step is not looked at"
    rated, chance = FirstTokenEntropy(escalation_rate=0.3), random.Random(0)
    decided = [rated.decide_early([unsure(0.5, entropy=chance.random())])[0] for _ in range(1000)]
    assert abs(sum(decision.escalate for decision in decided) / 1000 - 0.3) < 0.03


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfConfidence(), "either a threshold or"),
        (lambda: SelfConfidence(threshold=0.5, look_every=0), "positive integer, or None"),
        (lambda: SelfConfidence(threshold=0.5, early=EarlyEscalation(entropy=1.0)), "leave early= out"),
        (lambda: FirstTokenEntropy(), "either a threshold or"),
        (lambda: FirstTokenEntropy(escalation_rate=2), "share of steps"),
    ],
)
def test_training_free_routers_that_cannot_be(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
