"""A file of prompts through a pool of workers, into a journal: in order, a window at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from specdec.batch.journal import Journal, errors_path, told
from specdec.batch.lines import Job, Line, LineId, Settings, parse, read_lines
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
        BatchError: the output belongs to something else, the input has changed since, or a file cannot be read or
            written (a full disk). What is written stays, and the same call goes on from there.
        ValueError: there is no such input.
        WorkerError: the model has failed.
    """
    _check_input(source, output)
    progress = BatchProgress(num_bytes=source.stat().st_size)
    with Journal(output, settings.digest(made_with)) as journal:
        todo = _todo(_lines_of(source), journal, progress)
        first = next(todo, None)
        if first is not None:
            pool = make_pool()
            try:
                _Run(journal, pool, settings, progress, on_progress).through(first, todo)
            finally:
                pool.close()
    return progress


def _check_input(source: Path, output: Path) -> None:
    if not source.exists():
        raise ValueError(f"there is no file {source}")
    if not source.is_file():
        raise ValueError(f"{source} is no file, so that a job could not read it again to go on where it was: give one")
    for path in (output, errors_path(output)):
        if path.exists() and path.samefile(source):
            raise ValueError(f"{source} is the input, and cannot be written to as well: give another output")


def _lines_of(source: Path) -> Iterator[Line]:
    with told(source, "read"), source.open("rb") as file:
        yield from read_lines(file)


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


class _Taken(NamedTuple):
    """A line in hand, without its text, and what has become of it."""

    line: Line
    id: LineId | None
    outcome: Pending | Answer

    @property
    def answer(self) -> Answer | None:
        return self.outcome if isinstance(self.outcome, Answer) else self.outcome.answer


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
        self._window: deque[_Taken] = deque()
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
        own_id: LineId | None = None
        outcome: Pending | Answer
        try:
            job = parse(line, self._settings)
        except BatchError as error:
            outcome = Answer(text=None, finish_reason="error", error=str(error))
        else:
            pending, own_id = self._pool.begin(job), job.id
            outcome = pending.answer or pending  # what is refused at once may be long: its job is let go
        self._window.append(_Taken(line._replace(text=None), own_id, outcome))

    def _write_finished(self) -> bool:
        """Write the lines at the head of the window that are finished; whether there were any."""
        num_written = 0
        while self._window and (answer := self._window[0].answer) is not None:
            taken = self._window.popleft()
            self._write(taken.line, taken.id, answer)
            num_written += 1
        if num_written:
            self._progress.seconds = perf_counter() - self._started
            self._on_progress(self._progress)
        return bool(num_written)

    def _write(self, line: Line, own_id: LineId | None, answer: Answer) -> None:
        progress = self._progress
        if answer.error is not None:
            self._journal.write_error(line, answer.error)
            progress.num_errors += 1
        else:
            self._journal.write(line, _result(own_id, answer))
            progress.num_lines += 1
            progress.note(answer)
        progress.end = max(progress.end, line.end)


def _result(own_id: LineId | None, answer: Answer) -> dict[str, Any]:
    own = {} if own_id is None else {"id": own_id}
    return {
        **own,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
    }
