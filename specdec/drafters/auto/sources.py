"""The sources that `Auto` chooses among: drafters at work, and what is known of them.

What is known of a drafter is how its confidence relates to acceptance, what its rounds yield, and what its forwards
cost. It outlives the run, and is the starting point of the target's next one.

Shape legend: B rows, W width (drafted tokens of the longest row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, takewhile, zip_longest
from math import ceil, inf
from statistics import mean
from typing import Concatenate, ParamSpec, TypeVar

from specdec.control import (
    AcceptanceModel,
    ForwardCosts,
    Plan,
    Yield,
    YieldAverage,
    costs_of,
    monotone,
)
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.auto.dropped import drop, is_the_callers
from specdec.drafters.auto.knowledge import known_of
from specdec.drafters.composite.nested import NestedSession
from specdec.drafters.lookup.prompt_lookup import PromptLookup
from specdec.drafters.model.growing import GrowingSession
from specdec.drafters.plain import Plain
from trees import Draft, TokenTree, TreeBatch, WorthwhileComb, chain_length, leaf_confidence

P = ParamSpec("P")
T = TypeVar("T")

LOOKUP = 0
"""The place of prompt lookup among the sources of a run."""
LONGEST_LOOKUP = 24
_HOPELESS = 0.01
"""Expected tokens below which the rest of a proposal is not looked at."""
LONGEST_DRAFT = 16
_MOST_NODES = LONGEST_DRAFT
"""Of a row, leaves included."""
_HORIZON = 32
"""Tokens that a run is taken to go on for, at most, when it is weighed whether to begin with a drafter."""
_READING_SHARE = 0.1
"""Of a draft's time: where reading took more, what the steps took is not known, as reading is only estimated."""
_TRIAL_ROUNDS = 3
"""Rounds that it takes to know that a drafter does not pay in this run."""
_UNKNOWN_STEP = 0.2
"""Of a plain round, for a step of a drafter that has never been timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
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

    def prices(self, step_seconds: float, longest: int) -> list[float]:
        """Of the tokens of a chain, see `WorthwhileComb`."""
        longest = min(longest, max(self.max_depths))
        return [self.pace * step_seconds + price for price in self.leaf_prices()[1:longest]]

    def leaf_prices(self) -> list[float]:
        """Of the nodes of a tree, see `WorthwhileComb`: the closest ones that do not fall, as differences of widths
        that are timed and corrected one by one are mostly noise."""
        verified = [self.seconds(width) for width in range(_MOST_NODES + 1)]
        prices = [self.pace * (wider - narrower) for narrower, wider in pairwise(verified)]
        return monotone(prices, [1.0] * len(prices))


class Source:
    """A drafter at work, and what is known of it."""

    def __init__(self, run: Run, drafter: Drafter, session: DraftSession):
        self.name = type(drafter).__name__
        self.session = session
        self._run = run
        self._known = known_of(run, drafter)
        self.acceptance = AcceptanceModel(self._known.acceptance)

    def tell(self, news: Callable[[DraftSession], None]) -> None:
        """Have the session take note of something."""
        news(self.session)


class LookupSource(Source):
    """Proposals that take no forward are made every round: looked at, cut to what they are worth, and learned from also
    when another source drafts."""

    def __init__(self, run: Run, drafter: PromptLookup):
        self._lookup = drafter.start(run)
        super().__init__(run, drafter, self._lookup)
        self._chains: list[TokenTree] = []

    def plan(self, outlook: Outlook) -> Plan | None:
        """The length at which proposals are worth most; None if there is none."""
        self._chains = self._lookup.trees(outlook.max_depths)
        reaches = [self.acceptance.reaches(chain.probs or ()) for chain in self._chains]
        trust = self._known.trust_in(outlook.num_rows)
        best, most, tokens = 0, -inf, outlook.plain.tokens
        best_tokens = best_seconds = 0.0
        for width, reach in enumerate(map(sum, zip_longest(*reaches, fillvalue=0.0)), start=1):
            if reach < _HOPELESS:
                break
            tokens += trust.share * reach
            seconds = outlook.seconds(width)
            worth = tokens - outlook.pace * seconds
            if worth > most:
                best, most, best_tokens, best_seconds = width, worth, tokens, seconds
        return Plan(source=LOOKUP, length=best, tokens=best_tokens, seconds=best_seconds) if best else None

    def draft(self, length: int) -> Draft:
        chains = [TokenTree.chain(chain.tokens[:length]) for chain in self._chains]
        return Draft(trees=TreeBatch.stack(chains, self._run.device))

    def would_commit(self, outcome: Outcome, length: int) -> int:
        """Tokens of all rows that chains of this length would have brought in the round."""
        return sum(1 + agreed for agreed in self._agreed(outcome, length))

    def learn(self, outcome: Outcome, drafted: Plan | None) -> None:
        """Compare the proposals with what the target said, whoever drafted.

        Args:
            drafted: the plan, if these were what was drafted.
        """
        num_rows = len(outcome.tokens)
        trust = self._known.trust_in(num_rows)
        if drafted is None:
            trust.passed_over()
        else:
            promised = (drafted.tokens - num_rows) / trust.share
            trust.note(promised, self.would_commit(outcome, drafted.length) - num_rows)
        agreed = self._agreed(outcome, LONGEST_LOOKUP)
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


class ModelSource(Source):
    """A drafter that takes time: what its rounds yield is known from its rounds only."""

    def __init__(self, run: Run, drafter: Drafter, root: Drafter | None = None):
        """root: which the drafter was made of for this run; None for itself."""
        super().__init__(run, drafter, drafter.start(run))
        self._root = root or drafter
        self.leaves = AcceptanceModel(self._known.leaves_when(run.sampler.do_sample))
        self._costs_of = cache(partial(_costs_of_draft, self.session))
        self._yields = YieldAverage(self._known.yields)
        self._forwards = 0
        self._pays = False
        self._is_on_trial = False
        self.is_gone = False
        """It has raised, and does not draft any more."""
        self.reading_seconds = 0.0
        """Of the last draft, as expected: an expense for the rounds to come."""

    @property
    def has_begun(self) -> bool:
        return self._yields.num_rounds > 0

    def plan(self, place: int, outlook: Outlook) -> Plan | None:
        """What drafting now would bring; None: less than plain decoding, in every run that is remembered.

        To begin with it, those runs in which it paid have to pay for what it reads first, and for the rounds that it
        takes to know the others.
        """
        expected = [self._yields.now] if self.has_begun else self._known.yields.runs
        plans = [self._round(place, each, outlook) for each in expected]
        expense = self._reading_seconds(outlook)
        if not self.has_begun:
            rate = outlook.plain.tokens / outlook.plain.seconds
            failures = [plan for plan in plans if plan.worth(rate) <= 0]
            plans = [plan for plan in plans if plan.worth(rate) > 0]
            loss = -sum(plan.worth(rate) for plan in failures) / rate
            expense += _TRIAL_ROUNDS * loss / len(expected)
        if not plans:
            return None
        if self.has_begun:
            self._pays = plans[0].worth(outlook.plain.tokens / outlook.plain.seconds) > 0
        tokens, seconds = (mean(column) for column in zip(*((p.tokens, p.seconds) for p in plans), strict=True))
        rounds_left = min(max(outlook.max_depths), _HORIZON) / (tokens / outlook.num_rows)
        paying_rounds = max(rounds_left * len(plans) / len(expected), 1.0)
        return replace(plans[0], tokens=tokens, seconds=seconds + expense / paying_rounds)

    def trial(self, place: int, best: Plan, outlook: Outlook) -> Plan | None:
        """A round of a drafter that has not paid lately, to see whether it does in this run; None: that is too dear.

        Without it, a drafter that was unlucky once, or mistimed, would not be heard of again.

        Args:
            best: what would be done instead.
        """
        if self._yields.num_rounds >= _TRIAL_ROUNDS or max(outlook.max_depths) < _HORIZON:
            return None
        plan = self._round(place, self._known.yields.mean, outlook)
        if not self.has_begun:
            pace = best.tokens / best.seconds
            loss = self._reading_seconds(outlook) - _TRIAL_ROUNDS * min(plan.worth(pace), 0.0) / pace
            self._is_on_trial = loss <= self._known.trial_seconds()
        return plan if self._is_on_trial else None

    def draft(self, outlook: Outlook) -> Draft:
        self._forwards = self.session.num_forwards
        self.reading_seconds = self._reading_seconds(outlook)
        longest = LONGEST_DRAFT
        if not self._known.yields.num_runs:  # one more token with every round
            longest = min(longest, ceil(self._known.yields.mean.nodes) + 1 + self._yields.num_rounds)
        if isinstance(self.session, GrowingSession | NestedSession):
            self.session.policy = WorthwhileComb(
                prices=outlook.prices(self._step_seconds(outlook), longest),
                chance=self.acceptance.chance,
                next_chance=self.acceptance.mean_chance,
                leaf_prices=outlook.leaf_prices(),
                leaf_chance=self.leaves.chance,
            )
        return self.session.propose([min(depth, longest) for depth in outlook.max_depths])

    def learn(self, outcome: Outcome, draft: Draft, draft_seconds: float, outlook: Outlook) -> None:
        """What became of this source's own draft, which took so long to make."""
        trees, num_rows = draft.trees, outlook.num_rows
        steps = max(self.session.num_forwards - self._forwards, 1 if trees.width else 0)
        if isinstance(self.session, NestedSession):
            steps = trees.width  # its forwards bring several tokens each, so tokens are what is timed
        self._yields.note(sum(map(len, outcome.tokens)) / num_rows, steps, trees.width)
        if steps and self.reading_seconds < _READING_SHARE * draft_seconds:
            self._step_costs(outlook).note(num_rows, (draft_seconds - self.reading_seconds) / steps)
        for row, path in zip(trees.rows or (), outcome.paths, strict=trees.rows is not None):
            if row.probs is not None:
                self._learn_comb(row, row.probs, path)

    def _learn_comb(self, row: TokenTree, probs: Sequence[float], path: Sequence[int]) -> None:
        """What the target took of a chain, and of the leaves beside what it came to."""
        length = chain_length(row)
        num_along = sum(node < length for node in path)
        self.acceptance.note_chain(probs[:length], num_along)
        for slot in range(min(num_along + 1, length)):
            elders = [probs[slot]]
            for leaf in row.children[slot][1:]:
                confidence = leaf_confidence(probs[leaf], elders, self._run.sampler.do_sample)
                self.leaves.note(confidence, leaf in path)
                elders.append(probs[leaf])

    def attempt(self, step: Callable[Concatenate[ModelSource, P], T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What one of the methods returns; None where the drafter raises, or has done so before.

        The errors of the call's own processors come out as they are.
        """
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
        self.attempt(Source.tell, news)

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
        self._known.note_run(self._pays if self.has_begun else None, elapsed_seconds)
        self._yields.close()
        self.session.close()

    def _round(self, place: int, expected: Yield, outlook: Outlook) -> Plan:
        draft_seconds = expected.steps * self._step_seconds(outlook)
        return Plan(
            source=place,
            length=LONGEST_DRAFT,
            tokens=expected.tokens * outlook.num_rows,
            seconds=draft_seconds + outlook.seconds(expected.nodes),
        )

    def _step_seconds(self, outlook: Outlook) -> float:
        return self._step_costs(outlook).seconds(outlook.num_rows)

    def _step_costs(self, outlook: Outlook) -> ForwardCosts:
        num_rows = outlook.num_rows
        costs = self._costs_of(num_rows) or self._known.steps.get(num_rows)
        if costs is None:  # a guess to start from, since the first drafts load, read and measure what they need
            guess = {num_rows: _UNKNOWN_STEP * outlook.plain.seconds}
            costs = self._known.steps.setdefault(num_rows, ForwardCosts(guess, plain=num_rows))
        return costs

    def _reading_seconds(self, outlook: Outlook) -> float:
        """For what the drafter has to read before it can draft."""
        backlog, costs = self.session.backlog, self._costs_of(outlook.num_rows)
        if not backlog or costs is None:
            return 0.0
        return costs.seconds(outlook.num_rows + backlog) - costs.seconds(outlook.num_rows)


def _costs_of_draft(session: DraftSession, num_rows: int) -> ForwardCosts | None:
    """Of the forwards of its draft model, if it has one."""
    return None if session.draft_model is None else costs_of(session.draft_model, num_rows)
