"""Where the user's lines come from: a terminal with history and completion, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.utils import is_dumb_terminal

PROMPT = "> "
_CONTINUATION = "  "

Candidates = Iterable[tuple[str, str]]
"""What can stand next, each with its meaning."""


_QUOTES = '"""'


def is_open(text: str) -> bool:
    """Whether a text begins with three quotes and does not end with three others yet."""
    start = text.strip()
    return start.startswith(_QUOTES) and (len(start) < 2 * len(_QUOTES) or not start.endswith(_QUOTES))


def unquoted(text: str) -> str:
    """What was typed, stripped, without the three quotes around it."""
    stripped = text.strip()
    if stripped.startswith(_QUOTES) and not is_open(stripped):
        stripped = stripped[len(_QUOTES) : -len(_QUOTES)].strip()
    return stripped


class Reader(Protocol):
    """Gives the user's messages and commands, one at a time."""

    @property
    def is_person(self) -> bool:
        """Whether someone is there to be told how to go on."""

    @property
    def can_edit(self) -> bool:
        """Whether a given text can be changed."""

    def read(self, default: str = "") -> str | None:
        """The next one, stripped; None at the end.

        Args:
            default: a text to start from, where one can be changed.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """


def state_folder() -> Path:
    """`$XDG_STATE_HOME/specdec`, or `~/.local/state/specdec`: what is remembered from one start to the next."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "specdec"


class LineReader:
    """Reads one message a line; a line that ends with a backslash goes on with the next one, and so does one that
    begins with \"\"\", until these come again."""

    is_person = can_edit = False

    def __init__(self, file: TextIO):
        self._file = file

    def read(self, default: str = "") -> str | None:
        lines: list[str] = []
        for line in self._file:
            lines.append(line.removesuffix("\n"))
            if is_open("\n".join(lines)):
                continue
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        return unquoted("\n".join(lines)) if lines else None


class TerminalReader:
    """Reads with history, several lines and completion.

    Args:
        candidates: what can follow the text typed so far, if it is a command.
        history_file: where lines are remembered; kept in memory if it cannot be written.
    """

    is_person = True

    def __init__(self, candidates: Callable[[str], Candidates], history_file: Path):
        self.can_edit = not is_dumb_terminal()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=_open_history(history_file),
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_key_bindings(),
            completer=_CommandCompleter(candidates),
            complete_while_typing=Condition(self._is_command),
            # of a terminal that can only write lines, prompt_toolkit takes care itself
            output=create_output(always_prefer_tty=True) if self.can_edit else None,
        )

    def read(self, default: str = "") -> str | None:
        try:
            return unquoted(self._session.prompt(default=default))
        except EOFError:
            return None

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


def make_reader(candidates: Callable[[str], Candidates]) -> Reader:
    """A reader of stdin."""
    if not sys.stdin.isatty():
        return LineReader(sys.stdin)
    return TerminalReader(candidates, state_folder() / "chat_history")


def _open_history(file: Path) -> History:
    """A history that only the user can read."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)


def _key_bindings() -> KeyBindings:
    """Enter sends, but continues after a backslash; Alt-Enter starts a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def start_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


class _CommandCompleter(Completer):
    def __init__(self, candidates: Callable[[str], Candidates]):
        self._candidates = candidates

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in typed:
            return
        word = typed.rpartition(" ")[2]
        for text, meaning in self._candidates(typed):
            if text.startswith(word):
                yield Completion(text, start_position=-len(word), display_meta=meaning)
