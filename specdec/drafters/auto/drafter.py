"""Decides every round who drafts, how far, or that nobody does: whatever makes the most tokens per second.

`specdec/control` holds the decisions, `sources.py` the drafters at work and what is known of them; here they meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from math import inf
from operator import methodcaller
from time import perf_counter
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from specdec.control import Plan, RoundControl, capped_throughput, costs_of
from specdec.control.costs import (
    ForwardCosts,
    costs_are_known,
    costs_of_one_shape,
    measure_forwards,
    remember_costs,
)
from specdec.cuda.fixed_shape import FixedShapeModel
from specdec.cuda.timing import DeviceSpan
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.auto.dropped import drop, is_dropped, take_back
from specdec.drafters.auto.lookup_source import LONGEST_LOOKUP, LookupSource
from specdec.drafters.auto.sources import LONGEST_DRAFT, ModelSource, RoundContext, Source
from specdec.drafters.composite.cascade import Cascade
from specdec.drafters.lookup.prompt_lookup import PromptLookup
from specdec.drafters.model.quantized_copy import original_of
from specdec.drafters.model.quantized_self import QuantizedSelf
from specdec.drafters.model.sparse_self import SparseSelf
from specdec.errors import SpecdecError, UnsupportedOptionError
from specdec.hf import num_processes
from specdec.kernels import native, prepared
from specdec.kernels.model.linear import is_dense
from specdec.tree_model.model import TreeModel
from trees import Draft, TreeBatch

_MIN_COPY_TOKENS = 32
"""Shorter runs are not worth making an int8 copy of the target for."""

_REMAKING_SHARE = 0.2
"""Of the time of a run may go into making the copy again, of a model that has changed since the last one."""

_LONG = 2048
"""Slots of a text from where on a part of them may be worth drafting with."""

_quantized_self = QuantizedSelf()
_sparse_self = SparseSelf()
_quotes = PromptLookup(num_tokens=3, min_match=2)
"""Drafts for that one, which does not see most of what it might copy. Short: a forward over a short past gets dearer
with every token that it has to check."""


class Auto(Drafter):
    """Chooses among drafters, every round, what makes the most tokens per second; plain decoding is always a choice.

    Costs are measured at the first call for a model and corrected by every round. Lossless, as all its drafters are. A
    drafter that raises is dropped with a warning, and the call goes on with the others: so do later calls, until
    `reset`. What it has learned is shared by all calls for a model, also of several threads.

    Args:
        drafters: to choose from, besides prompt lookup and what the target brings along: on a CPU the int8 copy of a
            float32 model (`QuantizedSelf`; made in the first run that may reach 32 tokens, if memory allows), for which
            those draft too that can take back what they have read (`Cascade`), and from 2048 tokens on the target with
            a part of its past (`SparseSelf`), for which prompt lookup drafts.

    Raises:
        UnsupportedOptionError: at the call, for a `tree`: the shape of drafts is part of the choice.
        SpecdecError: at the call, what a drafter that was named says of a target that it does not fit.
    """

    def __init__(self, *drafters: Drafter):
        self.drafters = drafters
        self.brings_own = not any(isinstance(drafter, Cascade | QuantizedSelf) for drafter in drafters)
        """Whether the target brings its copy along."""

        self.clock: Callable[[], float] = perf_counter
        """Tells the seconds that rounds take; `bench.simulate_auto` puts its own here."""
        self.supports_rollback = all(drafter.supports_rollback for drafter in drafters)
        self.needs_exits = any(drafter.needs_exits for drafter in drafters)

    def reset(self) -> None:
        """Take drafters back that were dropped because they had raised."""
        for drafter in (*self.drafters, _quantized_self, _sparse_self):
            take_back(drafter)

    def models(self) -> Iterator[PreTrainedModel]:
        return chain.from_iterable(drafter.models() for drafter in self.drafters)

    def is_warm(self, target: PreTrainedModel) -> bool:
        return costs_are_known(target)

    def warm_up(self, target: PreTrainedModel) -> None:
        remember_costs(target, measure_forwards(target, time_limit_s=inf))  # all processes make as many forwards

    def start(self, run: Run) -> DraftSession:
        if run.tree is not None:
            raise UnsupportedOptionError(
                f"tree={run.tree!r}: Auto chooses the shape of drafts itself; name a drafter to draft a tree with"
            )
        lookup = PromptLookup(num_tokens=LONGEST_LOOKUP, tokens_per_match=None)
        session = _AutoSession(run, LookupSource(run, lookup), self if self.brings_own else None, self.clock)
        try:
            for drafter in self.drafters:
                session.add(drafter)
        except BaseException:
            session.close()
            raise
        return session


def _own_drafters(run: Run, auto: Auto) -> list[Drafter]:
    """What a target brings along to draft for itself: its copy, for which the others draft."""
    model, done = run.target.model, prepared(run.target.model)
    is_float = model.dtype == torch.float32 and (done is None or done.weights is None)
    is_here = num_processes(model) == 1 and all(
        weights.device.type == "cpu" and is_dense(weights) for weights in model.parameters()
    )
    if not is_here or not is_float or not native.library() or is_dropped(model, _quantized_self):
        return []
    num_bytes = sum(parameter.numel() for parameter in model.parameters())
    has_room = _quantized_self.has_copy(model) or psutil.virtual_memory().available > 2 * num_bytes
    if not has_room:
        return []
    cheap = auto
    if not auto.supports_rollback:
        cheap = Auto(*(drafter for drafter in auto.drafters if drafter.supports_rollback))
        cheap.clock = auto.clock
    return [Cascade(cheap, _quantized_self, num_tokens=LONGEST_DRAFT, min_tokens=1)]


def _pays(model: PreTrainedModel, seconds_left: float) -> bool:
    """Whether a copy is at hand, or making it again pays for a model that keeps changing.

    Args:
        seconds_left: that plain decoding of the run would take, for the most tokens that it may make.
    """
    is_quick = _quantized_self.copy_seconds(model) <= _REMAKING_SHARE * seconds_left
    return is_quick or _quantized_self.has_copy(model)


def _costs_of_target(target: TreeModel, num_rows: int) -> ForwardCosts:
    if isinstance(target, FixedShapeModel):
        return costs_of_one_shape(target, num_rows)
    return costs_of(target.model, num_rows)


class _AutoSession(DraftSession):
    def __init__(self, run: Run, lookup: LookupSource, auto: Auto | None, clock: Callable[[], float]):
        self._run = run
        self._lookup = lookup
        self._models: list[ModelSource] = []
        self._controls: defaultdict[int, RoundControl[Source]] = defaultdict(RoundControl)
        """By the number of rows, up to a factor of two: what pays for one of them may not for eight."""
        self._clock = clock
        self._auto = auto
        """Until the target has been asked for the drafters that it brings along."""
        self._is_short = auto is not None and not any(isinstance(each, SparseSelf) for each in auto.drafters)
        """Until the text is so long that the target may draft with a part of it."""
        self._round: _Round | None = None
        self._control_seconds = 0.0
        # what they depend on does not change in a run, and takes long to look up
        self._costs_of = cache(partial(_costs_of_target, run.target))

    def add(self, drafter: Drafter) -> None:
        """Start a drafter that the caller has named, unless it has been dropped.

        Raises:
            SpecdecError: it does not fit the target or the call.
        """
        self._add(drafter, drafter, SpecdecError)

    def _add(self, drafter: Drafter, root: Drafter, tells: type[Exception] | tuple[()] = ()) -> None:
        target = self._run.target.model
        if is_dropped(target, root):
            return
        try:
            self._models.append(ModelSource(self._run, drafter, root))
        except tells:
            raise
        except Exception as error:
            drop(target, root, error)

    @property
    def num_forwards(self) -> int:
        return sum(source.session.num_forwards for source in self._models)

    @property
    def control_seconds(self) -> float:
        return self._control_seconds

    def explain(self) -> dict[str, Any]:
        if self._round is None:
            return {}
        plan, plain = self._round.plan, self._round.context.plain
        return {
            "drafter": None if plan.source is None else plan.source.name,
            "expected_tokens": plan.tokens,
            "expected_ms": 1000 * plan.seconds,
            "plain_ms": 1000 * plain.seconds,
            "ms": 1000 * (self._clock() - self._round.started),
        }

    def propose(self, max_depths: Sequence[int]) -> Draft:
        started = self._clock()
        context = self._context(max_depths)
        self._add_own_drafters(context)
        offer = self._lookup.plan(context)
        plan = self._choose(context, offer)
        decided, span = self._clock(), DeviceSpan(self._run.device)
        self._control_seconds += decided - started
        draft = self._draft(plan, context)
        span.end()
        if draft is None:
            plan, decided = context.plain, self._clock()
            draft = Draft(trees=TreeBatch.empty(context.num_rows, self._run.device))
        self._round = _Round(
            context=context,
            plan=plan,
            draft=draft,
            started=started,
            decided=decided,
            drafted=self._clock(),
            span=span,
        )
        return draft

    def _context(self, max_depths: Sequence[int]) -> RoundContext:
        num_rows = len(max_depths)
        costs = self._costs_of(num_rows).at(self._length)
        plain: Plan[Source] = Plan(source=None, length=0, tokens=num_rows, seconds=costs.seconds(num_rows))
        throughput = self._control(num_rows).throughput.now(plain)
        return RoundContext(
            max_depths=max_depths,
            costs=costs,
            plain=plain,
            throughput=throughput,
            is_packed=self._run.target.is_packed,
        )

    @property
    def _length(self) -> int:
        """Tokens that a row's next one attends to: of rows in pages on average, of others those of the longest."""
        lengths = self._run.sequences.lengths
        return sum(lengths) // len(lengths) if self._run.target.is_packed else max(lengths)

    def _control(self, num_rows: int) -> RoundControl[Source]:
        return self._controls[(num_rows - 1).bit_length()]

    def _add_own_drafters(self, context: RoundContext) -> None:
        """What the target brings along joins in the first round, if the run may become long enough; what drafts with a
        part of the text when there is more of it."""
        longest = max(context.max_depths)
        if self._auto is not None and longest >= _MIN_COPY_TOKENS:
            if _pays(self._run.target.model, longest * context.plain.seconds):
                for drafter in _own_drafters(self._run, self._auto):
                    self._add(drafter, _quantized_self)
            self._auto = None
        if self._is_short and self._length >= _LONG:
            self._is_short, model = False, self._run.target.model
            if original_of(model) is model and _sparse_self.fits(self._run):  # no copy that drafts for its original
                self._add(Cascade(_quotes, _sparse_self, num_tokens=LONGEST_DRAFT, min_tokens=1), _sparse_self)

    def _choose(self, context: RoundContext, offer: Plan[Source] | None) -> Plan[Source]:
        """The plan that is worth most, or a trial; `offer` is that of prompt lookup."""
        if not max(context.max_depths):
            return context.plain
        plans, trials = [] if offer is None else [offer], []
        for source in self._models:
            if plan := source.plan(context):
                plans.append(plan)
                if source.has_begun:
                    trials.append(plan)
        best = self._control(context.num_rows).choose(context.plain, plans, trials)
        if best.source in (None, self._lookup):
            for source in self._models:
                if trial := source.trial(best, context):
                    return trial
        return best

    def _draft(self, plan: Plan[Source], context: RoundContext) -> Draft | None:
        """None: nothing is drafted, or the drafter has raised."""
        if plan.source is None:
            return None
        if plan.source is not self._lookup:
            context = replace(context, throughput=capped_throughput(context.throughput, [context.plain, plan]))
        draft = plan.source.draft(plan, context)
        if plan.source.is_gone:
            self._run.target.forget_tail()  # it may have left its work there
        return draft

    def observe(self, outcome: Outcome) -> None:
        now, round_ = self._clock(), self._round if outcome.is_own or outcome.own else None
        if round_ is not None:
            self._learn(round_, outcome, now)
        for source in self._sources:
            is_own = round_ is None or round_.plan.source in (None, source)  # a draft without nodes is part of any
            source.tell(methodcaller("observe", outcome if is_own else outcome.as_foreign()))
        self._control_seconds += self._clock() - now

    def _learn(self, round_: _Round, outcome: Outcome, now: float) -> None:
        source, seconds = round_.plan.source, now - round_.decided  # measuring costs comes before, and is done once
        if source is not None:
            seconds = source.round_seconds(round_.plan, seconds)
        seconds -= self._update_costs(round_, round_.draft.trees if outcome.verified is None else outcome.verified, now)
        self._update_sources(round_, outcome)
        num_tokens = sum(map(len, outcome.tokens))
        self._control(round_.context.num_rows).update(round_.plan, num_tokens, max(seconds, 0.0))

    def _update_costs(self, round_: _Round, trees: TreeBatch, now: float) -> float:
        """What the target's forward over these trees took, unless a part of it was drafting; returns what it took to
        read a prompt along, which is no part of the round."""
        context, source, num_along = round_.context, round_.plan.source, self._run.target.num_read_along
        if source is None or not source.session.runs_target:
            num_padded = context.num_rows * trees.num_slots
            num_tokens = context.num_rows + sum(trees.sizes) if context.is_packed else num_padded
            # what it takes to put a proposal together comes with its width; a draft's own time is counted apart
            before = 0.0 if source in (None, self._lookup) else round_.drafting_seconds
            context.costs.update(num_tokens + num_along, now - round_.decided - before)
            if num_along:
                return context.costs.seconds(num_tokens + num_along) - context.costs.seconds(num_tokens)
        return 0.0

    def _update_sources(self, round_: _Round, outcome: Outcome) -> None:
        """What became of the draft, and of what prompt lookup would have drafted."""
        plan = round_.plan
        for source in self._models:
            if source is plan.source:
                source.learn(outcome, round_.draft, round_.drafting_seconds, round_.context)
        self._lookup.learn(outcome, plan if plan.source is self._lookup else None)

    def select_rows(self, rows: Sequence[int]) -> None:
        for source in self._sources:
            source.select_rows(rows)

    @property
    def takes_rows(self) -> bool:  # type: ignore[override]
        return all(source.session.takes_rows for source in self._sources)

    def join(self) -> None:
        for source in self._sources:
            source.join()

    def rollback(self) -> None:
        for source in self._sources:
            source.tell(methodcaller("rollback"))

    def close(self) -> None:
        self._lookup.session.close()
        elapsed_seconds = sum(control.elapsed_seconds for control in self._controls.values())
        for source in self._models:
            source.close(elapsed_seconds)

    @property
    def _sources(self) -> list[Source]:
        return [self._lookup, *self._models]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """The round under way, and when its parts were done."""

    context: RoundContext
    plan: Plan[Source]
    draft: Draft
    started: float
    decided: float
    drafted: float
    span: DeviceSpan
    """Of the drafting."""

    @property
    def drafting_seconds(self) -> float:
        return self.span.seconds(on_host=self.drafted - self.decided)
