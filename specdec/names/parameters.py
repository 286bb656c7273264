"""How things are named on a command line: a kind, and parameters with values that are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Value(NamedTuple):
    """What a parameter takes, in words and as the function that reads it."""

    meaning: str
    read: Callable[[str], Any]


WHOLE = Value("a whole number", int)
SHARE = Value("a number", float)
TEXT = Value("a text", str)
FLAG = Value("true or false", {"true": True, "false": False}.__getitem__)


def check_known(what: str, name: str, allowed: Sequence[str]) -> None:
    """Raise `ValueError` that lists what is allowed."""
    if name not in allowed:
        raise ValueError(f"unknown {what} {name!r}; choose from: {', '.join(allowed)}")


def parse_parameter(kind: str, assignment: str, allowed: Mapping[str, Value]) -> tuple[str, Any]:
    """`NAME=VALUE`; raises `ValueError` that says what `kind` takes."""
    name, _, text = assignment.partition("=")
    if name not in allowed:
        raise ValueError(f"{kind} has no parameter {name!r}; it takes: {', '.join(allowed) or 'none'}")
    try:
        return name, allowed[name].read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{kind}: {name} must be {allowed[name].meaning}, got {text!r}") from None


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """`1,4,16`: positive whole numbers, each once; nothing gives none. Raises `ValueError` that names the option."""
    try:
        values = () if text is None else tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise ValueError(f"{option} takes a whole number or several, separated by commas: got {text!r}") from None
    if any(value < 1 for value in values):
        raise ValueError(f"{option} must be at least 1, got {text}")
    return values
