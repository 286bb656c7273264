"""A cheap drafter, the target's copy and the target: lossless, and both caches follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from specdec import DraftError, UnsupportedOptionError, acceptance
from specdec.acceptance import coins as coins_module
from specdec.decoding.drafter import DraftSession, Run
from specdec.drafters import (
    Auto,
    Cascade,
    Drafter,
    EarlyExit,
    Mixed,
    PromptLookup,
    QuantizedSelf,
    SmallModel,
    SparseSelf,
)
from specdec.drafters.composite.nested import NestedSession
from specdec.engine import Engine
from specdec.testing import assert_same_tokens, tiny_model
from tests.support.acceptance_oracles import outcomes_of
from tests.support.early_exits import NUM_NEW, early_model, reference
from tests.support.early_exits import PROMPTS as RAGGED
from tests.support.engine_requests import REQUESTS, TOKENIZER, expected, model_of
from tests.support.enumeration import EXACT, MAX_DEPTH, Prefix, ToyModel, every_draft
from tests.support.exact_rounds import CAUGHT, Enumeration, distributions, total_variation
from tests.support.faults import Bomb, Watched
from tests.support.references import rows_of, speculate, with_noise
from tests.support.sampled_rows import assert_ragged_rows_are_exact, tiny
from trees import Chain, ConfidentChain, Draft, DySpec, Fixed, GainLimitedChain, GrowthPolicy, TokenTree, TreeBatch


def lookup() -> Drafter:
    return PromptLookup(num_tokens=4, min_match=1)


class StandIn(QuantizedSelf):
    """Another model takes the copy's place, and reads keys and values that it would not have made."""

    def __init__(self, copy: PreTrainedModel):
        super().__init__()
        self.copy = copy

    def copy_of(self, target: PreTrainedModel) -> PreTrainedModel:
        return self.copy


CASCADES: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "lookup": lambda model: Cascade(lookup(), num_tokens=5, min_tokens=5),
    "small model": lambda model: Cascade(SmallModel(tiny_model("gpt2", seed=5)), StandIn(with_noise(model))),
    "mixed above": lambda model: Mixed([lookup(), Cascade(lookup(), StandIn(with_noise(model)))], budget=8),
    "copy with lookup": lambda model: Cascade(lookup(), StandIn(with_noise(model)), num_tokens=6, min_tokens=4),
    "copy with a small model": lambda model: Cascade(
        SmallModel(with_noise(model, 0.03)), StandIn(with_noise(model)), num_tokens=8, min_tokens=6
    ),
    "part of the past": lambda model: Cascade(lookup(), SparseSelf(budget=8), num_tokens=5, min_tokens=5),
    "copy with auto": lambda model: Cascade(Auto(SmallModel(with_noise(model))), QuantizedSelf(), min_tokens=3),
}


@pytest.mark.parametrize("cascade", CASCADES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_equals_plain_decoding(family: str, cascade: str) -> None:
    model, expected = early_model(family), reference(family)
    drafter = CASCADES[cascade](model)
    one = rows_of(RAGGED, [1])
    alone = speculate(model, one, drafter, max_new_tokens=NUM_NEW)
    together = speculate(model, RAGGED, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected[1:2, -NUM_NEW - 12 :], alone.sequences, one["attention_mask"])
    assert_same_tokens(model, expected, together.sequences, RAGGED["attention_mask"])
    assert together.stats.num_accepted > 0


def test_rows_that_stop_leave_both() -> None:
    model, expected = early_model("llama"), reference("llama")
    stops = [int(expected[row, -NUM_NEW + 3 + 5 * row]) for row in range(3)]
    options = {"eos_token_id": stops, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    plain = model.generate(**RAGGED, **options, do_sample=False)
    drafter = Cascade(SmallModel(with_noise(model, 0.03)), StandIn(with_noise(model)))
    out = speculate(model, RAGGED, drafter, **options)
    assert_same_tokens(model, plain, out.sequences, RAGGED["attention_mask"], **options)


def test_a_cheap_drafter_that_takes_back_is_asked_again() -> None:
    """The copy is the target itself: all of a chain stands, and chains are as long as they may be."""
    model, expected = early_model("llama"), reference("llama")
    drafter = Cascade(SmallModel(with_noise(model), num_tokens=2), StandIn(model), num_tokens=7, min_tokens=7)
    out = speculate(model, RAGGED, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, RAGGED["attention_mask"])
    assert out.stats.acceptance_rate == 1
    assert max(out.stats.accepted_histogram) == 7
    assert out.stats.num_batch_rounds == -(-(NUM_NEW - 1) // 8)


@pytest.mark.parametrize(
    "cascade", ["copy with lookup", "copy with a small model", "copy with auto", "part of the past"]
)
def test_copies_follow_processors_that_look_at_prefixes(cascade: str) -> None:
    model = early_model("llama")
    options = {"max_new_tokens": NUM_NEW, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "pad_token_id": 0}
    plain = model.generate(**RAGGED, **options, do_sample=False)
    out = speculate(model, RAGGED, CASCADES[cascade](model), **options)
    assert_same_tokens(model, plain, out.sequences, RAGGED["attention_mask"], **options)
    assert out.stats.num_accepted > 0


def test_a_copy_stops_where_the_next_token_is_not_worth_its_price() -> None:
    policy = GainLimitedChain(prices=[0.5, 0.5, 0.5], chance=lambda prob: prob, next_chance=0.9)
    assert policy.goes_on([[0.8]])
    assert not policy.goes_on([[0.8, 0.6]])
    assert policy.goes_on([[0.8, 0.6], [0.5]]), "two rows pay for it together"
    assert not policy.goes_on([[1.0] * 4]), "there is no price for a fifth token"


def test_a_call_may_set_the_length() -> None:
    model = early_model("llama")
    prompt = rows_of(RAGGED, [1])
    drafter = Cascade(lookup(), StandIn(with_noise(model, std=0.0)))
    out = speculate(model, prompt, drafter, tree=Chain(3), max_new_tokens=NUM_NEW)
    assert max(out.stats.accepted_histogram) == 3
    assert out.stats.acceptance_rate == 1
    with pytest.raises(UnsupportedOptionError, match="drafts chains"):
        speculate(model, prompt, drafter, tree=Fixed((2,)))


# sampling, by enumeration: every draw of the cheap drafter, every coin and every draw of the middle model


@dataclass
class Stage:
    """What leaves the middle model: a text, the chance of it, and how many of its tokens were the cheap drafter's."""

    text: Prefix
    prob: float
    num_agreed: int


def middle_stage(
    policy: GrowthPolicy, cheap: ToyModel, middle: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    for prob, draft in every_draft(policy, [cheap], monkeypatch):
        tree = draft.trees.row(0)
        coins = Enumeration.of([tree])
        num_rows = len(coins.tree_of_row)
        batch = TreeBatch.stack(coins.tree_of_row)
        q_BTV = distributions(draft).expand(num_rows, -1, -1)
        texts = [(), *(tuple(tree.tokens[ancestor] for ancestor in tree.path(node)) for node in range(len(tree)))]
        p_TV = torch.stack([middle.probs(text) for text in texts])
        with pytest.MonkeyPatch.context() as coin_patch:
            coin_patch.setattr(coins_module, "bernoulli", coins.throw)
            coin_patch.setattr(coins_module, "sample", coins.draw_one)
            accepted = acceptance.topdown(Draft(trees=batch, q_BTV=q_BTV), p_TV.log().expand(num_rows, -1, -1))
        for (path, _), weight, last_V in zip(outcomes_of(accepted), coins.weight_B, coins.last_BV, strict=True):
            for token, mass in enumerate((prob * weight * last_V).tolist()):
                if mass:
                    yield Stage((*(tree.tokens[node] for node in path), token), mass, len(path))


def going_on(stage: Stage, middle: ToyModel, min_tokens: int) -> Iterator[Stage]:
    if len(stage.text) >= min_tokens:
        yield stage
        return
    for token, mass in enumerate(middle.probs(stage.text).tolist()):
        yield from going_on(Stage((*stage.text, token), stage.prob * mass, stage.num_agreed), middle, min_tokens)


def as_chain(text: Prefix, q: ToyModel) -> Draft:
    unread_V = torch.zeros(q.vocab_size, dtype=torch.float64)
    q_TV = torch.stack([*(q.probs(text[:length]) for length in range(len(text))), unread_V])
    return Draft(trees=TreeBatch.stack([TokenTree.chain(text)]), q_BTV=q_TV[None])


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize(
    ("policy", "min_tokens"),
    [(Chain(2), 1), (Chain(1), 3), (ConfidentChain(2, 0.4), 2), (DySpec(3, max_depth=2), 1)],
    ids=["chain", "middle goes on", "confident", "tree"],
)
def test_committed_tokens_are_distributed_as_the_targets(
    policy: GrowthPolicy, min_tokens: int, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, middle, cheap = (ToyModel(seed) for seed in (61, 62, 63))
    stages = [
        longer
        for stage in middle_stage(policy, cheap, middle, monkeypatch)
        for longer in going_on(stage, middle, min_tokens)
    ]
    drafts = [(stage.prob, as_chain(stage.text[:MAX_DEPTH], middle)) for stage in stages]
    assert total_variation(drafts, target, verify, monkeypatch)[0] < EXACT


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
def test_wrong_cascades_are_caught(verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To pass on only what the middle model agreed with is biased, and so is the cheap drafter's q."""
    target, middle, cheap = (ToyModel(seed) for seed in (61, 62, 63))
    stages = list(middle_stage(Chain(2), cheap, middle, monkeypatch))
    agreed = [(stage.prob, as_chain(stage.text[: stage.num_agreed], middle)) for stage in stages]
    cheaply = [(stage.prob, as_chain(stage.text, cheap)) for stage in stages]
    for wrong in (agreed, cheaply):
        assert total_variation(wrong, target, verify, monkeypatch)[0] > CAUGHT


class Stopping(Cascade):
    """A copy that stops by what it has written so far."""

    def start(self, run: Run) -> DraftSession:
        session = super().start(run)
        assert isinstance(session, NestedSession)
        session.policy = GainLimitedChain(prices=[0.35] * 3, chance=lambda prob: prob, next_chance=0.9)
        return session


@pytest.mark.rotated
@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("cascade", [Cascade, Stopping])
def test_samples_after_a_copy(cascade: type[Cascade], verify: str) -> None:
    cheap = SmallModel(tiny(seed=2), num_tokens=1)
    drafter = cascade(cheap, StandIn(tiny(seed=3)), num_tokens=3, min_tokens=1 if cascade is Stopping else 2)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter, verify=verify)


def test_samples_after_a_copy_for_which_auto_drafts() -> None:
    drafter = Cascade(Auto(SmallModel(tiny(seed=2), num_tokens=1)), StandIn(tiny(seed=3)), num_tokens=3, min_tokens=2)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter)


def test_samples_after_a_part_of_the_past() -> None:
    drafter = Cascade(SmallModel(tiny(seed=2), num_tokens=1), SparseSelf(budget=3), num_tokens=3, min_tokens=2)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter)


def test_a_part_of_the_past_while_requests_join_and_leave() -> None:
    drafter = Cascade(lookup(), SparseSelf(budget=8), num_tokens=4, min_tokens=3)
    engine = Engine(model_of(), drafter=drafter, tokenizer=TOKENIZER, max_rows=3)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    assert [generation.tokens for generation in generations] == [expected(n) for n in range(len(REQUESTS))]
    assert sum(generation.stats.drafted for generation in generations) > 0


# what is refused, and what is left behind


def test_wrong_settings() -> None:
    model = early_model("llama")
    for wrong, message in (
        (lambda: Cascade(model, model), "cheap is a drafter"),
        (lambda: Cascade(EarlyExit(1)), "take back what it has read"),
        (lambda: Cascade(lookup(), SmallModel(model)), "middle is a QuantizedSelf"),
        (lambda: Cascade(lookup(), num_tokens=0), "positive integer"),
        (lambda: Cascade(lookup(), num_tokens=3), "min_tokens is the smaller one"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(DraftError, match="bfloat16 and not float32"):
        speculate(tiny_model("llama", dtype=torch.bfloat16), rows_of(RAGGED, [1]), Cascade(lookup()))


@pytest.mark.parametrize("call", ["propose", "observe"])
def test_the_cheap_session_is_closed(call: str) -> None:
    cheap = Watched(lookup(), {call: Bomb(RuntimeError("broken"), 1)})
    with pytest.raises(RuntimeError, match="broken"):
        speculate(early_model("llama"), rows_of(RAGGED, [1]), Cascade(cheap))
    assert cheap.num_opened == cheap.num_closed == 1
