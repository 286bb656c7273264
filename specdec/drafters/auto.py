"""Decides every round who drafts, how far, or that nobody does: whatever makes the most tokens per second.

`specdec/control` holds the decisions; here they meet the drafters. A *source* is a drafter at work with what is known
of it: how its confidence relates to acceptance, what its rounds yield, what its forwards cost. What is known outlives
the run and is the starting point of the target's next one.

Shape legend: B rows, W width (drafted tokens of the longest row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile, zip_longest
from math import inf
from statistics import mean
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from transformers import PreTrainedModel

from specdec.control import (
    AcceptanceMemory,
    AcceptanceModel,
    ForwardCosts,
    Plan,
    RoundControl,
    Yield,
    YieldAverage,
    YieldMemory,
    costs_of,
)
from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.growing import GrowingSession
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.quantized_self import QuantizedSelf
from specdec.errors import UnsupportedOptionError
from specdec.kernels import native, prepared
from trees import Draft, TokenTree, TreeBatch, WorthwhileChain

_LOOKUP = 0
"""The place of prompt lookup among the sources of a run."""
_LONGEST_LOOKUP = 24
_HOPELESS = 0.01
"""Expected tokens below which the rest of a proposal is not looked at."""
_LONGEST_DRAFT = 12
_HORIZON = 32
"""Tokens that a run is taken to go on for, at most, when it is weighed whether to begin with a drafter."""
_TRIAL_ROUNDS = 3
"""Rounds that it takes to know that a drafter does not pay in this run."""
_MIN_COPY_TOKENS = 32
"""Shorter runs are not worth making an int8 copy of the target for."""
_UNKNOWN_STEP = 0.2
"""Of a plain round, for a step of a drafter that has never been timed."""

_quantized_self = QuantizedSelf()


class Auto(Drafter):
    """Chooses among drafters, every round, what makes the most tokens per second; plain decoding is always a choice.

    Costs are measured at the first call for a model and corrected by every round. Lossless, as all its drafters are.

    Args:
        drafters: to choose from, besides prompt lookup. Without any: those that the target brings along, which on a CPU
            is the int8 copy of a float32 model (`QuantizedSelf`; made in the first run that may reach 32 tokens, if
            memory allows).

    Raises:
        UnsupportedOptionError: at the call, for a `tree`: the shape of drafts is part of the choice.
    """

    def __init__(self, *drafters: Drafter):
        self.drafters = drafters

    def start(self, run: Run) -> DraftSession:
        if run.tree is not None:
            raise UnsupportedOptionError(
                f"tree={run.tree!r}: Auto chooses the shape of drafts itself; name a drafter to draft a tree with"
            )
        lookup = PromptLookup(num_tokens=_LONGEST_LOOKUP, min_match=1)
        session = _AutoSession(run, _LookupSource(run, lookup), brings_own=not self.drafters)
        try:
            for drafter in self.drafters:
                session.add(drafter)
        except BaseException:
            session.close()
            raise
        return session


def _own_drafters(run: Run) -> list[Drafter]:
    """What a target brings along to draft for itself."""
    model, done = run.target.model, prepared(run.target.model)
    is_float = model.dtype == torch.float32 and (done is None or done.weights is None)
    if run.target.device.type != "cpu" or not is_float or not native.library():
        return []
    num_bytes = sum(parameter.numel() for parameter in model.parameters())
    has_room = _quantized_self.has_copy(model) or psutil.virtual_memory().available > 2 * num_bytes
    return [_quantized_self] if has_room else []


@dataclass(eq=False)
class _Known:
    """What runs on a target have shown of a drafter."""

    acceptance: AcceptanceMemory = field(default_factory=AcceptanceMemory)
    yields: YieldMemory = field(default_factory=YieldMemory)
    steps: dict[int, ForwardCosts] = field(default_factory=dict)
    """Of drafters without a model of their own, by rows."""


_known: WeakKeyDictionary[PreTrainedModel, dict[object, _Known]] = WeakKeyDictionary()


def _known_of(run: Run, drafter: Drafter) -> _Known:
    model = getattr(drafter, "model", None)
    key = type(drafter), None if model is None else id(model)
    return _known.setdefault(run.target.model, {}).setdefault(key, _Known())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outlook:
    """What is known when a round is chosen."""

    max_depths: Sequence[int]
    costs: ForwardCosts
    plain: Plan
    pace: float

    @property
    def num_rows(self) -> int:
        return len(self.max_depths)

    def seconds(self, width: float) -> float:
        """Of a round that verifies so many drafted tokens in its longest row."""
        return self.costs.seconds(round(self.num_rows * (width + 1)))

    def worth(self, plan: Plan) -> float:
        return plan.worth(self.pace)

    def prices(self, step_seconds: float, longest: int) -> list[float]:
        """See `WorthwhileChain`."""
        longest = min(longest, max(self.max_depths))
        verified = [self.seconds(width) for width in range(1, longest + 1)]
        return [self.pace * (step_seconds + wider - narrower) for narrower, wider in pairwise(verified)]


class _Source:
    """A drafter at work, and what is known of it."""

    def __init__(self, run: Run, drafter: Drafter, session: DraftSession):
        self.name = type(drafter).__name__
        self.session = session
        self._run = run
        self._known = _known_of(run, drafter)
        self.acceptance = AcceptanceModel(self._known.acceptance)


class _LookupSource(_Source):
    """Proposals that take no forward are made every round: looked at, cut to what they are worth, and learned from also
    when another source drafts."""

    def __init__(self, run: Run, drafter: PromptLookup):
        self._lookup = drafter.start(run)
        super().__init__(run, drafter, self._lookup)
        self._chains: list[TokenTree] = []

    def plan(self, outlook: _Outlook) -> Plan | None:
        """The length at which proposals are worth most; None if there is none."""
        self._chains = self._lookup.trees(outlook.max_depths)
        reaches = [self.acceptance.reaches(chain.probs or ()) for chain in self._chains]
        best, most, tokens = 0, -inf, outlook.plain.tokens
        best_tokens = best_seconds = 0.0
        for width, reach in enumerate(map(sum, zip_longest(*reaches, fillvalue=0.0)), start=1):
            if reach < _HOPELESS:
                break
            tokens += reach
            seconds = outlook.seconds(width)
            worth = tokens - outlook.pace * seconds
            if worth > most:
                best, most, best_tokens, best_seconds = width, worth, tokens, seconds
        return Plan(source=_LOOKUP, length=best, tokens=best_tokens, seconds=best_seconds) if best else None

    def draft(self, length: int) -> Draft:
        chains = [TokenTree.chain(chain.tokens[:length]) for chain in self._chains]
        return Draft(trees=TreeBatch.stack(chains, self._run.device))

    def would_commit(self, outcome: Outcome, length: int) -> int:
        """Tokens of all rows that chains of this length would have brought in the round."""
        return sum(1 + agreed for agreed in self._agreed(outcome, length))

    def learn(self, outcome: Outcome) -> None:
        """Compare the proposals with what the target said, whoever drafted."""
        agreed = self._agreed(outcome, _LONGEST_LOOKUP)
        for chain, tokens, num_accepted in zip(self._chains, outcome.tokens, agreed, strict=True):
            tested = (chain.probs or ())[: len(tokens)]
            self.acceptance.note_chain(tested, num_accepted)

    def _agreed(self, outcome: Outcome, length: int) -> list[int]:
        """For each row how many of the proposal's first tokens are those that were committed."""
        counts = []
        for chain, tokens in zip(self._chains, outcome.tokens, strict=True):
            pairs = zip(chain.tokens[:length], tokens, strict=False)
            counts.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return counts


class _ModelSource(_Source):
    """A drafter that takes time: what its rounds yield is known from its rounds only."""

    def __init__(self, run: Run, drafter: Drafter):
        super().__init__(run, drafter, drafter.start(run))
        self._yields = YieldAverage(self._known.yields)
        self._forwards = 0
        self.reading_seconds = 0.0
        """Of the last draft, as expected: an expense for the rounds to come."""

    @property
    def has_begun(self) -> bool:
        return self._yields.num_rounds > 0

    def plan(self, place: int, outlook: _Outlook) -> Plan | None:
        """What drafting now would bring; None: less than plain decoding, in every run that is remembered.

        To begin with it, those runs in which it paid have to pay for what it reads first, and for the rounds that it
        takes to know the others.
        """
        expected = [self._yields.now] if self.has_begun else self._known.yields.runs
        plans = [self._round(place, each, outlook) for each in expected]
        expense = self._reading_seconds(outlook)
        if not self.has_begun:
            plain_worth = outlook.worth(outlook.plain)
            failures = [plan for plan in plans if outlook.worth(plan) <= plain_worth]
            plans = [plan for plan in plans if outlook.worth(plan) > plain_worth]
            loss = sum(plain_worth - outlook.worth(plan) for plan in failures) / outlook.pace
            expense += _TRIAL_ROUNDS * loss / len(expected)
        if not plans:
            return None
        tokens, seconds = (mean(column) for column in zip(*((p.tokens, p.seconds) for p in plans), strict=True))
        rounds_left = min(max(outlook.max_depths), _HORIZON) / (tokens / outlook.num_rows)
        paying_rounds = max(rounds_left * len(plans) / len(expected), 1.0)
        return replace(plans[0], tokens=tokens, seconds=seconds + expense / paying_rounds)

    def draft(self, outlook: _Outlook) -> Draft:
        self._forwards = self.session.num_forwards
        self.reading_seconds = self._reading_seconds(outlook)
        if isinstance(self.session, GrowingSession):
            self.session.policy = WorthwhileChain(
                prices=outlook.prices(self._step_seconds(outlook), _LONGEST_DRAFT),
                chance=self.acceptance.chance,
                next_chance=self.acceptance.mean_chance,
            )
        return self.session.propose([min(depth, _LONGEST_DRAFT) for depth in outlook.max_depths])

    def learn(self, outcome: Outcome, draft: Draft, draft_seconds: float, outlook: _Outlook) -> None:
        """What became of this source's own draft, which took so long to make."""
        trees, num_rows = draft.trees, outlook.num_rows
        steps = max(self.session.num_forwards - self._forwards, 1 if trees.width else 0)
        self._yields.note(sum(map(len, outcome.tokens)) / num_rows, steps, trees.width)
        if steps and self.reading_seconds < draft_seconds / 2:
            self._note_step(outlook, (draft_seconds - self.reading_seconds) / steps)
        if trees.is_chain and trees.rows is not None:
            for row, path in zip(trees.rows, outcome.paths, strict=True):
                self.acceptance.note_chain(row.probs or (), len(path))

    def close(self) -> None:
        self._yields.close()
        self.session.close()

    def _round(self, place: int, expected: Yield, outlook: _Outlook) -> Plan:
        draft_seconds = expected.steps * self._step_seconds(outlook)
        return Plan(
            source=place,
            length=_LONGEST_DRAFT,
            tokens=expected.tokens * outlook.num_rows,
            seconds=draft_seconds + outlook.seconds(expected.nodes),
        )

    def _step_seconds(self, outlook: _Outlook) -> float:
        costs = self._step_costs(outlook)
        return _UNKNOWN_STEP * outlook.plain.seconds if costs is None else costs.seconds(outlook.num_rows)

    def _step_costs(self, outlook: _Outlook) -> ForwardCosts | None:
        model = self.session.draft_model
        return self._known.steps.get(outlook.num_rows) if model is None else costs_of(model, outlook.num_rows)

    def _note_step(self, outlook: _Outlook, seconds: float) -> None:
        costs = self._step_costs(outlook)
        if costs is None:
            costs = self._known.steps[outlook.num_rows] = ForwardCosts({outlook.num_rows: seconds})
        costs.note(outlook.num_rows, seconds)

    def _reading_seconds(self, outlook: _Outlook) -> float:
        """For what the drafter has to read before it can draft."""
        backlog = self.session.backlog
        if not backlog or self.session.draft_model is None:
            return 0.0
        costs = costs_of(self.session.draft_model, outlook.num_rows)
        return costs.seconds(outlook.num_rows * (backlog + 1)) - costs.seconds(outlook.num_rows)


class _AutoSession(DraftSession):
    def __init__(self, run: Run, lookup: _LookupSource, *, brings_own: bool):
        self._run = run
        self._lookup = lookup
        self._models: list[_ModelSource] = []
        self._control = RoundControl()
        self._brings_own = brings_own
        self._round: _Round | None = None
        self._control_seconds = 0.0

    def add(self, drafter: Drafter) -> None:
        self._models.append(_ModelSource(self._run, drafter))

    @property
    def num_forwards(self) -> int:
        return sum(source.session.num_forwards for source in self._models)

    @property
    def control_seconds(self) -> float:
        return self._control_seconds

    def explain(self) -> dict[str, Any]:
        if self._round is None:
            return {}
        plan, plain = self._round.plan, self._round.outlook.plain
        return {
            "drafter": None if plan.source is None else self._sources[plan.source].name,
            "expected_tokens": plan.tokens,
            "expected_ms": 1000 * plan.seconds,
            "plain_ms": 1000 * plain.seconds,
            "ms": 1000 * (perf_counter() - self._round.started),
        }

    def propose(self, max_depths: Sequence[int]) -> Draft:
        started = perf_counter()
        if self._brings_own and max(max_depths) >= _MIN_COPY_TOKENS:
            self._brings_own = False
            for drafter in _own_drafters(self._run):
                self.add(drafter)
        outlook = self._look(max_depths)
        offer = self._lookup.plan(outlook)
        plan = self._choose(outlook, offer)
        decided = perf_counter()
        if plan.source is None:
            draft = Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        elif plan.source == _LOOKUP:
            draft = self._lookup.draft(plan.length)
        else:
            draft = self._model_of(plan).draft(outlook)
        self._control_seconds += decided - started
        self._round = _Round(
            outlook=outlook,
            offer=offer,
            plan=plan,
            draft=draft,
            started=started,
            decided=decided,
            drafted=perf_counter(),
        )
        return draft

    def observe(self, outcome: Outcome) -> None:
        now, round_ = perf_counter(), self._round
        if round_ is not None:
            self._learn(round_, outcome, now)
        for place, source in enumerate(self._sources):
            is_own = round_ is None or round_.plan.source in (None, place)  # a draft without nodes is part of any
            source.session.observe(outcome if is_own else outcome.of_another())
        self._control_seconds += perf_counter() - now

    def select_rows(self, rows: Sequence[int]) -> None:
        for source in self._sources:
            source.session.select_rows(rows)

    def close(self) -> None:
        self._lookup.session.close()
        for source in self._models:
            source.close()

    @property
    def _sources(self) -> list[_Source]:
        return [self._lookup, *self._models]

    def _model_of(self, plan: Plan) -> _ModelSource:
        assert plan.source is not None
        return self._models[plan.source - 1]

    def _look(self, max_depths: Sequence[int]) -> _Outlook:
        num_rows = len(max_depths)
        costs = costs_of(self._run.target.model, num_rows)
        plain = Plan(source=None, length=0, tokens=num_rows, seconds=costs.seconds(num_rows))
        return _Outlook(max_depths=max_depths, costs=costs, plain=plain, pace=self._control.pace.now(plain))

    def _choose(self, outlook: _Outlook, offer: Plan | None) -> Plan:
        if not max(outlook.max_depths):
            return outlook.plain
        plans = [] if offer is None else [offer]
        trials = []
        for place, source in enumerate(self._models, start=_LOOKUP + 1):
            plan = source.plan(place, outlook)
            if plan is not None:
                plans.append(plan)
                if source.has_begun:
                    trials.append(plan)
        return self._control.choose(outlook.plain, plans, trials)

    def _learn(self, round_: _Round, outcome: Outcome, now: float) -> None:
        outlook, plan, trees = round_.outlook, round_.plan, round_.draft.trees
        if plan.source in (None, _LOOKUP) or self._model_of(plan).session.draft_model is not None:
            outlook.costs.note(outlook.num_rows * (trees.width + 1), now - round_.drafted)
        seconds = now - round_.started
        if plan.source not in (None, _LOOKUP):
            source = self._model_of(plan)
            source.learn(outcome, round_.draft, round_.drafted - round_.decided, outlook)
            seconds = max(seconds - source.reading_seconds, 0.0)
        self._lookup.learn(outcome)
        tokens, missed = sum(map(len, outcome.tokens)), 0.0
        if round_.offer is not None and plan.source is None:
            would = self._lookup.would_commit(outcome, round_.offer.length)
            missed = would / outlook.num_rows * outlook.plain.seconds - round_.offer.seconds
        self._control.note(outlook.plain, plan, tokens, seconds, missed_seconds=missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """The round under way, and when its parts were done."""

    outlook: _Outlook
    offer: Plan | None
    """What prompt lookup had to say."""
    plan: Plan
    draft: Draft
    started: float
    decided: float
    drafted: float
