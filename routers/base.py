"""The contract of a router, which decides which model writes the next step.

A `Router` sees drafted steps with what is already known of them, may ask the target about them, and answers with a
`Decision` each. It knows tokens, texts and numbers; models and caches are behind `TargetView`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import numpy as np

from routers.steps import Steps

Writer: TypeAlias = Literal["draft", "target"]
Need: TypeAlias = Literal["signals", "hidden", "log_probs", "answers"]
"""What a router reads besides texts: the draft's `Signals`, hidden states among them, or the target's answers to
`TargetView.log_probs`, `regrets` (both need "log_probs") and `answers`. Models that run here give all of it, remote
ones some or none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """What the model that wrote a step thought at each of its n tokens, of the distribution before any processor.

    Args:
        log_probs: float32 [n] log-probability of the token.
        entropies: float32 [n], in nats.
        margins: float32 [n] probability of the likeliest token less that of the second.
        hidden: float32 [C] last hidden state (before the final norm) from which the last token was chosen.
    """

    log_probs: np.ndarray
    entropies: np.ndarray
    margins: np.ndarray
    hidden: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftedStep:
    """A step that could follow a row's text.

    Args:
        row: index in the caller's batch.
        prompt: token ids, without padding.
        previous: token ids of each committed step.
        writers: who wrote each of them.
        tokens: of this step, the separator included. May still be growing when a router is asked early.
        signals: of the model that wrote it.
        is_last: whether the text ends with it.
        decode: token ids to text.
    """

    row: int
    prompt: Sequence[int]
    previous: Sequence[Sequence[int]]
    writers: Sequence[Writer]
    tokens: Sequence[int]
    signals: Signals
    is_last: bool
    decode: Callable[[Sequence[int]], str]

    @property
    def index(self) -> int:
        """Number of steps before it."""
        return len(self.previous)

    @cached_property
    def text(self) -> str:
        return self.decode(self.tokens)

    @cached_property
    def prompt_text(self) -> str:
        return self.decode(self.prompt)

    @cached_property
    def previous_texts(self) -> list[str]:
        return [self.decode(tokens) for tokens in self.previous]


class TargetView(Protocol):
    """What a router may ask of the target about steps that it was given. Each question costs a forward, or more."""

    def log_probs(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        """log p_target of every token of each step, float32 [n]: one verification of all of them.

        If the target then writes the step, or the step is kept, nothing of that forward is lost.
        """

    def regrets(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        """By how much log p_target of the likeliest token exceeds that of the step's, at every token: float32 [n].

        The same verification as that of `log_probs`. A step that the target has written has no regrets.
        """

    def answers(
        self, steps: Sequence[DraftedStep], question: str, opening: str, choices: Sequence[str]
    ) -> list[np.ndarray]:
        """The target's next-token probabilities of single-token answers after text, step and question.

        Args:
            question: asked in a turn of the user if the tokenizer has a chat template.
            opening: of the answer, up to the choice.

        Returns:
            For each step float32 [choices], renormalised over them.
        """

    def write(self, steps: Sequence[DraftedStep]) -> list[DraftedStep]:
        """The target's own step in place of each. If the router escalates, it is the one that is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A verdict on one step.

    Args:
        escalate: whether the target writes the step.
        score: what the router decided on; None if it did not need one.
        reason: in a word, for the statistics.
    """

    escalate: bool
    score: float | None = None
    reason: str = ""


class Router(ABC):
    """Decides, step by step, whether a drafted step stays or the target writes it. Lossy by design.

    One instance may serve many calls; one that holds an escalation rate holds it over all of them.

    Attributes:
        steps: what counts as a step.
        peek: number of drafted tokens after which `decide_early` is asked (0: before anything is drafted); None
            leaves that out.
        peek_every: after how many more it is asked again, and again, until it decides or the step is over; None asks
            once.
        lookahead: steps that the draft writes in a row before they are judged; what the target is asked about them is
            then one forward. They are judged in order, and the first one that is escalated cuts the rest, so that
            nothing but the time depends on it (with `shares_cache` also who has read what). Where a writer is remote,
            steps are judged one by one.
        shares_cache: whether draft and target work on one key-value cache: for a draft that is a copy of the target;
            models of other layers are refused. Then neither reads what the other has read: it is quicker, and the
            target's own steps follow from what the copy made of the kept ones. A step is then no function of the text
            before it.
        judges_together: whether steps wait to be judged until the draft has written one in every row that is its: for
            routers that have the target write, which is cheaper for many rows at once.
        needs: what it cannot decide without. Hidden states, and the signals of a remote draft, are there only where
            they are named; where a model cannot give what is named, the call is refused.
    """

    steps: Steps = Steps()
    peek: int | None = None
    peek_every: int | None = None
    lookahead: int = 1
    shares_cache: bool = False
    judges_together: bool = False
    needs: frozenset[Need] = frozenset()

    @abstractmethod
    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        """Judge one finished step of each of some rows."""

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        """Judge steps by their first tokens; None leaves the judgement to the next look, in the end to `decide`."""
        return [None] * len(steps)


class Scorer(Protocol):
    """Puts a number on drafted steps; what it means is up to the router that asks.

    It may have `needs`, as a router has.
    """

    def score(self, steps: Sequence[DraftedStep], target: TargetView) -> Sequence[float]:
        """One number a step; NaN where there is none."""


class Reward(Protocol):
    """Says how good steps are, whoever wrote them. It may have `needs`, as a router has."""

    def rewards(self, steps: Sequence[DraftedStep], target: TargetView) -> Sequence[float]:
        """One number a step, the better the higher, 0 to 1 unless it says otherwise; NaN where there is none."""


def needs_of(judge: Scorer | Reward) -> frozenset[Need]:
    """What a scorer or a reward cannot do without; nothing if it does not say."""
    return frozenset(getattr(judge, "needs", ()))
