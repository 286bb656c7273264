"""Where the rows of a routed run stop, and where they pause because a step is over or has to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import StoppingCriteriaList

from routers import Segmenter
from specdec.decoding.sequences import Sequences
from specdec.decoding.stopping import Scores, StopChecker


@dataclass(kw_only=True)
class _RowStep:
    """Where a row stands in its step.

    Args:
        start: number of its tokens before the step, without padding.
        in_fence: whether the step begins inside a code block.
        limit: number of the step's tokens at which to pause.
        is_over: it has come to its end.
        is_last: and the text with it.
        writing: it is being written now.
    """

    start: int
    in_fence: bool = False
    limit: int = 0
    is_over: bool = False
    is_last: bool = False
    writing: bool = False


class StepStop(StopChecker):
    """Stops rows where plain decoding would, and pauses them where their step ends.

    Args:
        lengths: number of each row's tokens, without padding.
    """

    def __init__(self, criteria: StoppingCriteriaList, segmenter: Segmenter, lengths: Sequence[int]):
        super().__init__(criteria)
        self.steps = [_RowStep(start=length) for length in lengths]
        self._prompt_lengths = list(lengths)
        self._segmenter = segmenter

    @property
    def writing(self) -> list[int]:
        """The rows that write now."""
        return [row for row, step in enumerate(self.steps) if step.writing]

    def begin_step(self, row: int, tokens: Sequence[int]) -> None:
        """A row's next step begins at the end of its tokens."""
        in_fence = self._segmenter.in_fence_after(tokens[self._prompt_lengths[row] :], False)
        self.steps[row] = _RowStep(start=len(tokens), in_fence=in_fence)

    def go_on(self, row: int, num_written: int, limit: int) -> None:
        """Let a row write until its step, of which some tokens stand there, is over or has so many."""
        step = self.steps[row]
        step.limit = limit
        step.writing = not step.is_over and num_written < limit

    def ends(self, row: int, written: Sequence[int], new: Sequence[int]) -> bool:
        """Whether a row's step, of which some tokens are written, comes to its end in new ones."""
        return self._end(self.steps[row], written, new) is not None

    def cut(
        self, sequences: Sequences, candidates: Sequence[Sequence[int]], scores_of: Callable[[int], Scores]
    ) -> tuple[list[int], list[bool]]:
        """As `StopChecker.cut`; rows that pause count as stopped, and rows that do not write have no candidates."""
        counts, stopped = super().cut(sequences, candidates, scores_of)
        for row, step in enumerate(self.steps):
            if step.writing:
                written = sequences.tokens[row][step.start :]
                skipped = max(0, step.start - len(sequences.tokens[row]))  # of whole steps before it
                new = candidates[row][skipped : counts[row]]
                count, stopped[row] = self._cut_step(step, written, new, stopped[row])
                counts[row] = skipped + count
        return counts, stopped

    def _cut_step(self, step: _RowStep, written: Sequence[int], new: Sequence[int], is_last: bool) -> tuple[int, bool]:
        end = self._end(step, written, new)
        if end is not None and end < len(written) + len(new):
            is_last = False
        count = len(new) if end is None else end - len(written)
        if count > step.limit - len(written):
            return step.limit - len(written), True
        step.is_over, step.is_last = end is not None or is_last, is_last
        return count, step.is_over or count == step.limit - len(written)

    def _end(self, step: _RowStep, written: Sequence[int], new: Sequence[int]) -> int | None:
        return self._segmenter.end([*written, *new], in_fence=step.in_fence, known=len(written))

    def select_rows(self, rows: Sequence[int]) -> None:
        self.steps = [self.steps[row] for row in rows]
        self._prompt_lengths = [self._prompt_lengths[row] for row in rows]
