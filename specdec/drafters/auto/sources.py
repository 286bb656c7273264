"""The sources that `Auto` chooses among: drafters at work, and what is known of them.

What is known of a drafter is how its confidence relates to acceptance, what its rounds yield, and what its forwards
cost. It outlives the run, and is the starting point of the target's next one.

Shape legend: B rows, W width (drafted tokens of the longest row).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from operator import methodcaller
from statistics import mean
from typing import Any, Concatenate, ParamSpec, TypeVar

from specdec.control import (
    AcceptanceModel,
    ForwardCosts,
    Plan,
    RoundAverages,
    RunAverages,
    StepSeconds,
    costs_of,
    monotone,
)
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.auto.dropped import drop, is_the_callers
from specdec.drafters.auto.knowledge import known_of
from specdec.drafters.plain import Plain
from trees import Draft, GainLimitedChain, TokenTree, chain_length, leaf_confidence

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_DRAFT = 16
_MOST_NODES = LONGEST_DRAFT
"""Of a row, leaves included."""
_MOST_SHARED_NODES = 96
"""Of all rows, where these share a budget."""
_HORIZON = 32
"""Tokens that a run is taken to go on for, at most, when it is weighed whether to begin with a drafter."""
_READING_SHARE = 0.1
"""Of a draft's time: where reading took more, what the steps took is not known, as reading is only estimated."""
_TRIAL_ROUNDS = 3
"""Rounds that it takes to know that a drafter does not pay in this run."""
_UNKNOWN_STEP = 0.2
"""Of a plain round, for a step of a drafter that has never been timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundContext:
    """What is known when a round is chosen.

    Args:
        max_depths: of each row's draft.
        costs: of the target's forwards, at the length of the rows.
        plain: a round without a draft.
        throughput: of the run, in tokens per second.
        is_packed: whether a round verifies as many tokens as its rows have; else as many as the longest, in each.
    """

    max_depths: Sequence[int]
    costs: ForwardCosts
    plain: Plan[Any]
    throughput: float
    is_packed: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.max_depths)

    @property
    def least_seconds(self) -> float:
        """Of one more token in the target's forward, where tokens are cheapest."""
        counts = (1, 2, 4, 8, 16, 32)
        return min((self.costs.seconds(self.num_rows + count) - self.plain.seconds) / count for count in counts)

    def seconds(self, width: float) -> float:
        """Of a round that verifies so many drafted tokens in its longest row; if packed, for a row on average."""
        return self.costs.seconds(round(self.num_rows * (width + 1)))

    def prices(self, step_seconds: float, leaf_prices: Sequence[float]) -> list[float]:
        """Of the tokens of a chain, see `GainLimitedChain`; `step_seconds` are those of a step after the first."""
        longest = min(LONGEST_DRAFT, max(self.max_depths))
        drafting = self.throughput * step_seconds
        return [drafting + (0.0 if self.is_packed else price) for price in leaf_prices[1:longest]]

    def leaf_prices(self) -> list[float]:
        """The price of each node of a tree, if packed of all trees (see `GainLimitedChain`): an isotonic regression of
        the marginal costs, as differences of widths that are timed and corrected one by one are mostly noise."""
        if self.is_packed:
            most = min(_MOST_NODES * self.num_rows, _MOST_SHARED_NODES)
            verified = [self.costs.seconds(self.num_rows + count) for count in range(max(most, _MOST_NODES) + 1)]
        else:
            verified = [self.seconds(width) for width in range(_MOST_NODES + 1)]
        prices = [self.throughput * (wider - narrower) for narrower, wider in pairwise(verified)]
        return monotone(prices, [1.0] * len(prices))


class Source(ABC):
    """A drafter at work, and what is known of it."""

    is_gone = False
    """It has raised, and does not draft any more."""

    def __init__(self, run: Run, drafter: Drafter, session: DraftSession):
        self.name = type(drafter).__name__
        self.session = session
        self._run = run
        self._known = known_of(run, drafter)
        self.acceptance = AcceptanceModel(self._known.acceptance)

    @abstractmethod
    def draft(self, plan: Plan[Source], context: RoundContext) -> Draft | None:
        """Carry out a plan of this source; None: the drafter has raised."""

    def round_seconds(self, plan: Plan[Source], seconds: float) -> float:
        """What to ascribe to a round of this source that took so long."""
        return seconds

    def tell(self, news: Callable[[DraftSession], None]) -> None:
        """Have the session take note of something."""
        news(self.session)

    def select_rows(self, rows: Sequence[int]) -> None:
        """As `DraftSession.select_rows`."""
        self.tell(methodcaller("select_rows", rows))

    def join(self) -> None:
        """As `DraftSession.join`."""
        self.tell(methodcaller("join"))


class ModelSource(Source):
    """A drafter that takes time: what its rounds come to is known from its rounds only.

    Its public methods do not raise what the drafter raises: it is dropped, and None is returned from then on. Only the
    errors of the call's own processors come out as they are.
    """

    def __init__(self, run: Run, drafter: Drafter, root: Drafter | None = None):
        """root: which the drafter was made of for this run; None for itself."""
        super().__init__(run, drafter, drafter.start(run))
        self._root = root or drafter
        self.leaves = AcceptanceModel(self._known.leaves_when(run.sampler.do_sample))
        self._costs_of = cache(partial(_costs_of_draft, self.session))
        self._averages = RunAverages(self._known.history)
        self._steps = 0
        self._pays = False
        self._is_on_trial = False
        self._reading = 0.0
        """Seconds of the last draft, as expected: an expense for the rounds to come."""

    @property
    def has_begun(self) -> bool:
        return self._averages.num_rounds > 0

    def plan(self, context: RoundContext) -> Plan[Source] | None:
        """What drafting now would bring; None: less than plain decoding, in every run that is remembered.

        To begin with it, those runs in which it paid have to pay for what it reads first, and for the rounds that it
        takes to know the others.
        """
        return self._attempt(ModelSource._plan, context)

    def trial(self, best: Plan[Source], context: RoundContext) -> Plan[Source] | None:
        """A round of a drafter that has not paid lately, to see whether it does in this run; None: that is too dear.

        Without it, a drafter that was unlucky once, or mistimed, would not be heard of again.

        Args:
            best: what would be done instead.
        """
        return self._attempt(ModelSource._trial, best, context)

    def draft(self, plan: Plan[Source], context: RoundContext) -> Draft | None:
        return self._attempt(ModelSource._draft, context)

    def round_seconds(self, plan: Plan[Source], seconds: float) -> float:
        seconds = max(seconds - self._reading, 0.0)
        return seconds if self.has_begun else min(seconds, plan.seconds)  # how long reading a prompt takes is a guess

    def _plan(self, context: RoundContext) -> Plan[Source] | None:
        expected = [self._averages.now] if self.has_begun else self._known.history.runs
        plans = [self._round(each, context) for each in expected]
        expense = self._reading_seconds(context)
        if not self.has_begun:
            rate = context.plain.tokens / context.plain.seconds
            failures = [plan for plan in plans if plan.worth(rate) <= 0]
            plans = [plan for plan in plans if plan.worth(rate) > 0]
            loss = -sum(plan.worth(rate) for plan in failures) / rate
            expense += _TRIAL_ROUNDS * loss / len(expected)
        if not plans:
            return None
        if self.has_begun:
            self._pays = plans[0].worth(context.plain.tokens / context.plain.seconds) > 0
        tokens, seconds = (mean(column) for column in zip(*((p.tokens, p.seconds) for p in plans), strict=True))
        rounds_left = min(max(context.max_depths), _HORIZON) / (tokens / context.num_rows)
        paying_rounds = max(rounds_left * len(plans) / len(expected), 1.0)
        return replace(plans[0], tokens=tokens, seconds=seconds + expense / paying_rounds)

    def _trial(self, best: Plan[Source], context: RoundContext) -> Plan[Source] | None:
        if self._averages.num_rounds >= _TRIAL_ROUNDS or max(context.max_depths) < _HORIZON:
            return None
        plan = self._round(self._known.history.mean, context)
        if not self.has_begun:
            throughput = best.tokens / best.seconds
            loss = self._reading_seconds(context) - _TRIAL_ROUNDS * min(plan.worth(throughput), 0.0) / throughput
            self._is_on_trial = loss <= self._known.trial_seconds()
        return plan if self._is_on_trial else None

    def _draft(self, context: RoundContext) -> Draft:
        self._steps = self.session.num_steps
        self._reading = self._reading_seconds(context)
        if self.session.grows_trees:
            leaf_prices = context.leaf_prices()
            self.session.policy = GainLimitedChain(
                prices=context.prices(self._later_steps(context).expected(self._step_seconds(context)), leaf_prices),
                chance=self.acceptance.chance,
                next_chance=self.acceptance.mean_chance,
                leaf_prices=leaf_prices,
                leaf_chance=self.leaves.chance,
                shares_budget=context.is_packed,
            )
        return self.session.propose([min(depth, LONGEST_DRAFT) for depth in context.max_depths])

    def learn(self, outcome: Outcome, draft: Draft, draft_seconds: float, context: RoundContext) -> None:
        """What became of this source's own draft, which took so long to make."""
        trees, num_rows = draft.trees, context.num_rows
        steps = max(self.session.num_steps - self._steps, 1 if trees.width else 0)
        nodes = sum(trees.sizes) / num_rows if context.is_packed else trees.width
        self._averages.update(sum(map(len, outcome.tokens)) / num_rows, steps, nodes)
        if steps and self._reading < _READING_SHARE * draft_seconds:
            self._step_costs(context).update(num_rows, (draft_seconds - self._reading) / steps)
            self._later_steps(context).update(steps, draft_seconds - self._reading)
        for row, path in zip(trees.rows or (), outcome.paths, strict=trees.rows is not None):
            if row.probs is not None:
                self._learn_leaves(row, row.probs, path)

    def _learn_leaves(self, row: TokenTree, probs: Sequence[float], path: Sequence[int]) -> None:
        """What the target took of a chain, and of the leaves beside what it came to."""
        length = chain_length(row)
        num_along = sum(node < length for node in path)
        self.acceptance.update_chain(probs[:length], num_along)
        for slot in range(min(num_along + 1, length)):
            elders = [probs[slot]]
            for leaf in row.children[slot][1:]:
                confidence = leaf_confidence(probs[leaf], elders, self._run.sampler.do_sample)
                self.leaves.update(confidence, leaf in path)
                elders.append(probs[leaf])

    def _attempt(self, step: Callable[Concatenate[ModelSource, P], T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What one of the methods returns; None where the drafter raises, or has done so before."""
        if self.is_gone:
            return None
        try:
            return step(self, *args, **kwargs)
        except Exception as error:
            if is_the_callers(error):
                raise
            self._give_up(error)
            return None

    def tell(self, news: Callable[[DraftSession], None]) -> None:
        self._attempt(Source.tell, news)

    def _give_up(self, error: Exception) -> None:
        """Nothing is asked of the drafter's session any more."""
        self.is_gone = True
        drop(self._run.target.model, self._root, error)
        with suppress(Exception):  # it is broken, and one error has been told
            self.session.close()
        self.session = Plain().start(self._run)

    def close(self, elapsed_seconds: float) -> None:
        """The run is over, after so much time."""
        if self.is_gone:
            return
        self._known.update_run(self._pays if self.has_begun else None, elapsed_seconds)
        self._averages.close()
        self.session.close()

    def _round(self, expected: RoundAverages, context: RoundContext) -> Plan[Source]:
        draft_seconds = expected.steps * self._step_seconds(context)
        return Plan(
            source=self,
            length=LONGEST_DRAFT,
            tokens=expected.tokens * context.num_rows,
            seconds=draft_seconds + context.seconds(expected.nodes),
        )

    def _step_seconds(self, context: RoundContext) -> float:
        return self._step_costs(context).seconds(context.num_rows)

    def _later_steps(self, context: RoundContext) -> StepSeconds:
        return self._known.later_steps.setdefault(context.num_rows, StepSeconds())

    def _step_costs(self, context: RoundContext) -> ForwardCosts:
        num_rows = context.num_rows
        costs = self._costs_of(num_rows) or self._known.steps.get(num_rows)
        if costs is None:  # a guess to start from, since the first drafts load, read and measure what they need
            attended = self.session.attended
            seconds = _UNKNOWN_STEP * context.plain.seconds
            if attended is not None:
                seconds = context.costs.at(attended).seconds(num_rows)
            guess = {num_rows: seconds}
            costs = self._known.steps.setdefault(num_rows, ForwardCosts(guess, plain=num_rows))
        return costs

    def _reading_seconds(self, context: RoundContext) -> float:
        """For what the drafter has to read before it can draft."""
        num_uncached_tokens, costs = self.session.num_uncached_tokens, self._costs_of(context.num_rows)
        if not num_uncached_tokens or costs is None:
            return 0.0
        return costs.seconds(context.num_rows + num_uncached_tokens) - costs.seconds(context.num_rows)


def _costs_of_draft(session: DraftSession, num_rows: int) -> ForwardCosts | None:
    """Of the forwards of its draft model, if it has one."""
    return None if session.draft_model is None else costs_of(session.draft_model, num_rows)
