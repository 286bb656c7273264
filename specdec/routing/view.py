"""What a router may ask of the target: answered by its writer, on the cache it goes on with, or by its endpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from routers import DraftedStep
from specdec.routing.remote.writer import RemoteWriter
from specdec.routing.writer import StepWriter


class WriterView:
    """The `routers.TargetView` of one decision.

    Args:
        writer: the target's.
        writer_rows: row of the caller's batch -> row of the writer's.
        chains: row of the writer's -> tokens of all the steps that are to be judged in it, one after the other.
        ask: token ids of a question and of the opening of its answer, as they follow a step.
        token_of: the id of an answer's text.
        write: makes the target write the steps of these of its rows.
    """

    def __init__(
        self,
        writer: StepWriter,
        writer_rows: Mapping[int, int],
        chains: Mapping[int, Sequence[int]],
        *,
        ask: Callable[[str, str], list[int]],
        token_of: Callable[[str], int],
        write: Callable[[Mapping[int, Sequence[int]]], None],
    ):
        self._writer = writer
        self._writer_rows = writer_rows
        self._chains = chains
        self._ask = ask
        self._token_of = token_of
        self._write = write
        self._scored: dict[int, Sequence[int]] = {}
        self._logits_of: dict[int, Tensor] = {}
        self.written: set[int] = set()
        """Rows whose step the target has written."""

        self.seconds = 0.0
        """Spent on the target's work."""

    def commit_scored(self, kept: Mapping[int, Sequence[Sequence[int]]], cut: Collection[int]) -> Collection[int]:
        """Commit what the target has verified: kept steps as they are, after them and elsewhere as far as it agrees.

        Args:
            kept: row -> the first steps of its chain.
            cut: rows in which the next step is the target's.

        Returns:
            The rows that were verified.
        """
        scored = set(self._scored)
        if scored:
            known = {row: steps for row, steps in kept.items() if row in scored}
            self._writer.commit_scored(known, scored & set(cut))
            self._forget()
        return scored

    def log_probs(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps and all(self._writer_rows[step.row] in self.written for step in steps):
            return [step.signals.log_probs for step in steps]
        return [log_probs_of(logits_TV, step.tokens) for logits_TV, step in zip(self._read(steps), steps, strict=True)]

    def regrets(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps and all(self._writer_rows[step.row] in self.written for step in steps):
            return [np.zeros(len(step.tokens), np.float32) for step in steps]
        return [regrets_of(logits_TV, step.tokens) for logits_TV, step in zip(self._read(steps), steps, strict=True)]

    def answers(
        self, steps: Sequence[DraftedStep], question: str, opening: str, choices: Sequence[str]
    ) -> list[np.ndarray]:
        asked, ids = self._ask(question, opening), [self._token_of(choice) for choice in choices]
        chains = {}
        for step in steps:
            row, (_, end) = self._writer_rows[step.row], self._place(step)
            chains[row] = [*self._chains[row][:end], *asked]
        logits_of = self._score_drafts(chains)
        rows = [self._writer_rows[step.row] for step in steps]
        return [logits_of[row][len(chains[row]), ids].float().softmax(-1).cpu().numpy() for row in rows]

    def write(self, steps: Sequence[DraftedStep]) -> list[DraftedStep]:
        started = perf_counter()
        self._writer.wants_signals = True
        rows = {self._writer_rows[step.row]: step.tokens for step in steps}
        if set(self._scored) <= set(rows):
            self.commit_scored({}, ())
        else:
            self._writer.discard()
            self._forget()
        self._write(rows)
        self.written.update(rows)
        self.seconds += perf_counter() - started
        return [written(self._writer, row, step) for row, step in zip(rows, steps, strict=True)]

    def _read(self, steps: Sequence[DraftedStep]) -> list[Tensor]:
        """Logits [n, V] from which each step's tokens would be chosen."""
        rows = [self._writer_rows[step.row] for step in steps]
        logits_of = self._score_drafts({row: list(self._chains[row]) for row in rows})
        return [logits_of[row][slice(*self._place(step))] for row, step in zip(rows, steps, strict=True)]

    def _place(self, step: DraftedStep) -> tuple[int, int]:
        """Where a step begins and ends in its row's chain."""
        before = len(step.prompt) + sum(map(len, step.previous))
        start = before - len(self._writer.sequences.tokens[self._writer_rows[step.row]])
        return start, start + len(step.tokens)

    def _score_drafts(self, chains: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """row -> logits [T, V] of its chain; a forward unless they have just been scored."""
        known = all(
            row in self._scored and list(self._scored[row][: len(chain)]) == list(chain)
            for row, chain in chains.items()
        )
        if not known:
            started = perf_counter()
            self._writer.discard()
            self._scored = dict(chains)
            self._logits_of = self._writer.score_drafts(chains)
            self.seconds += perf_counter() - started
        return self._logits_of

    def _forget(self) -> None:
        self._scored, self._logits_of = {}, {}


def written(writer: StepWriter | RemoteWriter, row: int, step: DraftedStep) -> DraftedStep:
    """What the target has written in place of a drafted step, in a row of its own."""
    is_last = writer.stop.steps[row].is_last
    return replace(step, tokens=writer.step_tokens(row), signals=writer.step_signals(row), is_last=is_last)


def log_probs_of(logits_TV: Tensor, tokens: Sequence[int]) -> np.ndarray:
    """log p of each token at its slot: float32 [T]."""
    chosen_T1 = torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)
    return logits_TV.float().log_softmax(-1).gather(1, chosen_T1)[:, 0].cpu().numpy()


def regrets_of(logits_TV: Tensor, tokens: Sequence[int]) -> np.ndarray:
    """By how much log p of the likeliest token exceeds that of the given one, at each slot: float32 [T]."""
    chosen_T1 = torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)
    return (logits_TV.amax(-1) - logits_TV.gather(1, chosen_T1)[:, 0]).float().cpu().numpy()
