"""A call of a tool, read character by character: its arguments can be told before they are complete."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Text:
    """Said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the arguments of the call that has begun last: JSON, once they are put together."""

    text: str


Piece = Text | Reasoning | CallStart | CallArguments


class MalformedCall(ValueError):
    """What looked like a call is none."""


class JsonValue:
    """Finds the end of one JSON value; it is not checked otherwise."""

    def __init__(self) -> None:
        self.text = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def add(self, char: str) -> bool:
        """Whether the value is complete with this character. A number or a word never knows: see `ends_before`."""
        self.text += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        return not self._in_string and not self._depth and char in '"}]'

    def ends_before(self, char: str) -> bool:
        """Whether a number or a word is complete, because of the character after it."""
        return self.text[:1] not in ("", '"', "{", "[") and char in f"{_SPACE},}}]"


class _State(Enum):
    OPENING = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    DONE = auto()


class CallScanner:
    """Reads `{"name": "f", "arguments": {...}}`; `parameters` is another name of the arguments.

    Arguments that are an object are told as they come, once the name is known; those that are a text (JSON within
    JSON) at its end.
    """

    def __init__(self) -> None:
        self._state = _State.OPENING
        self._key = ""
        self._value = JsonValue()
        self._name: str | None = None
        self._held_arguments: str | None = None
        self._has_told_arguments = False

    @property
    def is_done(self) -> bool:
        return self._state is _State.DONE

    @property
    def has_begun(self) -> bool:
        """Whether a piece has been told: the call cannot be taken back."""
        return self._name is not None

    def add(self, char: str) -> list[Piece]:
        """What is known with one character more. Raises `MalformedCall` if this is no call."""
        if self._state is _State.VALUE and self._value.ends_before(char):
            pieces = self._end_value()
            return [*pieces, *self.add(char)]
        if self._state in (_State.KEY, _State.VALUE) and self._value.text:
            return self._continue_value(char)
        if char in _SPACE:
            return []
        if self._state is _State.OPENING and char == "{":
            self._state = _State.KEY
        elif self._state is _State.COLON and char == ":":
            self._state, self._value = _State.VALUE, JsonValue()
        elif (self._state is _State.KEY and char == '"') or (self._state is _State.VALUE and char not in ",:}]"):
            return self._continue_value(char)
        elif self._state is _State.KEY and char == "}":
            return self._end()
        elif self._state is not _State.KEY or char != ",":
            raise MalformedCall(f"{char!r} is not expected here")
        return []

    def _continue_value(self, char: str) -> list[Piece]:
        is_complete = self._value.add(char)
        if self._state is _State.KEY:
            if is_complete:
                self._key = _decoded(self._value.text)
                self._state, self._value = _State.COLON, JsonValue()
            return []
        pieces: list[Piece] = []
        if self._is_streamed():
            self._has_told_arguments = True
            pieces.append(CallArguments(char))
        if is_complete:
            pieces += self._end_value()
        return pieces

    def _is_streamed(self) -> bool:
        return self._name is not None and self._key in _ARGUMENTS and self._value.text.startswith("{")

    def _end_value(self) -> list[Piece]:
        text, self._value, self._state = self._value.text, JsonValue(), _State.KEY
        if self._key == "name":
            if self._name is not None or not text.startswith('"'):
                raise MalformedCall("a call has one name")
            self._name = _decoded(text)
            return [CallStart(self._name), *self._tell_held()]
        if self._key in _ARGUMENTS and not self._has_told_arguments:
            self._held_arguments = _decoded(text) if text.startswith('"') else "{}" if text == "null" else text
            return self._tell_held()
        return []

    def _tell_held(self) -> list[Piece]:
        if self._name is None or self._held_arguments is None:
            return []
        held, self._held_arguments, self._has_told_arguments = self._held_arguments, None, True
        return [CallArguments(held)]

    def _end(self) -> list[Piece]:
        if self._name is None:
            raise MalformedCall("a call has a name")
        self._state = _State.DONE
        return [] if self._has_told_arguments else [CallArguments("{}")]


def _decoded(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError as error:
        raise MalformedCall(str(error)) from error
    return value if isinstance(value, str) else text
