"""Collecting steps, training a light router on them, and measuring it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import routers
import specdec
from routers import (
    Arbitrage,
    DraftedStep,
    LightRouter,
    Reward,
    Signals,
    Steps,
    TargetLikelihood,
    TargetRegret,
    measures,
)
from routers.calibration import undo_prior
from routers.collecting import Collection, StepTuple
from routers.features import NAMES, features
from routers.numbers import logit, sigmoid
from routers.text_router import TextRecipe, TextRouter, as_text, train_text
from routers.training import LightRecipe, train_light
from specdec.cli.app import app
from specdec.drafters import SmallModel
from specdec.testing import ByteTokenizer, tiny_model
from specdec.training.routers import rollouts
from specdec.training.routers.collect import Problem, collect, final_answer, read_problems
from specdec.training.routers.rollouts import Rollouts
from tests.support.references import with_noise

RANDOM = np.random.default_rng(0)


def tied(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    scores = RANDOM.integers(0, 12, count) / 12
    return scores, RANDOM.random(count) < 0.2 + 0.5 * scores


def test_measures_agree_with_those_of_others():
    scores, labels = tied()
    other = RANDOM.random(len(scores))
    assert measures.spearman(scores, other) == pytest.approx(spearmanr(scores, other).statistic)
    assert measures.auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    predicted = scores > 0.4
    assert measures.balanced_accuracy(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert measures.spearman(np.ones(5), np.arange(5.0)) == 0
    assert math.isnan(measures.auc(np.arange(3.0), np.zeros(3, bool)))


def test_calibration_error():
    probabilities = RANDOM.random(20000)
    drawn = RANDOM.random(20000) < probabilities
    assert measures.calibration_error(probabilities, drawn) < 0.02
    assert measures.calibration_error(np.full(1000, 0.9), RANDOM.random(1000) < 0.4) == pytest.approx(0.5, abs=0.06)


def test_regret_is_zero_for_the_oracle_and_largest_for_its_opposite():
    advantages = RANDOM.normal(size=100)
    assert measures.regret(advantages, advantages, 0.3) == pytest.approx(0)
    assert measures.regret(-advantages, advantages, 0.3) > measures.regret(RANDOM.random(100), advantages, 0.3) > 0


def test_the_controlled_threshold_is_the_largest_safe_one():
    """Against every threshold, tried."""
    for level, seed in product((0.02, 0.1, 0.3), range(5)):
        random = np.random.default_rng(seed)
        scores = random.integers(0, 20, 60) / 20
        harms = random.random(60) < scores / 2
        risks = {t: ((harms & (scores <= t)).sum() + 1) / 61 for t in np.unique(scores)}
        expected = max((t for t, risk in risks.items() if risk <= level), default=-math.inf)
        assert measures.controlled_threshold(scores, harms, level) == expected


def test_risk_is_controlled_in_expectation():
    """Steps kept and harmful are no more than the level, on average over calibration sets (standard error 0.001)."""
    random, shares = np.random.default_rng(0), []
    for _ in range(400):
        scores, new = random.random(50), random.random(400)
        threshold = measures.controlled_threshold(scores, random.random(50) < scores, 0.1)
        shares.append(((random.random(400) < new) & (new <= threshold)).mean())
    assert np.mean(shares) < 0.105


def test_the_prior_is_undone():
    """Trained on as many positives as negatives; in truth 37.7 % are positive (the paper's share): 0.84 means 0.76."""
    assert sigmoid(undo_prior(logit(np.array(0.84)), 0.5, 0.377)) == pytest.approx(0.76, abs=0.005)


def made_up(num_texts: int = 60, *, hidden: int = 0, seed: int = 0) -> list[StepTuple]:
    """Steps on which the target does better the more entropy the draft had, and the larger a hidden state is."""
    random = np.random.default_rng(seed)
    tuples = []
    for problem, index in product(range(num_texts), range(6)):
        inputs = random.normal(size=len(NAMES))
        states = random.normal(size=hidden)
        signal = inputs[1] if not hidden else states[0]
        tuples.append(
            StepTuple(
                problem=problem,
                index=index,
                prompt="",
                previous=[],
                writers=[],
                drafted="a",
                written="b",
                features=inputs.tolist(),
                hidden=states.tolist(),
                draft_reward=0.0,
                target_reward=float(signal - 0.6 + 0.5 * random.normal()),
            )
        )
    return tuples


@pytest.mark.parametrize(("kind", "hidden"), [("forest", False), ("linear", False), ("linear", True)])
def test_a_router_learns_what_there_is_and_survives_the_disk(kind: str, hidden: bool, tmp_path: Path):
    tuples = made_up(hidden=5 if hidden else 0)
    router = train_light(tuples, LightRecipe(kind=kind, hidden=hidden))
    report = router.report
    assert report.rank_correlation > 0.6
    assert report.balanced_accuracy > 0.72
    assert report.auc > 0.85
    assert report.calibration_error < 0.15
    assert 0 <= report.regret < report.random_regret
    assert (report.num_texts, report.num_steps) == (15, 90)
    router.save(tmp_path)
    loaded = routers.load(tmp_path)
    inputs = np.array([[*item.features, *item.hidden] for item in tuples], np.float32)
    np.testing.assert_array_equal(loaded.probabilities(inputs), router.probabilities(inputs))
    assert loaded.report == report
    assert ("hidden" in loaded.needs) == hidden


def test_a_text_classifier_learns_what_there_is_and_survives_the_disk(tiny: str, tmp_path: Path):
    """Steps with an 'x' are those on which the target does better."""
    random, tuples = np.random.default_rng(0), []
    for item in made_up(24):
        is_wrong = bool(random.random() < 0.4)
        text = "it is " + ("xx" if is_wrong else "yy")
        gain = float(random.normal(scale=0.2) + (1 if is_wrong else -1))
        tuples.append(replace(item, prompt="p", previous=["s"], writers=["target"], drafted=text, target_reward=gain))
    recipe = TextRecipe(epochs=4, learning_rate=3e-3, max_length=32)
    losses: list[float] = []
    router = train_text(tuples, tiny, recipe, progress=lambda done, total, loss: losses.append(loss))
    assert router.report.balanced_accuracy > 0.9
    assert router.report.rank_correlation > 0.5
    assert len(losses) == 4 * -(-84 // 16)
    router.save(tmp_path)
    loaded = routers.load(tmp_path)
    assert isinstance(loaded, TextRouter)
    step = drafted("it is xx", [0.0])
    assert loaded.score([step], None) == router.score([step], None)
    assert loaded.score([step], None)[0] > loaded.calibration.threshold
    assert loaded.score([drafted("it is yy", [0.0])], None)[0] <= loaded.calibration.threshold
    assert loaded.report == router.report
    with pytest.raises(ValueError, match="no text router"):
        TextRouter.load(tiny)


def test_what_the_text_classifier_reads():
    text = as_text("problem\n", ["one\n\n", "two"], ["target", "draft"], "three\n\n")
    assert text == "problem\n\nModel 1: one\n\nModel 0: two\n\nModel 0: three"


def test_a_forest_is_what_scikit_learn_has_grown():
    from sklearn.ensemble import GradientBoostingClassifier

    from routers.training import _as_forest

    inputs = RANDOM.normal(size=(300, 4)).astype(np.float32)
    labels = inputs[:, 0] + inputs[:, 1] ** 2 > 0.5
    boosted = GradientBoostingClassifier(n_estimators=20, random_state=0).fit(inputs, labels)
    difference = boosted.decision_function(inputs) - _as_forest(boosted).logits(inputs)
    np.testing.assert_allclose(difference, difference[0], atol=1e-9)


def test_what_cannot_be_trained_on():
    with pytest.raises(ValueError, match="too few"):
        train_light(made_up(5), LightRecipe())
    with pytest.raises(ValueError, match="without hidden states"):
        train_light(made_up(), LightRecipe(hidden=True))
    with pytest.raises(ValueError, match="nothing to learn"):
        train_light(made_up(), LightRecipe(margin=100.0))
    with pytest.raises(ValueError, match="'forest' or 'linear'"):
        LightRecipe(kind="pickle")


def test_what_is_no_router(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no router"):
        LightRouter.load(tmp_path)
    train_light(made_up(), LightRecipe(kind="linear")).save(tmp_path)
    settings = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**settings, "features": ["other"]}))
    with pytest.raises(ValueError, match="another version"):
        LightRouter.load(tmp_path)


def drafted(tokens: str, entropies: list[float]) -> DraftedStep:
    column = np.array(entropies, np.float32)
    return DraftedStep(
        row=0,
        prompt=[],
        previous=([97],),
        writers=("target",),
        tokens=list(tokens.encode()),
        signals=Signals(log_probs=-column, entropies=column, margins=1 - column),
        is_last=True,
        decode=lambda ids: bytes(ids).decode(),
    )


def test_features():
    values = dict(zip(NAMES, features(drafted("a=4", [0.5, 0.0, 0.25])), strict=True))
    assert values["first entropy"] == values["highest entropy"] == 0.5
    assert values["mean log p"] == -0.25
    assert values["place of the least sure token"] == 0
    assert values["step"] == values["steps by the target"] == values["is last"] == values["has an equation"] == 1
    assert values["digits"] == pytest.approx(1 / 3)
    assert values["seen before"] == 0
    assert features(drafted("a", [math.nan])).tolist() == features(drafted("a", [math.nan])).tolist()
    assert np.isfinite(features(drafted("a", [math.inf]))).all()
    empty = features(drafted("", []))
    assert np.isfinite(empty).all()


PROBLEMS = [Problem(question=f"How much is {number} and {number}?") for number in range(12)]


def collected(
    folder: Path, problems: list[Problem] = PROBLEMS, plan: dict | None = None, reward: Reward | None = None
) -> Collection:
    model = tiny_model("llama")
    collection = Collection(folder, plan or {"a": 1})
    for _ in collect(
        model,
        with_noise(model, 0.01),
        ByteTokenizer(),
        problems,
        reward or TargetLikelihood(),
        collection,
        batch_size=4,
        max_new_tokens=16,
        keeps_hidden=True,
        steps=Steps(max_tokens=5),
    ):
        pass
    return collection


def test_steps_are_collected_and_resumed(tmp_path: Path):
    first = collected(tmp_path, PROBLEMS[:4])
    tuples = first.read()
    assert {item.problem for item in tuples} == {0, 1, 2, 3}
    assert all(len(item.hidden) == 32 and len(item.features) == len(NAMES) for item in tuples)
    assert {writer for item in tuples for writer in item.writers} == {"draft", "target"}
    same = [item for item in tuples if item.drafted == item.written and "\ufffd" not in item.drafted]
    assert same
    assert all(abs(item.advantage) < 1e-4 for item in same)
    assert all(0 < item.target_reward <= 1 for item in tuples)
    assert [item for item in collected(tmp_path).read() if item.problem < 4] == tuples
    (tmp_path / "00001.jsonl").unlink()
    assert {item.problem for item in collected(tmp_path).read()} == set(range(12))
    with pytest.raises(ValueError, match="other settings"):
        collected(tmp_path, plan={"a": 2})


def test_a_collected_reward_is_the_targets_likelihood(tmp_path: Path):
    model, tokenizer = tiny_model("llama"), ByteTokenizer()
    item = collected(tmp_path, PROBLEMS[:4]).read()[-1]
    for text, reward in ((item.drafted, item.draft_reward), (item.written, item.target_reward)):
        before = item.prompt + "".join(item.previous)
        if "\ufffd" in before + text:
            continue  # bytes that are no text cannot be read back
        ids = tokenizer(before + text, return_tensors="pt", add_special_tokens=False).input_ids
        log_p = model(ids).logits[0, len(before.encode()) - 1 : -1].log_softmax(-1)
        chosen = log_p.gather(1, ids[0, len(before.encode()) :, None])
        assert reward == pytest.approx(float(chosen.mean().exp()), rel=1e-3)


def test_of_collected_regrets_the_targets_own_steps_have_none(tmp_path: Path):
    tuples = collected(tmp_path, PROBLEMS[:4], reward=TargetRegret()).read()
    assert all(item.target_reward == 0 for item in tuples)
    assert all(item.draft_reward <= 0 for item in tuples)
    assert any(item.draft_reward < -0.01 for item in tuples)
    readable = [item for item in tuples if "\ufffd" not in item.drafted + item.written]
    assert all(item.drafted == item.written for item in readable if item.draft_reward == 0)


def test_a_trained_router_at_work(tmp_path: Path):
    model = tiny_model("llama")
    recipe = LightRecipe(kind="linear", hidden=True, margin=0.0)
    tuples = collected(tmp_path / "collected").read()
    router = train_light(tuples, recipe)
    policy = Arbitrage(router, escalation_rate=0.5, steps=Steps(max_tokens=5))
    out = specdec.generate(
        model,
        **ByteTokenizer()(["How much is 1 and 2?"], return_tensors="pt", return_token_type_ids=False),
        drafter=SmallModel(with_noise(model, 0.03)),
        router=policy,
        tokenizer=ByteTokenizer(),
        max_new_tokens=200,
        return_dict_in_generate=True,
    )
    assert abs(out.stats.escalation_rate - 0.5) <= 0.1
    assert all(0 <= step.score <= 1 for step in out.stats.steps)


def versions(*steps: tuple[str, str], problem: int = 0) -> list[StepTuple]:
    """Steps of a text, each in the draft's and in the target's version; the target's goes on."""
    previous: list[str] = []
    tuples = []
    for index, (drafted_text, written) in enumerate(steps):
        item = replace(made_up(1)[0], problem=problem, index=index, prompt="9 + 9?", previous=list(previous))
        tuples.append(replace(item, drafted=drafted_text, written=written))
        previous.append(written)
    return tuples


def test_a_reward_by_roll_out_is_the_share_of_right_answers():
    tuples = versions(("a", "b"), ("c", "c"), ("d 3<|eos|>", "e"))
    answers = {
        "a": ["1", "2", None, "2"],
        "b": ["2", "2", "2", "1"],
        "bc": ["2", "2", "1", "1"],
        "bcd 3<|eos|>": ["3"],
        "bce": ["2", "2", "2", "2"],
    }

    def rewards(answer: str | None) -> list[tuple[float, float]]:
        return [(item.draft_reward, item.target_reward) for item in rollouts.rewarded(tuples, answers, answer)]

    assert rewards("so it is #### 1") == [(0.25, 0.25), (0.5, 0.5), (0.0, 0.0)]
    assert rewards(None) == rewards("none at all") == rewards("2") == [(0.5, 0.75), (0.5, 0.5), (0.0, 1.0)]
    unknown = rollouts.rewarded(tuples, {text: [None] for text in answers}, None)
    assert all(math.isnan(item.draft_reward) and math.isnan(item.target_reward) for item in unknown)


def test_a_roll_out_without_an_end_has_an_answer_only_if_it_is_marked():
    assert rollouts._answer("that makes 18.<|eos|>", "<|eos|>") == "18"
    assert rollouts._answer("that makes 18 and", "<|eos|>") is None
    assert rollouts._answer(r"so \boxed{18}. Or", None) == "18"


def test_the_cost_of_roll_outs_is_told_before(tmp_path: Path):
    """Steps that both wrote alike are rolled out once, and texts that have ended not at all."""
    tuples = [*versions(("a", "b"), ("c", "c"), ("d<|eos|>", "e")), *versions(("a", "b"), problem=1)]
    labelled, how = Collection(tmp_path, {"a": 1}), Rollouts(count=3, max_new_tokens=50)
    whole = rollouts.cost(tuples, labelled, how, "<|eos|>")
    assert (whole.num_steps, whole.num_starts, whole.num_rollouts, whole.max_tokens) == (4, 6, 18, 900)
    assert str(whole) == "4 steps, 6 texts to go on from, 18 roll-outs: at most 900 tokens"
    labelled.write(0, [])
    assert rollouts.cost(tuples, labelled, how, "<|eos|>").num_steps == 1
    with pytest.raises(ValueError, match="count=0"):
        Rollouts(count=0, max_new_tokens=5)


class Answering:
    """Stands for the writing of roll-outs: says what was asked for, and answers by what a text contains."""

    def __init__(self):
        self.texts: list[str] = []

    def __call__(self, model, tokenizer, texts, how, generator) -> list[str]:
        self.texts += texts
        draws = [int(torch.randint(10, (), generator=generator)) for _ in texts]
        return [f" #### {7 if 'right' in text or draw < 3 else draw}" for text, draw in zip(texts, draws, strict=True)]


def test_roll_outs_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuples = [*versions(("wrong", "right")), *versions(("right", "wrong"), ("same", "same"), problem=1)]
    how, model, tokenizer = Rollouts(count=8, max_new_tokens=5, batch_size=3), tiny_model("llama"), ByteTokenizer()
    problems = [Problem(question="9 + 9?", answer="7"), Problem(question="9 + 9?")]

    def labelled(folder: Path) -> list[StepTuple]:
        collection = Collection(folder, {"a": 1})
        assert list(rollouts.label(model, tokenizer, tuples, problems, collection, how)) == [1, 2]
        return collection.read()

    written = Answering()
    monkeypatch.setattr(rollouts, "_write", written)
    first = labelled(tmp_path)
    assert len(written.texts) == 8 * (2 + 3)
    assert all(text.startswith("9 + 9?") for text in written.texts)
    assert [(item.problem, item.index) for item in first] == [(0, 0), (1, 0), (1, 1)]
    assert first[0].target_reward == 1.0
    assert first[0].advantage > 0 > first[1].advantage
    assert first[2].advantage == 0
    (tmp_path / "00001.jsonl").unlink()
    assert labelled(tmp_path) == first
    assert len(written.texts) == 8 * (2 + 3 + 3)


@pytest.mark.parametrize("count", [1, 3])
def test_roll_outs_go_on_from_the_text(count: int):
    """One is greedy decoding after prompt and solution; several are drawn, and differ."""
    model, tokenizer, how = tiny_model("llama"), ByteTokenizer(), Rollouts(count=count, max_new_tokens=6)
    texts = ["abc", "a longer one"]
    written = rollouts._write(model, tokenizer, texts, how, torch.Generator().manual_seed(0))
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
        new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, clean_up_tokenization_spaces=False))
    assert (written == expected) == (count == 1)
    assert rollouts.tokens_per_second(model, tokenizer, versions(("a", "b")), how) > 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{1,234.50} dollars, or 7", "1234.5"),
        ("48/2 = 24\n#### 72", "72"),
        ("That makes 18.", "18"),
        (r"\boxed{-3}", "-3"),
        (r"\boxed{5 \text{ feet}}, not 6", "5"),
        (r"\boxed{\$18.00}", "18"),
        ("none", None),
    ],
)
def test_final_answers(text: str, answer: str | None):
    assert final_answer(text) == answer


def test_problems_of_a_file(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "a", "answer": 4}\n\n{"prompt": "b"}\n{"turns": ["c", "d"]}\n')
    assert [(item.question, item.answer) for item in read_problems(path)] == [("a", "4"), ("b", None), ("c", None)]
    path.write_text('{"question": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2 has no `question`"):
        read_problems(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_problems(tmp_path / "none.jsonl")


def test_the_command(tiny: str, tmp_path: Path):
    draft, data, out = tmp_path / "draft", tmp_path / "problems.jsonl", tmp_path / "router"
    with_noise(AutoModelForCausalLM.from_pretrained(tiny), 0.03).save_pretrained(draft)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(draft)
    data.write_text("".join(json.dumps({"question": problem.question}) + "\n" for problem in PROBLEMS))
    arguments = ["train-router", "--target", tiny, "--draft", str(draft), "--data", str(data), "--out", str(out)]
    arguments += ["--max-new-tokens", "24", "--kind", "linear", "--weights", "stock", "--batch-size", "4"]
    done = CliRunner().invoke(app, [*arguments, "--max-step", "4"])
    assert done.exit_code == 0, done.output
    assert "balanced accuracy" in done.output
    assert LightRouter.load(out).report.num_steps > 0
    assert len(list((out / "collected").glob("*.jsonl"))) == 3
    rolled = [*arguments, "--max-step", "4", "--rollouts", "2", "--rollout-tokens", "8"]
    judged = CliRunner().invoke(app, rolled)
    said = " ".join(judged.output.split())
    assert "roll-outs: at most" in said
    assert "tokens/s, as just measured: at most" in said
    assert "nothing to learn" in said or "too few" in said, "random models find no answer"
    assert len(list((out / "rollouts").glob("*.jsonl"))) == 12
    both = CliRunner().invoke(app, [*rolled, "--prm", tiny])
    assert both.exit_code != 0
    assert "leave one out" in " ".join(both.output.split())
