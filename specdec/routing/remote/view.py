"""What a router may ask of a target that is an endpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from routers import DraftedStep
from specdec.errors import EndpointError
from specdec.routing.remote.endpoint import WrittenToken
from specdec.routing.remote.writer import RemoteWriter
from specdec.routing.view import written


class RemoteView:
    """The `routers.TargetView` of one decision, where the target is an endpoint.

    Args:
        writer: the target's.
        writer_rows: row of the caller's batch -> row of the writer's.
        ask: token ids of a question and of the opening of its answer, as they follow a step.
        write: makes the target write the steps of these of its rows.
    """

    def __init__(
        self,
        writer: RemoteWriter,
        writer_rows: Mapping[int, int],
        *,
        ask: Callable[[str, str], list[int]],
        write: Callable[[Mapping[int, Sequence[int]]], None],
    ):
        self._writer, self._writer_rows, self._ask, self._write = writer, writer_rows, ask, write
        self._before = writer.stats.verify_seconds
        self.written: set[int] = set()
        """Rows whose step the target has written."""

    @property
    def seconds(self) -> float:
        """Spent on the target's work."""
        return self._writer.stats.verify_seconds - self._before

    def commit_scored(self, kept: Mapping[int, Sequence[Sequence[int]]], cut: Collection[int]) -> Collection[int]:
        """A server keeps no state of ours."""
        return ()

    def log_probs(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps and all(self._writer_rows[step.row] in self.written for step in steps):
            return [step.signals.log_probs for step in steps]
        return self._each(steps, lambda step: np.array([token.log_prob for token in self._scored(step)], np.float32))

    def regrets(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps and all(self._writer_rows[step.row] in self.written for step in steps):
            return [np.zeros(len(step.tokens), np.float32) for step in steps]
        return self._each(steps, self._regrets)

    def answers(
        self, steps: Sequence[DraftedStep], question: str, opening: str, choices: Sequence[str]
    ) -> list[np.ndarray]:
        """As of `routers.TargetView`; NaN where no choice is among the alternatives that the server lists."""
        asked = self._ask(question, opening)
        return self._each(steps, lambda step: self._chosen(step, asked, choices))

    def write(self, steps: Sequence[DraftedStep]) -> list[DraftedStep]:
        rows = {self._writer_rows[step.row]: step.tokens for step in steps}
        self._write(rows)
        self.written.update(rows)
        return [written(self._writer, row, step) for row, step in zip(rows, steps, strict=True)]

    def _each(self, steps: Sequence[DraftedStep], function: Callable[[DraftedStep], np.ndarray]) -> list[np.ndarray]:
        self._writer.num_requests += len(steps)
        return self._writer.each(lambda index: function(steps[index]), range(len(steps)))

    def _scored(self, step: DraftedStep) -> list[WrittenToken]:
        return self._writer.endpoint.scored_prompt([*self._text(step), *step.tokens], len(step.tokens))

    def _regrets(self, step: DraftedStep) -> np.ndarray:
        scored = self._scored(step)
        if not all(token.alternatives for token in scored):
            raise EndpointError(self._writer.endpoint, "it names no likelier tokens in place of those of a given text")
        best = [max(other.log_prob for other in token.alternatives) for token in scored]
        own = np.array([token.log_prob for token in scored], np.float32)
        return np.maximum(np.array(best, np.float32) - own, 0)

    def _chosen(self, step: DraftedStep, asked: Sequence[int], choices: Sequence[str]) -> np.ndarray:
        prompt = self._writer.prompt([*self._text(step), *step.tokens, *asked])
        listed = self._writer.endpoint.first_alternatives(prompt)
        chances = {other.text: math.exp(other.log_prob) for other in listed}
        found = np.array([chances.get(choice, 0.0) for choice in choices], np.float32)
        return found / found.sum() if found.any() else np.full(len(choices), np.nan, np.float32)

    def _text(self, step: DraftedStep) -> list[int]:
        return [*step.prompt, *(token for previous in step.previous for token in previous)]
