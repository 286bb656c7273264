"""Which exit drafts the next round, how far, or none: for tokens per second, as `Auto` chooses among drafters.

`Plan`s say what a round of each exit is expected to bring and to take, `RoundControl` takes the one that is worth most
and tries those that did not pay again. The chain and its leaves grow for as long as they are worth their time
(`GainLimitedChain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from specdec.control import Plan, RoundControl, capped_throughput
from specdec.decoding.drafter import Outcome, Run
from specdec.drafters.auto.sources import LONGEST_DRAFT, RoundContext
from specdec.drafters.early_exit.costs import ExitCosts, clock_of, exit_costs
from specdec.drafters.early_exit.heads import ExitHead
from specdec.drafters.early_exit.rule import ExitChoice, ExitRule
from specdec.drafters.early_exit.shadows import ShadowTokens
from specdec.drafters.early_exit.sources import ExitSource
from trees import Draft, TreeBatch

_PLAN_EVERY = 4
"""Rounds for which plans are kept: what they rest on changes slowly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Options:
    """What there is to choose from in the next rounds.

    Args:
        plans: of the exits of which something is known.
        prices, leaf_prices: see `GainLimitedChain`; the former by exit.
        acceptance: of a token that is not drawn yet, by exit.
    """

    context: RoundContext
    costs: ExitCosts
    plans: Sequence[Plan[int]]
    prices: Mapping[int, Sequence[float]]
    leaf_prices: Sequence[float]
    acceptance: dict[int, float]


@dataclass(kw_only=True, eq=False)
class _Round:
    """The round under way, and when its parts were done."""

    plan: Plan[int]
    options: _Options
    decided: float
    drafted: float = 0.0
    num_steps: int = 0


class TokensPerSecond(ExitRule):
    """The exit, and how far it drafts, that make the most tokens per second; plain decoding is always a choice.

    Args:
        heads: of the candidates, in increasing order.
        max_length: most tokens of a chain; never more than 16.
        shadows: compare the exits with the target; None learns only from what becomes of their drafts.
    """

    def __init__(self, run: Run, heads: Sequence[ExitHead], *, max_length: int, shadows: ShadowTokens | None):
        sample, is_watched = run.sampler.do_sample, shadows is not None
        self._sources = {head.layer: ExitSource(head, sample=sample, is_watched=is_watched) for head in heads}
        self._costs_of = cache(lambda num_rows: exit_costs(run.target, heads, num_rows))
        self._clock = clock_of(run.target.device)
        self._max_length = min(max_length, LONGEST_DRAFT)
        self._shadows = shadows
        self._control: RoundControl[int] = RoundControl()
        self._options: _Options | None = None
        self._age = 0
        self._round: _Round | None = None

    @property
    def control_seconds(self) -> float:
        return 0.0 if self._shadows is None else self._shadows.seconds

    def begin(self) -> None:
        for seen in () if self._shadows is None else self._shadows.seed():
            self._sources[seen.exit_layer].observe(seen)

    def choose(self, max_depths: Sequence[int]) -> ExitChoice | None:
        options = self._current(max_depths)
        plain = options.context.plain
        trials = [plan for plan in options.plans if self._source(plan).is_worth_a_trial]
        plan = self._control.choose(plain, options.plans, trials) if max(max_depths) else plain
        if self._shadows is not None:
            self._shadows.prepare(_centre(plan, options.acceptance, default=min(self._sources)))
        self._round = _Round(plan=plan, options=options, decided=self._clock())
        if plan.source is None:
            return None
        policy = self._source(plan).policy(options.prices[plan.source], options.leaf_prices)
        return ExitChoice(plan.source, policy)

    def drafted(self, num_steps: int) -> None:
        assert self._round is not None
        self._round.drafted, self._round.num_steps = self._clock(), num_steps

    def learn(self, draft: Draft, outcome: Outcome, slots: Sequence[Sequence[int]]) -> None:
        round_, now = self._round, self._clock()
        assert round_ is not None
        if outcome.is_own:  # else others have drafted and been verified in that time
            self._update_times(round_, draft.trees, sum(map(len, outcome.tokens)), now)
        own = round_.plan.source
        if own is not None:
            self._sources[own].learn(draft.trees, outcome.own_paths, round_.num_steps)
        for seen in () if self._shadows is None else self._shadows.compare(slots, outcome):
            if seen.exit_layer != own:
                self._sources[seen.exit_layer].observe(seen)
        for layer, source in self._sources.items():
            source.is_up_to_date = layer == own

    def explain(self) -> dict[str, Any]:
        if self._round is None:
            return {}
        plan, options = self._round.plan, self._round.options
        return {
            "drafter": None if plan.source is None else f"exit {plan.source}",
            "exit_layer": plan.source,
            "expected_tokens": plan.tokens,
            "expected_ms": 1000 * plan.seconds,
            "plain_ms": 1000 * options.context.plain.seconds,
            "ms": 1000 * (self._clock() - self._round.decided),
            "acceptance": options.acceptance,
        }

    def _source(self, plan: Plan[int]) -> ExitSource:
        """Plans name an exit by its layer."""
        assert plan.source is not None
        return self._sources[plan.source]

    def _current(self, max_depths: Sequence[int]) -> _Options:
        self._age += 1
        last = self._options
        if last is None or self._age > _PLAN_EVERY or last.context.num_rows != len(max_depths):
            self._options, self._age = self._look(max_depths, () if last is None else last.plans), 1
        assert self._options is not None
        return self._options

    def _look(self, max_depths: Sequence[int], last_plans: Sequence[Plan[int]]) -> _Options:
        num_rows = len(max_depths)
        costs = self._costs_of(num_rows)
        plain: Plan[int] = Plan(source=None, length=0, tokens=num_rows, seconds=costs.forward.seconds(num_rows))
        throughput = capped_throughput(self._control.throughput.now(plain), [plain, *last_plans])
        context = RoundContext(max_depths=max_depths, costs=costs.forward, plain=plain, throughput=throughput)
        leaf_prices = context.leaf_prices()
        seen = {layer: source for layer, source in self._sources.items() if source.is_seen}
        step_seconds = {layer: costs.step_seconds(layer) for layer in seen}
        prices = {
            layer: [throughput * seconds + price for price in leaf_prices[1 : self._max_length]]
            for layer, seconds in step_seconds.items()
        }
        return _Options(
            context=context,
            costs=costs,
            plans=[source.plan(layer, context, step_seconds[layer], prices[layer]) for layer, source in seen.items()],
            prices=prices,
            leaf_prices=leaf_prices,
            acceptance={layer: source.acceptance.mean_chance for layer, source in seen.items()},
        )

    def _update_times(self, round_: _Round, trees: TreeBatch, num_tokens: int, now: float) -> None:
        plan, costs = round_.plan, round_.options.costs
        costs.forward.update(trees.num_rows * trees.num_slots, now - round_.drafted)
        self._control.update(plan, num_tokens, now - round_.decided)
        if plan.source is not None and round_.num_steps:
            step_seconds = (round_.drafted - round_.decided) / round_.num_steps
            # what it has missed is read in that time too
            if self._source(plan).is_up_to_date or step_seconds < costs.step_seconds(plan.source):
                costs.update_step(plan.source, step_seconds)


def _centre(plan: Plan[int], acceptance: dict[int, float], *, default: int) -> int:
    """The exit that drafts, or else the one that agrees with the target most often."""
    if plan.source is not None:
        return plan.source
    return max(acceptance, key=acceptance.__getitem__, default=default)
