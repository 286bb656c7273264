"""Auto: lossless whatever it chooses, and, in virtual time, never much slower than plain decoding."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller

import pytest
import torch

import specdec
from specdec.control import ForwardCosts, Plan
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.drafters import (
    Auto,
    Cascade,
    Drafter,
    DraftSession,
    EarlyExit,
    Outcome,
    PromptLookup,
    QuantizedSelf,
    Run,
    SmallModel,
)
from specdec.drafters.auto import drafter as auto
from specdec.drafters.auto import sources
from specdec.drafters.auto.knowledge import SelectionBias
from specdec.drafters.auto.lookup_source import LookupSource
from specdec.drafters.auto.sources import RoundContext
from specdec.errors import DraftError, UnsupportedOptionError
from specdec.testing import ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.model import TreeModel
from tests.support.references import PartlyWrongScript, forget_drafters, plain_alone, speculate, with_noise
from tests.support.sampled_rows import assert_ragged_rows_are_exact, tiny
from trees import Chain, Draft, TokenTree, TreeBatch

NUM_NEW = 40
RAGGED = random_prompts([5, 12, 9, 18])
SOURCES = {
    "small model": lambda model: SmallModel(with_noise(model)),
    "quantized self": lambda model: QuantizedSelf(),
    "early exit": lambda model: EarlyExit(1, num_tokens=2),
}


def set_costs(monkeypatch: pytest.MonkeyPatch, costs_of: Callable[[object], ForwardCosts]) -> None:
    for module in (auto, sources):
        monkeypatch.setattr(module, "costs_of", lambda model, num_rows=1: costs_of(model))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What other tests have shown of a drafter is no part of this one."""
    forget_drafters()
    yield
    forget_drafters()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost next to nothing, the target's forwards the same at any width: every source has its turn."""
    monkeypatch.setattr(auto, "_own_drafters", lambda run, auto: [])
    known: dict[object, ForwardCosts] = {}
    # the target's are asked for first
    set_costs(monkeypatch, lambda model: known.setdefault(model, ForwardCosts({1: 1e-6 if known else 1.0})))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_equals_plain_decoding(family: str, source: str) -> None:
    model = tiny_model(family, num_hidden_layers=3) if family == "llama" else tiny_model(family)
    expected = plain_alone(model, RAGGED, NUM_NEW)
    out = speculate(model, RAGGED, Auto(SOURCES[source](model)), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, RAGGED["attention_mask"])
    used = {choice["drafter"] for choice in out.stats.trace}
    assert len(used - {None, "PromptLookup"}) == 1, f"the source had no turn, only {used}"


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.usefixtures("eager")
def test_samples_follow_the_processed_distribution(verify: str) -> None:
    assert_ragged_rows_are_exact(tiny(seed=1), Auto(SmallModel(tiny(seed=2))), verify=verify)


@pytest.mark.parametrize(
    "others",
    [
        [],
        [SmallModel(tiny_model("llama", seed=1))],
    ],
    ids=["alone", "beside a draft"],
)
def test_a_target_brings_its_own_int8_copy(others: list[Drafter]) -> None:
    model = tiny_model("llama")
    prompt = random_prompts([9])
    out = speculate(model, prompt, Auto(*others), max_new_tokens=NUM_NEW)
    assert torch.equal(out.sequences, model.generate(**prompt, max_new_tokens=NUM_NEW, do_sample=False))
    long_enough = auto._quantized_self.has_copy(model)
    assert long_enough == bool(auto.native.library())


def test_short_runs_and_runs_that_have_their_own_make_no_copy() -> None:
    model = tiny_model("llama")
    speculate(model, random_prompts([9]), Auto(), max_new_tokens=8)
    for own in (QuantizedSelf(), Cascade(PromptLookup(), QuantizedSelf())):
        speculate(model, random_prompts([9]), Auto(own), max_new_tokens=NUM_NEW)
    assert not auto._quantized_self.has_copy(model)


def test_none_auto_and_a_model_choose_and_a_named_tree_does_not() -> None:
    model, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    prompt = random_prompts([9])
    for drafter in (None, "auto", draft):
        out = speculate(model, prompt, drafter)
        assert out.stats.trace, "every round says what was chosen"
        assert not speculate(model, prompt, drafter, tree=Chain(3)).stats.trace
    with pytest.raises(UnsupportedOptionError, match="chooses the shape"):
        speculate(model, prompt, Auto(SmallModel(draft)), tree=Chain(3))


def test_sources_that_do_not_draft_keep_up() -> None:
    """A draft that is the target itself is right whenever it drafts, whatever others did in between."""
    model = tiny_model("llama")
    prompt = random_prompts([9])
    expected = plain_alone(model, prompt, NUM_NEW)
    truth, turns = PartlyWrongScript(expected), iter(range(10_000))

    def every_other(sequences: object) -> list[TokenTree]:
        return truth(sequences) if next(turns) % 2 else [TokenTree(tokens=[], parents=[])]

    drafter = Auto(ScriptedDrafter(every_other), SmallModel(model))
    out = speculate(model, prompt, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, prompt["attention_mask"])


# In virtual time: a target and a draft of known costs, and a clock that only they move.

PLAIN_S, STEP_S = 1.0, 0.3
WIDTHS = {1: PLAIN_S, 8: 1.3, 16: 1.8, 32: 3.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.factor = 1.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.factor


class OracleDrafter(Drafter):
    """Knows the output and gets each token right with a probability; says it is sure of every one."""

    def __init__(self, clock: Clock, output: Sequence[int], accuracy: float):
        self.clock, self.output, self.accuracy = clock, output, accuracy

    def start(self, run: Run) -> DraftSession:
        return _OracleSession(self, run)


class _OracleSession(DraftSession):
    def __init__(self, drafter: OracleDrafter, run: Run):
        self._drafter, self._run, self._random, self._steps = drafter, run, random.Random(0), 0

    @property
    def num_forwards(self) -> int:
        return self._steps

    def propose(self, max_depths: Sequence[int]) -> Draft:
        drafter, done = self._drafter, len(self._run.sequences.tokens[0])
        truth = drafter.output[done : done + min(4, *max_depths)]
        tokens = [token if self._random.random() < drafter.accuracy else abs(token - 1) for token in truth]
        drafter.clock.spend(STEP_S * len(tokens))
        self._steps += len(tokens)
        return Draft(trees=TreeBatch.stack([TokenTree.chain(tokens, probs=[0.99] * len(tokens))]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    costs = ForwardCosts(WIDTHS)
    monkeypatch.setattr(auto, "perf_counter", clock)
    monkeypatch.setattr(auto, "_own_drafters", lambda run, auto: [])
    set_costs(monkeypatch, lambda model: costs)
    return clock


def seconds_of(
    clock: Clock, model: object, prompt: dict, drafter: Drafter, num_new: int, slow_from: int = 10**9
) -> tuple:
    """Virtual seconds of a call, and what was chosen in each round."""
    measured, rounds = ForwardCosts(WIDTHS), iter(range(10_000))

    def forward(module: object, args: tuple, kwargs: dict) -> None:
        width = kwargs["input_ids"].shape[1]
        if next(rounds) >= slow_from:
            clock.factor = 2.0
        clock.spend(measured.measured(width))

    started, handle = clock.now, model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        out = speculate(model, prompt, drafter, max_new_tokens=num_new)
    finally:
        handle.remove()
        clock.factor = 1.0
    return clock.now - started, out.stats.trace


@pytest.fixture(scope="module")
def case() -> tuple:
    model = tiny_model("llama")
    prompt = random_prompts([9])
    return model, prompt, model.generate(**prompt, max_new_tokens=200, do_sample=False)[0].tolist()


def test_an_overconfident_drafter_costs_at_most_five_percent(clock: Clock, case: tuple) -> None:
    model, prompt, output = case
    plain, _ = seconds_of(clock, model, prompt, specdec.drafters.Plain(), 200)
    spent, trace = seconds_of(clock, model, prompt, Auto(OracleDrafter(clock, output, 0.0)), 200)
    assert spent <= plain / 0.95
    assert Counter(choice["drafter"] for choice in trace)["OracleDrafter"] >= 1


def test_a_good_drafter_is_used_almost_always(clock: Clock, case: tuple) -> None:
    model, prompt, output = case
    plain, _ = seconds_of(clock, model, prompt, specdec.drafters.Plain(), 200)
    spent, trace = seconds_of(clock, model, prompt, Auto(OracleDrafter(clock, output, 0.95)), 200)
    assert spent < 0.65 * plain
    assert Counter(choice["drafter"] for choice in trace)["OracleDrafter"] > 0.8 * len(trace)


def test_further_steps_are_priced_without_the_first(clock: Clock, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head reads what was accepted in its first step."""

    class DearStart(OracleDrafter):
        def start(self, run: Run) -> DraftSession:
            return _DearStartSession(self, run)

    class _DearStartSession(_OracleSession):
        grows_trees = True

        def propose(self, max_depths: Sequence[int]) -> Draft:
            clock.spend(STEP_S)
            return super().propose([min(depth, 1 + 2 * (self._steps % 2)) for depth in max_depths])

    told: list[float] = []
    prices = RoundContext.prices

    def noted(context: RoundContext, step_seconds: float, leaf_prices: Sequence[float]) -> list[float]:
        told.append(step_seconds)
        return prices(context, step_seconds, leaf_prices)

    monkeypatch.setattr(RoundContext, "prices", noted)
    model, prompt, output = case
    seconds_of(clock, model, prompt, Auto(DearStart(clock, output, 0.95)), 200)
    assert told[-1] == pytest.approx(STEP_S, rel=0.01)
    assert max(told) > 1.2 * STEP_S


def test_of_two_drafters_the_better_one(clock: Clock, case: tuple) -> None:
    class Worse(OracleDrafter):
        pass

    model, prompt, output = case
    drafter = Auto(Worse(clock, output, 0.4), OracleDrafter(clock, output, 0.95))
    _, trace = seconds_of(clock, model, prompt, drafter, 200)
    used = Counter(choice["drafter"] for choice in trace)
    assert used["OracleDrafter"] > 5 * used["Worse"]


def test_it_knows_of_a_slower_machine_within_fifty_rounds(clock: Clock, case: tuple) -> None:
    model, prompt, _ = case
    _, trace = seconds_of(clock, model, prompt, Auto(ScriptedDrafter([])), 200, slow_from=60)
    assert trace[40]["plain_ms"] == pytest.approx(1000 * PLAIN_S, rel=0.1)
    assert trace[60 + 50]["plain_ms"] == pytest.approx(2000 * PLAIN_S, rel=0.1)


def test_runs_start_from_what_earlier_ones_have_shown(clock: Clock, case: tuple) -> None:
    model, prompt, output = case
    useless = OracleDrafter(clock, output, 0.0)
    traces = [seconds_of(clock, model, prompt, Auto(useless), 200)[1] for _ in range(8)]
    tries = [sum(choice["drafter"] == "OracleDrafter" for choice in trace) for trace in traces]
    assert tries[0] > tries[-1] == 0


@pytest.mark.slow
def test_a_drafter_that_disappointed_is_tried_again(clock: Clock, case: tuple) -> None:
    """And seldom: until then the runs are hardly slower than plain ones."""
    model, prompt, output = case
    plain, _ = seconds_of(clock, model, prompt, specdec.drafters.Plain(), 200)
    runs = [seconds_of(clock, model, prompt, Auto(OracleDrafter(clock, output, 0.0)), 200) for _ in range(12)]
    assert sum(spent for spent, _ in runs) <= 12 * plain / 0.98
    good = Auto(OracleDrafter(clock, output, 0.95))
    traces = [seconds_of(clock, model, prompt, good, 200)[1] for _ in range(24)]
    used = [sum(choice["drafter"] == "OracleDrafter" for choice in trace) for trace in traces]
    assert used[0] == 0
    assert used[-1] > 0.8 * len(traces[-1])


def test_chosen_proposals_are_trusted_as_far_as_they_keep_what_they_promise() -> None:
    trust = SelectionBias()
    assert trust.share == 1.0
    for _ in range(50):
        trust.update(promised=4.0, kept=2.0)
    assert trust.share == pytest.approx(0.5, abs=0.05)
    for _ in range(300):
        trust.passed_over()
    assert trust.share > 0.9, "or nothing would ever be chosen again"
    for _ in range(50):
        trust.update(promised=2.0, kept=4.0)
    assert trust.share == 1.0


def lookup_of(
    prompts: list[list[int]], widths: dict[int, float]
) -> tuple[LookupSource, RoundContext, list[list[bool]]]:
    """A source for packed rows, a round of them, and at which of them it looks in each round to come."""
    input_ids, num_rows = torch.tensor(prompts), len(prompts)
    run = Run(
        target=TreeModel(tiny_model("llama")),
        vocab_size=10_000,
        sequences=Sequences(input_ids, None, capacity=input_ids.shape[1]),
        sampler=Sampler([], do_sample=False),
        tree=None,
        input_ids=input_ids,
        attention_mask=None,
    )
    source, costs = LookupSource(run, PromptLookup(num_tokens=4, tokens_per_match=None)), ForwardCosts(widths)
    plain: Plan[object] = Plan(source=None, length=0, tokens=num_rows, seconds=costs.seconds(num_rows))
    context = RoundContext(
        max_depths=[8] * num_rows, costs=costs, plain=plain, throughput=num_rows / plain.seconds, is_packed=True
    )
    looks, proposals = list[list[bool]](), source._lookup.proposals
    source._lookup.proposals = lambda depths: (looks.append([*map(bool, depths)]), proposals(depths))[1]
    return source, context, looks


@pytest.mark.parametrize("num_rows", [2, 6])
def test_rows_of_a_batch_with_nothing_to_copy_are_looked_at_less_often(num_rows: int) -> None:
    """The last row repeats itself; the others say what nobody has said before, and from round 20 on the same as it."""
    fresh = itertools.count(100)
    prompts = [[next(fresh) for _ in range(6)] for _ in range(num_rows - 1)] + [[1, 2, 3, 1, 2, 3]]
    source, context, looks = lookup_of(prompts, WIDTHS)
    for number in range(40):
        plan = source.plan(context)
        repeated = [number % 3 + 1]
        tokens = [[next(fresh)] if number < 20 else repeated for _ in range(num_rows - 1)] + [repeated]
        outcome = Outcome(paths=[[]] * num_rows, tokens=tokens)
        source.tell(methodcaller("observe", outcome))
        source.learn(outcome, plan)
    by_row = list(zip(*looks, strict=True))
    assert all(by_row[-1][3:]), "it is always worth it"
    for row in by_row[:-1]:
        assert all(row) if num_rows == 2 else sum(row[:20]) < 8
        assert all(row[30:]), "it has begun to be worth it"


def test_rows_whose_proposals_are_not_worth_their_price_rest_too() -> None:
    """All copy, but a token more takes as long as a row, so that one row's would have to be worth a round of it."""
    source, context, looks = lookup_of([[1, 2, 3, 1, 2, 3]] * 6, {width: float(width) for width in WIDTHS})
    for number in range(20):
        assert source.plan(context) is None
        source.tell(methodcaller("observe", Outcome(paths=[[]] * 6, tokens=[[number % 3 + 1]] * 6)))
    assert all(2 <= sum(row) < 8 for row in zip(*looks, strict=True))


def test_what_was_started_is_closed_where_another_drafter_does_not_fit() -> None:
    closed: list[bool] = []

    class Closing(DraftSession):
        def propose(self, max_depths: Sequence[int]) -> Draft:
            return Draft(trees=TreeBatch.empty(len(max_depths)))

        def close(self) -> None:
            closed.append(True)

    class Opens(Drafter):
        def start(self, run: Run) -> DraftSession:
            return Closing()

    model = tiny_model("llama")
    with pytest.raises(DraftError, match="vocabulary"):
        speculate(model, random_prompts([9]), Auto(Opens(), SmallModel(tiny_model("llama", vocab_size=64))))
    assert closed == [True]


def test_outcomes_of_others_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watching(DraftSession):
        def propose(self, max_depths: Sequence[int]) -> Draft:
            return Draft(trees=TreeBatch.empty(len(max_depths)))

        def observe(self, outcome: Outcome) -> None:
            seen.append(outcome.is_own)

    class Watcher(Drafter):
        def start(self, run: Run) -> DraftSession:
            return Watching()

    set_costs(monkeypatch, lambda model: ForwardCosts({1: 1.0}))
    model = tiny_model("llama")
    repeating = {"input_ids": torch.tensor([[5, 6, 7, 8] * 6]), "attention_mask": torch.ones((1, 24), dtype=torch.long)}
    trace = speculate(model, repeating, Auto(Watcher()), max_new_tokens=NUM_NEW).stats.trace
    assert len(seen) == len(trace) + 1
    assert seen[1:] == [choice["drafter"] is None for choice in trace]
