"""Routers replayed on cached steps say what they say live."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import routers
import specdec
from bench import arbitrage, step_replay
from bench.arbitrage_report import Costs, sign_test
from bench.arbitrage_results import Results
from bench.step_cache import CachedStep, Request, StepCache, with_source
from bench.step_replay import Replayed, replay_all
from routers import FirstTokenEntropy, OwnDoubt
from specdec.drafters import QuantizedSelf
from specdec.testing import ByteTokenizer, tiny_model
from specdec.training.routers.collect import Problem, encode_problems
from specdec.tree_model.model import TreeModel
from tests.support.routed_steps import STEPS

TOKENIZER = ByteTokenizer()
PROBLEMS = {3: Problem(question="one and one"), 5: Problem(question="two")}
NUM_NEW = 48
REGRET, LIKELIHOOD = routers.TargetRegret(), routers.TargetLikelihood()
PLAN = {"target": "tiny"}


class Seen(routers.Router):
    """Keeps every step, and what would be asked about each."""

    steps = STEPS
    needs = frozenset({"log_probs", "signals"})

    def __init__(self):
        self.scores: list[tuple[float, ...]] = []

    def decide(self, steps, target):
        (step,) = steps
        (regret,), (likelihood,) = (ask.rewards(steps, target) for ask in (REGRET, LIKELIHOOD))
        self.scores.append((OwnDoubt.of(step), FirstTokenEntropy.entropy(step), 1 - regret, likelihood))
        return [routers.Decision(escalate=len(self.scores) % 2 == 0)]


def all_routers(doubt: float, entropy: float, regret: float, likelihood: float) -> dict[str, routers.Router]:
    """With these thresholds."""
    early = routers.EarlyEscalation(entropy=entropy, tokens=2)
    return {
        "target": routers.AlwaysTarget(steps=STEPS),
        "draft": routers.AlwaysDraft(steps=STEPS),
        "confidence": routers.SelfConfidence(threshold=doubt, look_every=2, steps=STEPS),
        "entropy": FirstTokenEntropy(threshold=entropy, steps=STEPS),
        "regret": routers.Arbitrage(routers.Shortfall(REGRET), threshold=regret, steps=STEPS),
        "likelihood": routers.RewardThreshold(LIKELIHOOD, threshold=likelihood, steps=STEPS),
        "early": routers.Arbitrage(OwnDoubt(), threshold=doubt, early=early, steps=STEPS),
        "oracle": routers.Oracle(REGRET, threshold=regret - 1, steps=STEPS),
    }


ASKING = ("regret", "likelihood", "oracle")
"""Of them those that have the target read every step anyway."""


def kept_before_the_target(run: Replayed) -> int:
    """Tokens of the draft's steps after which the target writes one."""
    lengths = np.diff([0, *run.ends])
    last = max((index for index, writer in enumerate(run.writers) if writer == "target"), default=0)
    kept = (length for length, writer in zip(lengths[:last], run.writers, strict=False) if writer == "draft")
    return int(sum(kept))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def refuse(requests: Sequence[Request]) -> list[CachedStep]:
    raise AssertionError(f"{requests} are not in the file")


def test_a_replay_is_what_a_live_run_is(model, tmp_path):
    drafter, path, replayed = QuantizedSelf(weights="int4", num_tokens=3), tmp_path / "steps.jsonl", {}
    cached = StepCache(path, PLAN)
    prompts = {
        number: encode_problems(TOKENIZER, [problem])["input_ids"][0].tolist() for number, problem in PROBLEMS.items()
    }

    seen = Seen()
    thresholds: list[float] = []

    def job(source):
        replay_all(seen, list(PROBLEMS), prompts, TOKENIZER.decode, cached, source.write)
        middle = len(seen.scores) // 2  # between two scores: one that is met exactly is a matter of rounding
        thresholds.extend(np.sort(seen.scores, axis=0)[middle - 1 : middle + 1].mean(axis=0).tolist())
        for name, router in all_routers(*thresholds).items():
            replayed[name] = replay_all(router, list(PROBLEMS), prompts, TOKENIZER.decode, cached, source.write)

    with_source(model, drafter, TOKENIZER, PROBLEMS, job, max_new_tokens=NUM_NEW, steps=STEPS)
    shares = set()
    for name, router in all_routers(*thresholds).items():
        for number, run in zip(PROBLEMS, replayed[name], strict=True):
            out = specdec.generate(
                model,
                **encode_problems(TOKENIZER, [PROBLEMS[number]]),
                drafter=drafter,
                router=copy.deepcopy(router),
                tokenizer=TOKENIZER,
                max_new_tokens=NUM_NEW,
                do_sample=False,
                return_dict_in_generate=True,
            )
            assert run.tokens == out.sequences[0, len(prompts[number]) :].tolist(), name
            assert run.writers == [step.writer for step in out.stats.steps], name
            kept = sum(step.num_tokens for step in out.stats.steps if step.writer == "draft")
            assert (run.num_kept, run.num_written) == (kept, len(run.tokens) - kept)
            assert run.num_vain <= run.num_vain_unlooked
            assert run.num_caught_up == (0 if name in ASKING else kept_before_the_target(run)), name
            assert run.num_taken_over <= min(run.num_written, run.num_verified)
            if name != "oracle":  # live, what the target wrote for it in vain counts too
                assert run.num_vain == sum(step.num_discarded for step in out.stats.steps), name
            shares.add(out.stats.escalation_rate)
    assert len(shares) > 3, "the routers decide differently"

    again = StepCache(path, PLAN)
    assert len(again) == len(cached)
    for name, router in all_routers(*thresholds).items():
        runs = replay_all(router, list(PROBLEMS), prompts, TOKENIZER.decode, again, refuse)
        assert [run.tokens for run in runs] == [run.tokens for run in replayed[name]]


def test_steps_that_are_scored_one_after_the_other_are_read_once(model, monkeypatch):
    """So that what a verification costs is not what reading the whole text again costs."""
    widths: list[int] = []
    verify = TreeModel.verify
    monkeypatch.setattr(
        TreeModel, "verify", lambda self, trees, roots: widths.append(trees.num_slots) or verify(self, trees, roots)
    )

    def job(source):
        text: tuple[int, ...] = ()
        for _ in range(4):
            (step,) = source.write([Request("draft", 3, text)])
            widths.clear()
            source.write([Request("score", 3, text, tuple(step.tokens))])
            assert widths == [len(step.tokens) + 1], "the step, after the last token before it"
            text += tuple(step.tokens)

    problem = {3: PROBLEMS[3]}
    drafter = QuantizedSelf(weights="int4", num_tokens=3)
    with_source(model, drafter, TOKENIZER, problem, job, max_new_tokens=NUM_NEW, steps=STEPS)


def test_steps_of_another_plan_are_refused(tmp_path):
    path = tmp_path / "steps.jsonl"
    StepCache(path, PLAN)
    assert json.loads(path.read_text()) == PLAN
    with pytest.raises(ValueError, match="of other models or settings"):
        StepCache(path, {"target": "another"})


def test_costs_and_signs():
    measured = [
        {"problem": 0, "target_seconds": 2, "target_tokens": 10, "draft_seconds": 1, "draft_tokens": 20},
        {"problem": 1, "target_seconds": 2, "target_tokens": 10, "draft_seconds": 1, "draft_tokens": 20},
    ]
    costs = Costs.of([{**one, "score_seconds": 1, "score_tokens": 50} for one in measured])
    assert costs == Costs(target=0.2, draft=0.05, verification=0.02, num_problems=2)
    run = Replayed(
        problem=0, num_kept=100, num_written=30, num_taken_over=10, num_vain=20, num_verified=30, num_caught_up=40
    )
    assert costs.seconds(run) == pytest.approx(130 * 0.05 + 20 * 0.2 + 70 * 0.02)
    assert costs.seconds(run, one_cache=True) == pytest.approx(130 * 0.05 + 20 * 0.2 + 30 * 0.02)
    assert sign_test(np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(1 / 8)
    assert sign_test(np.array([0.0])) == 1.0


METHODS = ("speculative", "draft", "random@0.5", "confidence@0.5~2")


@pytest.fixture
def bench(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the script on two problems."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": text, "answer": "#### 2"}) + "\n" for text in ("one", "two")))

    def run(*options: str) -> None:
        common = ("--problems", str(problems), "--max-new-tokens", "24", "--batch-size", "1")
        arguments = [tiny, *common, "--output", str(tmp_path / "new" / "found"), *options]
        monkeypatch.setattr(sys, "argv", ["arbitrage", *arguments])
        arbitrage.main()

    return run


@pytest.mark.slow  # with `make test-all`, which installs matplotlib
def test_the_curve_goes_on_where_it_was_stopped(bench, tmp_path, capsys):
    files = [tmp_path / "new" / f"found.{kind}.jsonl" for kind in ("steps", "costs", "live", "batched")]
    live = ("--live", "speculative", "confidence@0.5+onecache+ahead2", "--live-limit", "2")
    live += ("--batched", "confidence@0.5+onecache")
    bench("--methods", *METHODS, *live, "--alone", "1", "--limit", "1")
    first = [path.read_text() for path in files]
    bench("--methods", *METHODS, *live, "--alone", "1")
    second = [path.read_text() for path in files]
    assert all(after.startswith(before) for before, after in zip(first, second, strict=True))
    assert second[0] != first[0]
    assert [text.count("\n") for text in second[2:]] == [4, 2]
    bench("--methods", *METHODS, *live, "--alone", "1", "--minutes", "0")
    assert [path.read_text() for path in files] == second, "nothing is done twice"
    report = (tmp_path / "new" / "found.md").read_text()
    assert "Replayed on cached greedy steps, 2 problems" in report
    assert "Live, one problem at a time, 2 problems" in report
    assert report.count("LOSSY") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "speculative", "confidence@0.5+onecache"), "name it in --batched or --live"),
        (("--live", "draft"), "name it in --live too"),
        (("--methods", "speculative", "confidence@0.5+ahaed2"), "is none of those above"),
        (("--methods", "speculative", "entropy@0.5~4"), "only confidence looks"),
        (("--methods", *METHODS[:2], "--minutes", "0"), "give it more --minutes"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(bench, tmp_path, capsys, options, message: str):
    with pytest.raises((ValueError, SystemExit)) as refused:
        bench(*options)
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "new" / "found.live.jsonl").exists()


def test_a_rate_is_held_over_an_interruption():
    whole, later = (arbitrage.make_router("confidence@0.3", None, 0) for _ in range(2))
    scores = np.random.default_rng(0).random(40).tolist()
    decided = [whole.gate.decide(score).escalate for score in scores]
    before = {"method": "later", "decisions": list(zip(scores[:20], decided[:20], strict=True))}
    Results(Path("unused"), [before]).recall({"later": later})
    assert [later.gate.decide(score).escalate for score in scores[20:]] == decided[20:]


@pytest.mark.parametrize(
    ("num_drafted", "num_agreed", "num_read"),
    [(5, 0, 5), (16, 16, 16), (40, 0, 16), (40, 16, 16), (40, 17, 32), (40, 40, 38), (17, 17, 16), (0, 0, 0)],
)
def test_tokens_that_are_read_of_a_rejected_step(num_drafted: int, num_agreed: int, num_read: int):
    """17 at a time are known of one that agrees: the sixteen, and the one that the target says after them."""
    assert step_replay._num_read(num_drafted, num_agreed) == num_read
