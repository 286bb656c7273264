"""Which exit drafts, as the paper has it: DEL (arXiv 2504.05598), tokens per layer.

Shape legend: E candidate exits, D draft lengths; S is agreed, disagreed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.decoding.drafter import Outcome
from specdec.drafters.early_exit.rule import ExitChoice, ExitRule, reached_slots
from specdec.drafters.early_exit.shadows import Seen, ShadowTokens
from trees import ConfidentChain, Draft

Array = NDArray[np.float64]

_DECAY = 0.95
"""What older statistics still count for after another round."""
_NUM_LENGTHS = 18
"""Lengths that are compared: 0 to 17 drafted tokens."""


class TokensPerLayer(ExitRule):
    """DEL's objective: expected tokens of a round over the layers that it runs.

    With acceptance a, exit layer l and length d these are (1 - a^(d+1)) / (1 - a) over d l + L. Ties go to the lowest
    layer, then to the shortest length. As in the paper's code the maximum sets the exit only: the draft ends at the
    first token whose probability lies below a threshold, halfway between the mean confidences of right and of wrong
    tokens, or at `max_length`. It is never empty, and the first round is one token from the first candidate. The rows
    of a batch count as one.

    Args:
        exits: candidate layers, increasing. The paper's are all but the last.
        num_layers: L, of the target.
        max_length: most tokens to draft; the paper's is 18.
        shadows: compare the exits with the target; None learns only from what became of their drafts.
    """

    def __init__(
        self, exits: Sequence[int], *, num_layers: int, max_length: int = 18, shadows: ShadowTokens | None = None
    ):
        self._exits = tuple(exits)
        self._num_layers = num_layers
        self._max_length = max_length
        self._shadows = shadows
        self._counts_SE = np.zeros((2, len(exits)))
        self._confidence_SE = np.zeros((2, len(exits)))
        self._is_first_round = True
        self._choice: ExitChoice | None = None

    @property
    def acceptance_E(self) -> Array:
        """Share of tokens that each exit would have drafted (alpha); 0 where none were seen."""
        return _ratio(self._counts_SE[0], self._counts_SE.sum(0))

    @property
    def midpoint_E(self) -> Array:
        """The threshold (tau). 0, which never ends a draft, where there were no right or no wrong tokens: the
        reference's NaN does the same."""
        means_SE = _ratio(self._confidence_SE, self._counts_SE)
        return np.where((self._counts_SE > 0).all(0), means_SE.mean(0), 0.0)

    def seed(self, seen: Iterable[Seen]) -> None:
        """Learn from the prompt: it counts as a part of the first round."""
        for exit_layer, confidences, agreements in seen:
            index = self._exits.index(exit_layer)
            weights_ST = np.stack([agreements, 1 - np.asarray(agreements)])
            self._counts_SE[:, index] += weights_ST.sum(1)
            self._confidence_SE[:, index] += (weights_ST * np.asarray(confidences)).sum(1)

    def observe(self, seen: Iterable[Seen]) -> None:
        """Learn from a round: from its slots up to the first one whose draft was refused, that one included."""
        if not self._is_first_round:
            self._counts_SE *= _DECAY
            self._confidence_SE *= _DECAY
        self._is_first_round = False
        self.seed(seen)

    def choose(self, max_depths: Sequence[int]) -> ExitChoice | None:
        self._choice = self._best(min(max(max_depths), self._max_length)) if max(max_depths) else None
        if self._shadows is not None:
            self._shadows.prepare(self._exits[0] if self._choice is None else self._choice.exit_layer)
        return self._choice

    def _best(self, longest: int) -> ExitChoice:
        if self._is_first_round:
            return ExitChoice(self._exits[0], ConfidentChain(1, threshold=0.0))
        index = int(self._tokens_per_layer_ED().argmax()) // _NUM_LENGTHS
        return ExitChoice(self._exits[index], ConfidentChain(longest, threshold=float(self.midpoint_E[index])))

    def _tokens_per_layer_ED(self) -> Array:
        tokens_DE = np.ones((_NUM_LENGTHS, len(self._exits)))
        for shorter_E, tokens_E in pairwise(tokens_DE):
            tokens_E += self.acceptance_E * shorter_E
        return tokens_DE.T / (np.outer(self._exits, np.arange(_NUM_LENGTHS)) + self._num_layers)

    def begin(self) -> None:
        if self._shadows is not None:
            self.seed(self._shadows.seed())

    def learn(self, draft: Draft, outcome: Outcome, slots: Sequence[Sequence[int]]) -> None:
        seen = [] if self._shadows is None else list(self._shadows.compare(slots, outcome))
        if not seen and self._choice is not None:
            seen = [_own(self._choice.exit_layer, draft, outcome)]
        self.observe(seen)

    @property
    def control_seconds(self) -> float:
        return 0.0 if self._shadows is None else self._shadows.seconds

    def explain(self) -> dict[str, Any]:
        chain = None if self._choice is None else self._choice.policy
        return {
            "exit_layer": None if self._choice is None else self._choice.exit_layer,
            "length": chain.length if isinstance(chain, ConfidentChain) else 0,
            "threshold": chain.threshold if isinstance(chain, ConfidentChain) else 0.0,
            "acceptance": dict(zip(self._exits, self.acceptance_E.tolist(), strict=True)),
        }


def _own(exit_layer: int, draft: Draft, outcome: Outcome) -> Seen:
    """What became of an exit's own draft."""
    tests = list(reached_slots(draft.trees, outcome.own_paths))
    confidences = [test.probs[0] for test in tests]
    return Seen(exit_layer, confidences, [float(test.accepted == 0) for test in tests])


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
