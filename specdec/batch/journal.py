"""The output as the record of what is done: append-only, so that a job that was broken off goes on where it was.

Each line of the input ends as one line of one of two files, the results or the errors. A line is there once it is
written to its end: of a process that is killed, the last line may be half there, and is cut off when it goes on.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from specdec.batch.lines import Line
from specdec.errors import BatchError

_SYNC_SECONDS = 1.0
"""A killed process loses nothing that is written; a machine that loses power, what was written in this time."""
_MAX_REASON = 1000
"""Characters of a reason: some repeat the value that is wrong, which may be long."""


def errors_path(output: Path) -> Path:
    """Where the lines of `output` that cannot be answered go."""
    return output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")


@contextmanager
def told(path: Path, done: str) -> Iterator[None]:
    """Tell why a file cannot be `done` ("read" or "written") as a BatchError, and that nothing is lost by it."""
    try:
        yield
    except OSError as error:
        raise BatchError(
            f"{path} cannot be {done}: {error.strerror or error}. What was answered before is kept: once this is "
            "mended, the same command goes on from there"
        ) from error


class Journal:
    """Results in `output`, lines that cannot be answered in `output` + ".errors.jsonl" (instead of ".jsonl").

    Takes 8 bytes of memory for a line that is done already.

    Args:
        output: the file of results; made if it is not there.
        settings: digest of everything besides the line that its answer depends on.

    Raises:
        BatchError: the files hold something else than results, those of other settings, cannot be read and written,
            or another process is writing them. Every method says so too when a disk is full.
    """

    def __init__(self, output: Path, settings: str):
        self.output = output
        self.errors = errors_path(output)
        self.num_done = 0
        """Lines that earlier runs have finished."""
        for path in (self.output, self.errors):
            _check_is_file(path)
        self._settings = settings
        self._digests = array("Q")
        self._lock = FileLock(output.with_name(f".{output.name}.lock"))
        with told(output, "written"):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise BatchError(f"another process is writing {output}: wait for it, or give another output") from error
        try:
            self._results, self._failures = _File(self.output), _File(self.errors)
            for file in (self._results, self._failures):
                for number, digest in file.read(settings):
                    self._remember(number, digest, file.path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            stack.callback(self._failures.close)
            stack.callback(self._results.close)

    def has(self, line: Line) -> bool:
        """Whether a line is done.

        Raises:
            BatchError: a line of this number is, but it was another one.
        """
        known = self._digests[line.number] if line.number < len(self._digests) else 0
        if known and known != _as_number(line.digest):
            raise BatchError(
                f"line {line.number} of the input has changed since {self.output} was begun: give another output, or "
                f"remove it together with {self.errors.name}"
            )
        return bool(known)

    def write(self, line: Line, result: Mapping[str, Any]) -> None:
        """A line's result."""
        self._results.append(self._document(line, result))

    def write_error(self, line: Line, reason: str) -> None:
        """Why there is none."""
        self._failures.append(self._document(line, {"error": _shortened(reason)}))

    def sync(self) -> None:
        """What is written survives a loss of power."""
        self._results.sync()
        self._failures.sync()

    def _document(self, line: Line, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"line": line.number, **fields, "digest": line.digest, "settings": self._settings}

    def _remember(self, number: int, digest: int, path: Path) -> None:
        if number >= len(self._digests):
            self._digests.extend([0] * (number + 1 - len(self._digests)))
        if self._digests[number]:
            raise BatchError(f"{path} has line {number} twice, which this program never writes: give another output")
        self._digests[number] = digest
        self.num_done += 1


class _File:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None
        self._synced = 0.0

    def read(self, settings: str) -> Iterator[tuple[int, int]]:
        """Line numbers and digests of what is there; a line of ours without an end is cut off, and no other."""
        if not self.path.exists():
            return
        with told(self.path, "read and written"), self.path.open("r+b") as file:
            end = 0
            for line_number, text in enumerate(file, start=1):
                if text.endswith(b"\n") or not _is_begun(text):
                    end += len(text)
                    yield self._entry(text, line_number, settings)
            file.truncate(end)

    def append(self, document: Mapping[str, Any]) -> None:
        text = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        with told(self.path, "written"):
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)  # a buffer would write again what could not be written
            while text:
                text = text[self._file.write(text) :]
        if monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._file is not None:
            with told(self.path, "written"):
                os.fsync(self._file.fileno())
            self._synced = monotonic()

    def close(self) -> None:
        file = self._file
        if file is not None:
            with told(self.path, "written"), file:
                self.sync()
            self._file = None

    def _entry(self, text: bytes, line_number: int, settings: str) -> tuple[int, int]:
        try:
            document = json.loads(text)
            number, digest, made_with = document["line"], _as_number(document["digest"]), document["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(
                f"line {line_number} of {self.path} was not written by this command: give another output"
            ) from error
        if made_with != settings:
            raise BatchError(
                f"{self.path} was begun with other options (model, weights or settings): repeat those, or give another "
                "output"
            )
        return number, digest


def _check_is_file(path: Path) -> None:
    """Raise a BatchError for a folder, a device or a pipe: none can be read again to go on where a job was."""
    with told(path, "read"):
        if path.exists() and not path.is_file():
            raise BatchError(
                f"{path} is no file, and cannot say later which lines are done: give the name of a file as the output"
            )


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}... ({len(reason)} characters)"


def _is_begun(text: bytes) -> bool:
    """Whether this may be the beginning of a line that this program writes, or what a loss of power leaves of it."""
    opening = b'{"line": '
    return text.startswith(opening[: len(text)]) or not text.strip(b"\0")


def _as_number(digest: str) -> int:
    return int(digest, 16) or 1
