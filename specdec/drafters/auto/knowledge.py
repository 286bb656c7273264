"""What runs on a target have shown of the drafters that `Auto` chooses among; it outlives them.

Runs of several threads may read it, and add to it, at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

from specdec.control import LEAF_EDGES, AcceptanceMemory, ForwardCosts, RunHistory, StepSeconds, prior_averages
from specdec.decoding.drafter import Drafter, Run
from specdec.kernels.model.profile import profile_of

_BIAS_TOKENS = 16.0
"""Tokens that full trust in proposals is worth at first."""
_BIAS_DECAY = 0.98
_TRIAL_SHARE = 0.04
"""Of the time of the runs without a drafter may go into trying it again; halved for each run in a row in
which it did not pay."""
_MOST_FAILURES = 5


@dataclass(eq=False)
class SelectionBias:
    """Corrects the winner's curse: the proposal that is chosen as the best is overestimated on average.

    Where nothing is chosen, it goes back to full trust bit by bit.
    """

    promised: float = _BIAS_TOKENS
    kept: float = _BIAS_TOKENS

    @property
    def share(self) -> float:
        return min(self.kept / self.promised, 1.0)

    def update(self, promised: float, kept: float) -> None:
        """Drafted tokens of a round that were expected to be accepted, and that were."""
        self.promised = _BIAS_DECAY * self.promised + promised
        self.kept = _BIAS_DECAY * self.kept + kept

    def passed_over(self) -> None:
        self.promised += (1 - _BIAS_DECAY) * (_BIAS_TOKENS - self.promised)
        self.kept += (1 - _BIAS_DECAY) * (_BIAS_TOKENS - self.kept)


@dataclass(eq=False)
class Known:
    """What runs on a target have shown of a drafter."""

    acceptance: AcceptanceMemory
    history: RunHistory
    leaves: dict[bool, AcceptanceMemory] = field(default_factory=dict)
    """Acceptance of the leaves beside a chain, by whether they were drawn."""
    selection_bias: dict[int, SelectionBias] = field(default_factory=dict)
    """Selection bias of proposals, by number of rows."""
    steps: dict[int, ForwardCosts] = field(default_factory=dict)
    """Of drafters without a model of their own, by rows."""
    later_steps: dict[int, StepSeconds] = field(default_factory=dict)
    """By rows."""
    failures: int = 0
    """Runs in a row in which it was at work and did not pay."""
    seconds_without: float = 0.0
    """Of the runs since then, in which it was not at work."""

    @classmethod
    def initial(cls, drafter: Drafter) -> Known:
        """Before any run has shown anything."""
        acceptance = AcceptanceMemory(prior_acceptance=drafter.prior_acceptance)
        return cls(acceptance=acceptance, history=RunHistory(prior_averages(drafter.prior_acceptance)))

    def bias_at(self, num_rows: int) -> SelectionBias:
        return self.selection_bias.setdefault(num_rows, SelectionBias())

    def leaves_when(self, drawn: bool) -> AcceptanceMemory:
        return self.leaves.setdefault(drawn, AcceptanceMemory(LEAF_EDGES))

    def update_run(self, pays: bool | None, elapsed_seconds: float) -> None:
        """pays: None for a run in which it was not at work."""
        with _noting:
            if pays is None:
                self.seconds_without += elapsed_seconds
            else:
                self.seconds_without, self.failures = 0.0, 0 if pays else self.failures + 1

    def trial_seconds(self) -> float:
        """What may be lost by beginning with it all the same."""
        return _TRIAL_SHARE * self.seconds_without / 2 ** min(self.failures, _MOST_FAILURES)


_noting = Lock()


class Knowledge(dict[object, Known]):
    """Of a target, by the kinds of a drafter and of what it makes quicker, and its model."""


def known_of(run: Run, drafter: Drafter) -> Known:
    model = getattr(drafter, "model", None)
    key = type(drafter), type(getattr(drafter, "middle", None)), None if model is None else id(model)
    return profile_of(run.target.model).part(Knowledge).setdefault(key, Known.initial(drafter))
