"""What can be typed after a slash: one table for parsing, help and completion."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from specdec.cli.chat import settings
from specdec.cli.chat.session import ChatSession
from specdec.specs import DRAFTERS

_KEYS = """\
//TEXT                   a message that starts with a slash

Ctrl-C stops a reply; what was said until then stays in the conversation.
Alt-Enter, or a backslash at the end of a line, starts a new line; so does
Enter in a text that begins with \"\"\", until the \"\"\" that ends it.
Tab completes commands; the arrow keys bring back what was typed before."""


class Command(NamedTuple):
    """A command and what may follow it.

    Args:
        argument: its name in the help; in brackets if it may be left out, "" if there is none.
        run: does it, with the stripped argument or "".
        choices: what the argument may begin with.
    """

    name: str
    argument: str
    meaning: str
    run: Callable[[ChatSession, str], None]
    choices: Callable[[], Iterable[str]] = tuple

    def check(self, argument: str) -> None:
        """Raise `ValueError` if the argument is missing or too much."""
        if argument and not self.argument:
            raise ValueError(f"{self.name} takes nothing after it, got {argument!r}")
        if not argument and self.argument and not self.argument.startswith("["):
            raise ValueError(f"{self.name} needs its {self.argument}; /help lists the commands")


def obey(session: ChatSession, line: str) -> None:
    """Carry out a line that starts with a slash.

    Raises:
        ValueError: there is no such command, or its argument is wrong.
    """
    name, _, argument = re.sub(r"\s+", " ", line, count=1).partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name}; /help lists the commands, and // begins a message that starts with a slash"
        )
    command = COMMANDS[name]
    command.check(argument.strip())
    command.run(session, argument.strip())


def candidates(typed: str) -> list[tuple[str, str]]:
    """What may stand where the last word of a line that starts with a slash begins, each with its meaning."""
    words = typed.split(" ")
    if len(words) == 1:
        return [(name, command.meaning) for name, command in COMMANDS.items()]
    if len(words) == 2 and words[0] in COMMANDS:
        return [(choice, "") for choice in COMMANDS[words[0]].choices()]
    return []


def help_text() -> str:
    return "\n".join([*(f"{f'{name} {argument}':24} {meaning}" for name, argument, meaning, *_ in _ALL), _KEYS])


def _conversations() -> Iterable[str]:
    return sorted(str(path) for path in Path().glob("*.json"))


_ALL = (
    Command("/help", "", "this text", lambda session, _: session.notify(help_text())),
    Command("/exit", "", "leave, as Ctrl-D does", lambda session, _: session.leave()),
    Command("/clear", "", "forget the conversation, keep the system prompt", lambda session, _: session.clear()),
    Command("/regen", "", "reply to the last message again", lambda session, _: session.regenerate()),
    Command("/edit", "[TEXT]", "change the last message, and reply to that", ChatSession.edit),
    Command("/system", "[TEXT]", "set the system prompt; without TEXT, remove it", ChatSession.set_system),
    Command(
        "/set",
        "[NAME VALUE]",
        "change how replies are decoded; alone, list the values",
        ChatSession.set,
        lambda: settings.NAMES,
    ),
    Command("/save", "[FILE]", "write the conversation to a JSON file", ChatSession.save, _conversations),
    Command("/load", "FILE", "go on with a saved conversation", ChatSession.load, _conversations),
    Command("/stats", "", "what the last reply and all replies took", lambda session, _: session.show_stats()),
    Command(
        "/show",
        "[on|off]",
        "underline the drafted tokens of one reply, or of all",
        ChatSession.show,
        lambda: ("on", "off"),
    ),
    Command(
        "/model",
        "[MODEL]",
        "go on with another model; without one, name it",
        ChatSession.change_model,
        lambda: ("demo",),
    ),
    Command(
        "/draft",
        "[DRAFTER [MODEL]]",
        "draft with another drafter, some with a MODEL",
        ChatSession.change_drafter,
        lambda: DRAFTERS,
    ),
)
_ALIASES = {"/bye": "/exit", "/quit": "/exit", "/q": "/exit", "/?": "/help", "/reset": "/clear"}
"""What is typed in other chats."""
COMMANDS = {command.name: command for command in _ALL}
