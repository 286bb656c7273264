"""Who writes the steps of the draft, how they are looked at while they are written, and what speeds the target up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import routers
import specdec
from routers import Decision, DraftedStep, Router, TargetView
from specdec.drafters import Auto, Drafter, PromptLookup, QuantizedSelf, SmallModel
from specdec.kernels import prepare
from specdec.routing import writer
from specdec.routing.writer import StepWriter
from specdec.testing import ByteTokenizer, assert_same_tokens, tiny_model
from tests.support.references import plain_alone, with_noise
from tests.support.routed_steps import NUM_NEW, PROMPTS, STEPS, Scripted, alternating, check_writers

TOKENIZER = ByteTokenizer()


def routed(model: PreTrainedModel, drafter: Drafter | PreTrainedModel, router: routers.Router, **options):
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "tokenizer": TOKENIZER, **options}
    return specdec.generate(model, **PROMPTS, drafter=drafter, router=router, return_dict_in_generate=True, **settings)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def draft(model: PreTrainedModel) -> PreTrainedModel:
    return with_noise(model, 0.03)


class Asking(Scripted):
    """Asks the target before it decides."""

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        target.regrets(steps)
        return super().decide(steps, target)


class Looking(Scripted):
    """Looks every few tokens, and gives a step up at the first look past so many."""

    def __init__(self, most: int, every: int):
        super().__init__(lambda row, index: False, peek=every)
        self.most, self.peek_every = most, every
        self.looks: list[tuple[int, int, int]] = []

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        self.looks += [(step.row, step.index, len(step.tokens)) for step in steps]
        return [Decision(escalate=True) if len(step.tokens) > self.most else None for step in steps]


ROUTERS: dict[str, Callable[[], Router]] = {
    "drafted": lambda: Scripted(alternating),
    "not drafted": lambda: Scripted(alternating, peek=0),
    "asked": lambda: Asking(alternating),
    "looked at": lambda: Looking(most=5, every=3),
}


@pytest.mark.parametrize("name", ["model", "auto", "copy", "auto of a copy"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_every_step_is_its_writers(model, draft, name: str, router):
    copy = QuantizedSelf(weights="int4", num_tokens=3)
    drafter = {"model": draft, "auto": Auto(SmallModel(draft)), "copy": copy, "auto of a copy": Auto(copy)}[name]
    writer = copy.copy_of(model) if "copy" in name else draft
    out = routed(model, drafter, router())
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}
    check_writers(model, writer, out)


@pytest.mark.parametrize("option", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("chooses", [False, True])
def test_full_escalation_is_lossless(model, chooses: bool, option: dict):
    """Also where the target's own writing is drafted for by whatever is quickest."""
    copy = QuantizedSelf(weights="int4")
    expected = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
    for router in (routers.AlwaysTarget(steps=STEPS), Scripted(lambda row, index: True)):
        out = routed(model, Auto(copy) if chooses else copy, router, **option)
        assert torch.equal(out.sequences, expected)
        assert not out.stats.is_lossy


def test_no_escalation_is_the_copy_alone(model):
    drafter = QuantizedSelf(weights="int4")
    out = routed(model, drafter, routers.AlwaysDraft(steps=STEPS))
    copy = drafter.copy_of(model)
    assert_same_tokens(copy, plain_alone(copy, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.is_lossy


def test_a_step_is_looked_at_again_and_again(model, draft):
    router = Looking(most=5, every=3)
    out = routed(model, SmallModel(draft), router)
    check_writers(model, draft, out)
    seen: dict[tuple[int, int], list[int]] = {}
    for row, index, count in router.looks:
        seen.setdefault((row, index), []).append(count)
    assert any(counts == [3, 6] for counts in seen.values())
    assert all(after - before <= 3 for counts in seen.values() for before, after in pairwise([0, *counts]))
    assert max(map(max, seen.values())) == 6, "a step that was given up is not drafted any further"
    assert all(step.num_discarded <= 6 for step in out.stats.steps)


def test_looks_save_drafting_and_change_no_text(model, draft):
    """What the least likely token says of a finished step, it says as soon as it has been written."""
    outs = [
        routed(model, SmallModel(draft), routers.SelfConfidence(threshold=0.93, look_every=every, steps=STEPS))
        for every in (None, 1)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    in_vain = [sum(step.num_discarded for step in out.stats.steps) for out in outs]
    assert 0 < in_vain[1] < in_vain[0]
    assert 0 < outs[0].stats.escalation_rate < 1
    check_writers(model, draft, outs[1])


def test_first_token_entropy_escalates_before_a_step_is_written(model, draft):
    out = routed(model, SmallModel(draft), routers.FirstTokenEntropy(escalation_rate=0.5, steps=STEPS))
    check_writers(model, draft, out)
    assert all(step.num_discarded <= 1 for step in out.stats.steps)
    assert 0.2 < out.stats.escalation_rate < 0.8


@pytest.mark.parametrize(
    "drafter", [Auto(), Auto(PromptLookup()), Auto(QuantizedSelf(), QuantizedSelf(weights="int4"))], ids=repr
)
def test_an_auto_without_one_writer_is_refused(model, drafter):
    with pytest.raises(ValueError, match="needs a draft model that writes steps"):
        routed(model, drafter, routers.AlwaysDraft())


def test_a_copy_of_a_target_that_is_elsewhere_is_refused():
    with pytest.raises(ValueError, match="is not here but at"):
        specdec.generate(
            specdec.Endpoint("http://localhost:1/v1"),
            torch.ones(1, 3, dtype=torch.long),
            drafter=QuantizedSelf(),
            router=routers.AlwaysDraft(),
            tokenizer=TOKENIZER,
        )


class Weighing(Scripted):
    """Asks for the regrets, and looks some steps ahead. Rejects by what the step says, as a real router does."""

    def __init__(self, lookahead: int, *, asks: bool = True, peek: int | None = None):
        super().__init__(lambda row, index: False, peek=peek)
        self.lookahead, self.asks = lookahead, asks
        self.num_calls = 0

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        self.num_calls += 1
        if self.asks:
            regrets = target.regrets(steps)
            assert [len(regret) for regret in regrets] == [len(step.tokens) for step in steps]
        return [Decision(escalate=sum(step.tokens) % 3 == 0) for step in steps]

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        return [Decision(escalate=True) if sum(step.tokens) % 5 == 0 else None for step in steps]


@pytest.mark.parametrize("peek", [None, 2])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("lookahead", [2, 20])
def test_steps_drafted_ahead_change_no_text(model, draft, lookahead: int, asks: bool, peek: int | None):
    drafter = SmallModel(draft, num_tokens=3) if lookahead == 2 else draft
    out = routed(model, drafter, Weighing(lookahead, asks=asks, peek=peek))
    expected = routed(model, SmallModel(draft, num_tokens=3), Weighing(1, asks=asks, peek=peek))
    assert torch.equal(out.sequences, expected.sequences)
    for row in range(len(PROMPTS["input_ids"])):
        ours, theirs = (
            [(step.writer, step.num_tokens) for step in one.stats.steps if step.row == row] for one in (out, expected)
        )
        assert ours == theirs
    check_writers(model, draft, out)
    assert 0.2 < out.stats.escalation_rate < 0.9


def test_steps_ahead_are_read_in_one_forward(model, draft):
    """The target reads several drafted steps at once, and a step that is cut is not read again."""

    class Keeping(Weighing):
        def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
            super().decide(steps, target)
            return [Decision(escalate=step.index % 4 == 3) for step in steps]

    forwards = []
    for lookahead in (1, 4):
        out = routed(model, SmallModel(draft, num_tokens=3), Keeping(lookahead), max_new_tokens=90)
        check_writers(model, draft, out)
        forwards.append(out.stats.target_forwards)
    assert forwards[1] < 0.8 * forwards[0]


def test_what_was_drafted_after_a_cut_counts_as_in_vain(model, draft):
    router = Weighing(4)
    out = routed(model, SmallModel(draft), router)
    alone = routed(model, SmallModel(draft), Weighing(1))
    in_vain = [sum(step.num_discarded for step in one.stats.steps) for one in (out, alone)]
    assert in_vain[0] > in_vain[1]


def test_processors_see_steps_that_are_drafted_ahead(model, draft):
    option = {"repetition_penalty": 1.3}
    outs = [routed(model, SmallModel(draft), Weighing(lookahead), **option) for lookahead in (1, 3)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    check_writers(model, draft, outs[1], **option)


def test_a_router_that_has_the_target_write_does_not_look_ahead(model, draft):
    router = routers.Oracle(routers.TargetRegret())
    router.lookahead = 2
    with pytest.raises(ValueError, match="lookahead is 1 then"):
        routed(model, draft, router)


def sharing(router: routers.Router) -> routers.Router:
    router.shares_cache = True
    return router


@pytest.mark.parametrize("option", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize(
    "router",
    [lambda: routers.AlwaysTarget(steps=STEPS), lambda: Scripted(lambda row, index: True), lambda: Looking(-1, 3)],
    ids=["not drafted", "drafted", "looked at"],
)
def test_full_escalation_in_one_cache_is_lossless(model, router, option: dict):
    expected = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
    for chooses in (False, True):
        copy = QuantizedSelf(weights="int4", num_tokens=3)
        out = routed(model, Auto(copy) if chooses else copy, sharing(router()), **option)
        assert torch.equal(out.sequences, expected)
        assert not out.stats.is_lossy


def check_one_cache(
    model: PreTrainedModel, copy: PreTrainedModel, out, *, target_reads_all: bool = False, lookahead: int = 1
) -> None:
    """Replay: every step is its writer's greedy continuation of what the writers of the steps before have read.

    Args:
        target_reads_all: the kept steps too, as soon as `lookahead` of them have been drafted.
    """
    width = PROMPTS["input_ids"].shape[1]
    for row, ids in enumerate(out.sequences):
        padding, place, num_ahead = int((PROMPTS["attention_mask"][row] == 0).sum()), width, 0
        judged = DynamicCache()
        with torch.no_grad():
            model(ids[None, padding : width - 1], past_key_values=judged)
        drafted = deepcopy(judged)
        for step in (step for step in out.stats.steps if step.row == row):
            end = place + step.num_tokens
            read = ids[None, place - 1 : end - 1]
            with torch.no_grad():
                if step.writer == "target":
                    logits_TV = model(read, past_key_values=judged).logits[0]
                else:
                    logits_TV = copy(read, past_key_values=drafted).logits[0]
                    (model if target_reads_all else copy)(read, past_key_values=judged)
            num_ahead = 0 if step.writer == "target" else (num_ahead + 1) % lookahead
            if num_ahead == 0:
                drafted = deepcopy(judged)
            written_T = ids[place:end]
            chosen_T = logits_TV.gather(1, written_T[:, None])[:, 0]
            assert (logits_TV.amax(-1) - chosen_T).max() < 1e-3, (row, step)
            place = end


AHEAD: dict[str, Callable[[], Router]] = {
    "ahead": lambda: Weighing(3, asks=False),
    "ahead, asked": lambda: Weighing(3),
}


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("router", [*ROUTERS.values(), *AHEAD.values()], ids=[*ROUTERS, *AHEAD])
def test_in_one_cache_steps_follow_from_what_was_read(model, draft, router, num_tokens: int):
    """Ragged rows, and rows that are in different phases; the copy is noisy enough to be told from the target."""
    out = routed(model, SmallModel(draft, num_tokens=num_tokens), sharing(router()))
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}
    asked = isinstance(router(), Asking) or getattr(router(), "asks", False)
    writers = model, draft
    check_one_cache(*writers, out, target_reads_all=asked, lookahead=router().lookahead)
    with pytest.raises(AssertionError):
        check_one_cache(*writers, out, target_reads_all=not asked, lookahead=router().lookahead)


def test_in_one_cache_nothing_is_read_twice(model, draft, monkeypatch):
    longest: dict[bool, int] = {}
    verify = StepWriter.verify

    def spy(self, draft):
        logits = verify(self, draft)
        longest[is_shared] = max(longest.get(is_shared, 0), *self._leads)
        return logits

    monkeypatch.setattr(StepWriter, "verify", spy)
    for is_shared in (False, True):
        router = Scripted(alternating, peek=0)
        router.shares_cache = is_shared
        routed(model, SmallModel(draft, num_tokens=3), router)
    assert longest[True] == 0 < longest[False]


def test_sampling_in_one_cache_is_the_targets_where_it_writes_everything(model):
    def sampled(**options):
        torch.manual_seed(1)
        return routed(model, QuantizedSelf(), do_sample=True, **options).sequences

    ours = sampled(router=sharing(routers.AlwaysTarget(steps=STEPS)))
    assert torch.equal(ours, sampled(router=routers.AlwaysTarget(steps=STEPS)))


def test_what_cannot_share_a_cache_is_refused(model, draft):
    with pytest.raises(specdec.UnsupportedOptionError, match="another num_hidden_layers"):
        routed(model, tiny_model("llama", num_hidden_layers=1), sharing(routers.AlwaysDraft()))
    with pytest.raises(specdec.UnsupportedOptionError, match="these are bfloat16"):
        routed(tiny_model("llama").bfloat16(), QuantizedSelf(), sharing(routers.AlwaysDraft()))
    with pytest.raises(ValueError, match="an endpoint shares no cache"):
        routed(model, specdec.Endpoint("http://localhost:1/v1"), sharing(routers.AlwaysDraft()))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("option", [{}, {"repetition_penalty": 1.3}])
def test_a_rejected_step_is_read_in_parts_as_long_as_it_agrees(model, draft, monkeypatch, shares: bool, option: dict):
    """The text does not depend on the length of the parts, and after the first difference nothing is read."""
    expected = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
    scored: list[dict[int, int]] = []
    score_drafts = StepWriter.score_drafts

    def spy(self, chains):
        scored.append({row: len(tokens) for row, tokens in chains.items()})
        return score_drafts(self, chains)

    monkeypatch.setattr(StepWriter, "score_drafts", spy)
    counts = []
    for most in (1, 3, 100):
        monkeypatch.setattr(writer, "READ_AT_ONCE", most)
        scored.clear()
        router = Scripted(lambda row, index: True)
        router.shares_cache = shares
        out = routed(model, SmallModel(draft, num_tokens=3), router, **option)
        assert torch.equal(out.sequences, expected)
        assert max(length for chains in scored for length in chains.values()) <= min(most, STEPS.max_tokens)
        counts.append(sum(length for chains in scored for length in chains.values()))
    assert counts[0] < counts[1] < counts[2]


def test_one_cache_of_prepared_models(model):
    """The layers of both are fused, and write keys and values by address."""
    prepared = prepare(tiny_model("llama"))
    copy = QuantizedSelf(weights="int4", num_tokens=3)
    expected = plain_alone(prepared, PROMPTS, NUM_NEW)
    out = routed(prepared, copy, sharing(Scripted(lambda row, index: True)))
    assert_same_tokens(prepared, expected, out.sequences, PROMPTS["attention_mask"])
    out = routed(prepared, copy, sharing(Scripted(alternating)))
    check_one_cache(model, copy.copy_of(prepared), out)
