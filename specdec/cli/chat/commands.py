"""What can be typed after a slash: one table for parsing, help and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from specdec.cli.chat import settings
from specdec.cli.chat.session import ChatSession
from specdec.names.methods import AUTO, EARLY_EXIT, PLAIN, PROMPT_LOOKUP, QUANTIZED_SELF, SMALL_MODEL

_DRAFTERS = (AUTO, PLAIN, PROMPT_LOOKUP, SMALL_MODEL, QUANTIZED_SELF, EARLY_EXIT)
_KEYS = """\
//TEXT                   a message that starts with a slash

Ctrl-C stops a reply; what was said until then stays in the conversation.
Alt-Enter, or a backslash at the end of a line, starts a new line.
Tab completes commands; the arrow keys bring back what was typed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command and what may follow it.

    Args:
        argument: its name in the help; in brackets if it may be left out, "" if there is none.
        run: does it, with the stripped argument.
        choices: what the argument may begin with.
    """

    argument: str
    meaning: str
    run: Callable[[ChatSession, str], None]
    choices: Callable[[], Iterable[str]] = tuple

    def check(self, name: str, argument: str) -> None:
        """Raise `ValueError` if the argument is missing or too much."""
        if argument and not self.argument:
            raise ValueError(f"{name} takes nothing after it, got {argument!r}")
        if not argument and self.argument and not self.argument.startswith("["):
            raise ValueError(f"{name} needs its {self.argument}; /help lists the commands")


def obey(session: ChatSession, line: str) -> None:
    """Carry out a line that starts with a slash.

    Raises:
        ValueError: there is no such command, or its argument is wrong.
    """
    name, argument = _split(line)
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name}; /help lists the commands, and // begins a message that starts with a slash"
        )
    command = COMMANDS[name]
    command.check(name, argument)
    command.run(session, argument)


def candidates(typed: str) -> list[tuple[str, str]]:
    """What may stand where the last word of a line that starts with a slash begins, each with its meaning."""
    words = typed.split(" ")
    if len(words) == 1:
        return [(name, command.meaning) for name, command in COMMANDS.items()]
    if len(words) == 2 and words[0] in COMMANDS:
        return [(choice, "") for choice in COMMANDS[words[0]].choices()]
    return []


def help_text() -> str:
    usages = {f"{name} {command.argument}": command.meaning for name, command in COMMANDS.items()}
    return "\n".join([*(f"{usage:24} {meaning}" for usage, meaning in usages.items()), _KEYS])


def _split(line: str) -> tuple[str, str]:
    words = line.split(maxsplit=1)
    return words[0], line[len(words[0]) :].strip()


def _edit(session: ChatSession, argument: str) -> None:
    session.edit(argument or None)


def _system(session: ChatSession, argument: str) -> None:
    session.set_system(argument or None)


def _set(session: ChatSession, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not value:
        session.show_settings(name or None)
    else:
        session.change_setting(name, value.strip())


def _save(session: ChatSession, argument: str) -> None:
    session.save(_path(argument) if argument else None)


def _load(session: ChatSession, argument: str) -> None:
    session.load(_path(argument))


def _show(session: ChatSession, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise ValueError(f"/show takes on, off or nothing, got {argument!r}")
    if argument:
        session.set_tinted(argument == "on")
    else:
        session.show_last_reply()


def _model(session: ChatSession, argument: str) -> None:
    session.change_model(argument or None)


def _draft(session: ChatSession, argument: str) -> None:
    drafter, _, draft = argument.partition(" ")
    session.change_drafter(drafter or None, draft.strip() or None)


def _path(text: str) -> Path:
    """A file, `.json` if it has no suffix."""
    path = Path(text).expanduser()
    return path if path.suffix else path.with_suffix(".json")


def _conversations() -> Iterable[str]:
    return sorted(str(path) for path in Path().glob("*.json"))


COMMANDS = {
    "/help": Command(argument="", meaning="this text", run=lambda session, _: session.notify(help_text())),
    "/exit": Command(argument="", meaning="leave, as Ctrl-D does", run=lambda session, _: session.leave()),
    "/clear": Command(
        argument="",
        meaning="forget the conversation, keep the system prompt",
        run=lambda session, _: session.clear(),
    ),
    "/regen": Command(
        argument="", meaning="reply to the last message again", run=lambda session, _: session.regenerate()
    ),
    "/edit": Command(argument="[TEXT]", meaning="change the last message, and reply to that", run=_edit),
    "/system": Command(argument="[TEXT]", meaning="set the system prompt; without TEXT, remove it", run=_system),
    "/set": Command(
        argument="[NAME VALUE]",
        meaning="change how replies are decoded; alone, list the values",
        run=_set,
        choices=lambda: settings.NAMES,
    ),
    "/save": Command(
        argument="[FILE]", meaning="write the conversation to a JSON file", run=_save, choices=_conversations
    ),
    "/load": Command(argument="FILE", meaning="go on with a saved conversation", run=_load, choices=_conversations),
    "/stats": Command(
        argument="",
        meaning="what the last reply and all replies took",
        run=lambda session, _: session.show_stats(),
    ),
    "/show": Command(
        argument="[on|off]",
        meaning="tint drafted tokens, of the last reply or (on) of all",
        run=_show,
        choices=lambda: ("on", "off"),
    ),
    "/model": Command(
        argument="[MODEL]",
        meaning="go on with another model; without one, name it",
        run=_model,
        choices=lambda: ["demo"],
    ),
    "/draft": Command(
        argument="[DRAFTER [MODEL]]",
        meaning="draft with another drafter; small-model takes a MODEL",
        run=_draft,
        choices=lambda: _DRAFTERS,
    ),
}
