"""What a round is for: expected committed tokens per second, and never fewer of them than plain decoding makes.

A run has some *throughput* (tokens per second). A plan that takes s seconds is worth its expected tokens less what the
throughput would bring in s. The plan that is worth most maximises tokens per second in the long run (Dinkelbach's
rule), where the best ratio of a single round would favour short rounds. Plain decoding is always one of the plans.

Seconds are wall time, tokens are those of all rows of the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

SourceT = TypeVar("SourceT", bound=Hashable)
"""Whoever drafts, and can be told apart."""

_THROUGHPUT_DECAY = 0.95
"""What a round still counts for after another."""
_THROUGHPUT_ROUNDS = 4.0
"""Rounds of plain decoding that a run's throughput starts with."""
_RUN_ROUNDS = 4.0
"""Rounds that what earlier runs have shown is worth in a new one."""
_RUN_DECAY = 0.9
_PLAIN_EVERY = 64
"""Rounds after which one is plain, so that it is known what plain decoding takes now."""
_LONGEST_ROUND = 2.0
"""Times what was expected: beyond that it was another program's doing. If it was not, the costs will follow."""
_REMEMBERED_RUNS = 32
_PROBE_SHARE = 0.01
"""Of the time may be lost on looking whether a source that did not pay does so now."""
_FIRST_PROBE, _LAST_PROBE = 8, 256
"""Rounds until a source that was not worth it is probed: at first, and at most."""
_adding = Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Generic[SourceT]):
    """What the next round might do.

    Args:
        source: who drafts; None: nobody.
        length: most tokens to draft for a row.
        tokens: expected to be committed, of all rows. Of a lookup's plan it is the rows' geometric mean times their
            number, which is no more (see `LookupSource.plan`).
        seconds: that it is expected to take.
    """

    source: SourceT | None
    length: int
    tokens: float
    seconds: float

    def worth(self, throughput: float) -> float:
        """Tokens that it brings more than its time would bring at this throughput (tokens per second)."""
        return self.tokens - throughput * self.seconds


class Throughput:
    """Tokens per second that a run makes; at least those of plain decoding, which it can always have."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def now(self, plain: Plan[Any]) -> float:
        tokens = self._tokens + _THROUGHPUT_ROUNDS * plain.tokens
        seconds = self._seconds + _THROUGHPUT_ROUNDS * plain.seconds
        return max(tokens / seconds, plain.tokens / plain.seconds)

    def update(self, tokens: int, seconds: float) -> None:
        self._tokens = self._tokens * _THROUGHPUT_DECAY + tokens
        self._seconds = self._seconds * _THROUGHPUT_DECAY + seconds


def capped_throughput(throughput: float, plans: Iterable[Plan[Any]]) -> float:
    """The running throughput, capped at what the best plan can reach: a past burst makes no plan look slow."""
    return min(throughput, max(plan.tokens / plan.seconds for plan in plans))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAverages:
    """What rounds of a source came to on average, for a row.

    Args:
        tokens: committed, the bonus included.
        steps: forwards of the draft.
        nodes: drafted; where rows are padded, of the longest.
    """

    tokens: float
    steps: float
    nodes: float


UNKNOWN_PRIORS = (RoundAverages(tokens=1.5, steps=2.5, nodes=2.5), RoundAverages(tokens=3.0, steps=3.0, nodes=3.0))
"""What is believed of a source that nothing is known of: two runs, a poor one and a good one."""
_AGREEING_TOKENS = 8
"""That a source which is known to agree drafts at first."""


def prior_averages(prior_acceptance: float) -> tuple[RoundAverages, ...]:
    """What is believed of a source that has never been seen at work, but is known to agree with the target so often."""
    if not prior_acceptance:
        return UNKNOWN_PRIORS
    length = _AGREEING_TOKENS
    return (
        RoundAverages(tokens=sum(prior_acceptance**depth for depth in range(length + 1)), steps=length, nodes=length),
    )


class RunHistory:
    """What the rounds of a source came to in earlier runs: one `RoundAverages` for each.

    Args:
        priors: runs that it starts from.
    """

    def __init__(self, priors: Sequence[RoundAverages] = UNKNOWN_PRIORS) -> None:
        self._runs = tuple(priors)

    @property
    def runs(self) -> Sequence[RoundAverages]:
        return self._runs

    @property
    def mean(self) -> RoundAverages:
        return mean_averages(self._runs)

    def add(self, run: RoundAverages) -> None:
        with _adding:  # what another thread is reading stays as it is
            self._runs = (*self._runs, run)[-_REMEMBERED_RUNS:]


def mean_averages(averages: Iterable[RoundAverages]) -> RoundAverages:
    columns = zip(*((each.tokens, each.steps, each.nodes) for each in averages), strict=True)
    tokens, steps, nodes = (sum(column) / len(column) for column in columns)
    return RoundAverages(tokens=tokens, steps=steps, nodes=nodes)


class RunAverages:
    """What the rounds of a source come to in this run, starting from those of others."""

    def __init__(self, history: RunHistory):
        self._history = history
        self._prior = history.mean
        self._rounds = self._tokens = self._steps = self._nodes = 0.0
        self.num_rounds = 0

    def update(self, tokens: float, steps: float, nodes: float) -> None:
        """A round of this source, for a row."""
        self.num_rounds += 1
        self._rounds = self._rounds * _RUN_DECAY + 1
        self._tokens = self._tokens * _RUN_DECAY + tokens
        self._steps = self._steps * _RUN_DECAY + steps
        self._nodes = self._nodes * _RUN_DECAY + nodes

    @property
    def now(self) -> RoundAverages:
        prior, weight = self._prior, self._rounds + _RUN_ROUNDS
        return RoundAverages(
            tokens=(self._tokens + _RUN_ROUNDS * prior.tokens) / weight,
            steps=(self._steps + _RUN_ROUNDS * prior.steps) / weight,
            nodes=(self._nodes + _RUN_ROUNDS * prior.nodes) / weight,
        )

    def close(self) -> None:
        """The run is over: remember it."""
        if self.num_rounds:
            self._history.add(self.now)


class Probes:
    """When a source that is not worth it is tried all the same, because things may have changed.

    The more often it has failed, the later; and never so often that the loss that is expected of it comes to more than
    1 % of the time.
    """

    def __init__(self) -> None:
        self._wait = _FIRST_PROBE
        self._left = _FIRST_PROBE

    @property
    def is_due(self) -> bool:
        return self._left <= 0

    def chosen(self, *, as_probe: bool) -> None:
        """The source drafts: for its worth, or to be tried."""
        self._wait = min(2 * self._wait, _LAST_PROBE) if as_probe else _FIRST_PROBE
        self._left = self._wait

    def passed_over(self) -> None:
        self._left -= 1


class RoundControl(Generic[SourceT]):
    """Chooses what every round of one run does."""

    def __init__(self) -> None:
        self.throughput = Throughput()
        self._probes: defaultdict[SourceT, Probes] = defaultdict(Probes)
        self.elapsed_seconds = 0.0
        self._probed_seconds = 0.0
        self._since_plain = 0

    def choose(
        self, plain: Plan[SourceT], plans: Sequence[Plan[SourceT]], trials: Sequence[Plan[SourceT]] = ()
    ) -> Plan[SourceT]:
        """The plan that is worth most, or one that is due to be tried.

        Args:
            trials: those of the plans whose sources show only by drafting what they are worth.
        """
        self._since_plain += 1
        if self._since_plain > _PLAIN_EVERY:
            return plain
        throughput = capped_throughput(self.throughput.now(plain), [plain, *plans])
        best = max([plain, *plans], key=lambda plan: plan.worth(throughput))
        for trial in trials:
            assert trial.source is not None
            probes = self._probes[trial.source]
            if trial.source == best.source:
                probes.chosen(as_probe=False)
                continue
            probes.passed_over()
            loss = (best.worth(throughput) - trial.worth(throughput)) / throughput
            if probes.is_due and self._probed_seconds + loss <= _PROBE_SHARE * self.elapsed_seconds:
                self._probed_seconds += loss
                probes.chosen(as_probe=True)
                return trial
        return best

    def update(self, plan: Plan[SourceT], tokens: int, seconds: float) -> None:
        """A round is over: this plan was carried out, and took so many seconds."""
        self.elapsed_seconds += seconds
        self.throughput.update(tokens, min(seconds, _LONGEST_ROUND * plan.seconds))
        if plan.source is None:
            self._since_plain = 0
