"""A file of prompts through a pool of workers, into a journal: in order, a window at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from specdec.batch.journal import Journal
from specdec.batch.lines import Job, Line, Settings, parse, read_lines
from specdec.batch.worker import Answer, Pending
from specdec.errors import BatchError


class Pool(Protocol):
    """Who answers: a `Worker` in this process, or workers elsewhere.

    Attributes:
        window: jobs that it wants in hand.
    """

    window: int

    def begin(self, job: Job) -> Pending:
        """Take a job. Raises nothing because of it: a job that cannot be answered is finished at once."""

    def wait(self) -> None:
        """Go on until something may have been finished."""

    def close(self) -> None:
        """Drop what is under way, and let everything go."""


@dataclass(slots=True, kw_only=True)
class BatchProgress:
    """How far a job is; at its end, the summary.

    Attributes:
        num_lines: answered in this run.
        num_errors: that could not be.
        num_skipped: that earlier runs had finished.
        num_prompt_tokens, num_tokens: read and written in this run.
        num_rounds, num_drafted, num_accepted: of speculation.
        end: bytes of the input up to the end of the last line that is done.
        num_bytes: of the input.
        seconds: since this run began to answer.
    """

    num_lines: int = 0
    num_errors: int = 0
    num_skipped: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    end: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def note(self, answer: Answer) -> None:
        self.num_prompt_tokens += answer.num_prompt_tokens
        self.num_tokens += answer.num_tokens
        self.num_rounds += answer.num_rounds
        self.num_drafted += answer.num_drafted
        self.num_accepted += answer.num_accepted


def run_batch(
    source: Path,
    output: Path,
    make_pool: Callable[[], Pool],
    settings: Settings,
    *,
    made_with: object = "",
    on_progress: Callable[[BatchProgress], None] = lambda progress: None,
) -> BatchProgress:
    """Answer every line of a file that has not been answered yet.

    Results are appended in the order of the input; a process that is killed loses the lines of its window at most, and
    the same call goes on after those that are written. The input is read as it is needed.

    Args:
        source: lines of JSON (see `lines.parse`).
        output: see `Journal`.
        make_pool: called once, if there is anything to do.
        settings: the defaults of every line.
        made_with: what else the answers depend on (the model); a run with another one is not mixed with this.
        on_progress: called whenever lines were finished.

    Raises:
        BatchError: the output belongs to something else, or the input has changed since.
        ValueError: the input cannot be read.
    """
    if not source.is_file():
        raise ValueError(f"there is no file {source}")
    if output.exists() and output.samefile(source):
        raise ValueError(f"{source} is the input, and cannot be the output too: give another one")
    progress = BatchProgress(num_bytes=source.stat().st_size)
    with Journal(output, settings.digest(made_with)) as journal, source.open("rb") as file:
        todo = _todo(read_lines(file), journal, progress)
        first = next(todo, None)
        if first is not None:
            pool = make_pool()
            try:
                _Run(journal, pool, settings, progress, on_progress).through(first, todo)
            finally:
                pool.close()
    return progress


def _todo(lines: Iterator[Line], journal: Journal, progress: BatchProgress) -> Iterator[Line]:
    for line in lines:
        if journal.has(line):
            progress.num_skipped += 1
            progress.end = max(progress.end, line.end)
        else:
            yield line
    if progress.num_skipped < journal.num_done:
        raise BatchError(
            f"{journal.output} holds {journal.num_done} lines and the input has only {progress.num_skipped} of them: "
            "it has changed since. Give another output"
        )


class _Run:
    """The lines in hand: from the first one that is not written yet to the last one that was taken."""

    def __init__(
        self,
        journal: Journal,
        pool: Pool,
        settings: Settings,
        progress: BatchProgress,
        on_progress: Callable[[BatchProgress], None],
    ):
        self._journal = journal
        self._pool = pool
        self._settings = settings
        self._progress = progress
        self._on_progress = on_progress
        self._window: deque[tuple[Line, Pending | BatchError]] = deque()
        self._started = perf_counter()

    def through(self, first: Line, todo: Iterator[Line]) -> None:
        lines = chain([first], todo)
        while self._fill(lines):
            if not self._write_finished():
                self._pool.wait()

    def _fill(self, lines: Iterator[Line]) -> bool:
        """Take lines while there is room; whether there is anything left to do."""
        while len(self._window) < self._pool.window and (line := next(lines, None)) is not None:
            self._take(line)
        return bool(self._window)

    def _take(self, line: Line) -> None:
        try:
            self._window.append((line, self._pool.begin(parse(line, self._settings))))
        except BatchError as error:
            self._window.append((line, error))

    def _write_finished(self) -> bool:
        """Write the lines at the head of the window that are finished; whether there were any."""
        num_written = 0
        while self._window and _is_finished(self._window[0][1]):
            self._write(*self._window.popleft())
            num_written += 1
        if num_written:
            self._progress.seconds = perf_counter() - self._started
            self._on_progress(self._progress)
        return bool(num_written)

    def _write(self, line: Line, outcome: Pending | BatchError) -> None:
        progress = self._progress
        answer = None if isinstance(outcome, BatchError) else outcome.answer
        if answer is None or answer.error is not None:
            reason = str(outcome) if answer is None else answer.error
            self._journal.write_error(line, reason or "no reason")
            progress.num_errors += 1
        else:
            assert isinstance(outcome, Pending)
            self._journal.write(line, _result(outcome.job, answer))
            progress.num_lines += 1
            progress.note(answer)
        progress.end = max(progress.end, line.end)


def _is_finished(outcome: Pending | BatchError) -> bool:
    return isinstance(outcome, BatchError) or outcome.answer is not None


def _result(job: Job, answer: Answer) -> dict[str, Any]:
    own = {} if job.id is None else {"id": job.id}
    return {
        **own,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
    }
