"""How chat templates write calls of tools.

Sources: the templates of Hermes 2 Pro and Qwen 2.5 (`<tool_call>`), of Llama 3.1 and 3.2 (the reply is one JSON
object), of Mistral 7B v0.3 (`[TOOL_CALLS]` and a list) and of Mistral Small 3.2 (`[TOOL_CALLS]name[ARGS]`).
"""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.server.replies.scanner import CallArguments, CallScanner, CallStart, JsonValue, MalformedCall, Piece

_SPACE = " \t\r\n"
_LETTERS = string.ascii_letters + string.digits


class CallReader(ABC):
    """Reads the calls that stand behind one opening tag."""

    is_done = False
    """Whether what comes next is no part of a call."""
    has_begun = False
    """Whether a piece of the newest call has been told: it cannot be taken back."""

    @abstractmethod
    def add(self, char: str) -> list[Piece]:
        """What is known with one character more. Raises `MalformedCall` if this is no call."""


class _ObjectReader(CallReader):
    """One object, or several with something between them."""

    def __init__(self, *, opening: str = "", separator: str = "", closing: str = ""):
        self._opening, self._separator, self._closing = opening, separator, closing
        self._scanner: CallScanner | None = None if opening else CallScanner()

    def add(self, char: str) -> list[Piece]:
        if self._scanner is None:
            if char == self._opening or (char == self._separator and not self._opening):
                self._scanner, self._opening = CallScanner(), ""
            elif not self._opening and char == self._closing:
                self.is_done = True
            elif char not in _SPACE:
                raise MalformedCall(f"{char!r} is not expected here")
            return []
        pieces = self._scanner.add(char)
        self.has_begun = self.has_begun or self._scanner.has_begun
        if self._scanner.is_done:
            self._scanner = None
            self.is_done = not self._separator
        return pieces


class _NamedReader(CallReader):
    """A name, a tag, and an object."""

    def __init__(self) -> None:
        self._head = ""
        self._value = JsonValue()

    def add(self, char: str) -> list[Piece]:
        if self.has_begun:
            self.is_done = self._value.add(char)
            return [CallArguments(char)]
        if char != "{":
            self._head += char
            if len(self._head) > _MAX_HEAD:
                raise MalformedCall("a call has a name of a few words")
            return []
        name = self._head.partition("[")[0].strip()
        if not name:
            raise MalformedCall("a call has a name")
        self.has_begun = True
        return [CallStart(name), *self.add(char)]


_MAX_HEAD = 200


@dataclass(frozen=True)
class ToolStyle:
    """A way to write calls.

    Args:
        opening: the tag in front of a call; "" if a reply is either a call or a text, from its first character on.
        closing: the tag behind it; "" if there is none.
        is_parallel: whether a reply may have several calls.
    """

    name: str
    opening: str
    closing: str = ""
    is_parallel: bool = True

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag for tag in (self.opening, self.closing) if tag)

    def reader(self) -> CallReader:
        """What reads behind an opening tag."""
        return _ObjectReader()

    def call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def rules(self, names: Sequence[str], tags: Tags, *, is_free: bool, is_parallel: bool) -> str:
        """Lark: the rule `reply`, which calls; it uses the rule `arguments_i` for the arguments of the ith tool.

        Args:
            is_free: whether a reply may also say something, and call nothing.
            is_parallel: whether it may call more than once.
        """
        call = " ".join((self._lead(tags, is_free=is_free), _NEWLINE, _OBJECT, _NEWLINE, tags(self.closing)))
        return f"{_repeated(_NEWLINE, is_free, is_parallel)}call: {call}\n{_objects(names)}{self._text(tags, is_free)}"

    def _lead(self, tags: Tags, *, is_free: bool) -> str:
        """What a call begins with: its tag, behind a text if there may be one."""
        if not is_free:
            return tags(self.opening)
        return f"TEXT? {tags(self.opening)}" if self.opening in tags.ids else "LEAD"

    def _text(self, tags: Tags, is_free: bool) -> str:
        """Lark: texts without the tag. One that is spelled ends the text before it within one lexeme."""
        if not is_free:
            return ""
        if self.opening in tags.ids:
            return "TEXT: /(.|\\n)+/\n"
        tag = re.escape(self.opening).replace("/", r"\/")
        other = f"/(.|\\n)*{tag}(.|\\n)*/"
        return f"TEXT: /(.|\\n)+/ & ~{other}\nLEAD: (/(.|\\n)*/ & ~{other}) {json.dumps(self.opening)}\n"


def _repeated(separator: str, is_free: bool, is_parallel: bool) -> str:
    if is_free:
        return f"reply: call{'*' if is_parallel else '?'} TEXT?\n"
    return f"reply: call ({separator} call)*\n" if is_parallel else "reply: call\n"


class Tags:
    """Tags in a Lark grammar: a token where the tokenizer has one, and their characters otherwise."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids

    def __call__(self, tag: str) -> str:
        return f"<[{self.ids[tag]}]>" if tag in self.ids else json.dumps(tag)


_OBJECT = "object"
_NEWLINE = r'"\n"'


def _objects(names: Sequence[str], arguments: str = "arguments") -> str:
    """Lark: the rule `object`, a call as a JSON object."""
    heads = [json.dumps(f'{{"name": {json.dumps(name)}, "{arguments}": ') for name in names]
    return _either(_OBJECT, [f'{head} arguments_{index} "}}"' for index, head in enumerate(heads)])


def _either(rule: str, ways: Sequence[str]) -> str:
    return f"{rule}: {' | '.join(ways)}\n"


class _Llama(ToolStyle):
    def reader(self) -> CallReader:
        return _ObjectReader(separator=";")

    def rules(self, names: Sequence[str], tags: Tags, *, is_free: bool, is_parallel: bool) -> str:
        reply = f"reply: {_OBJECT} | TEXT?\nTEXT: /[^{{ ](.|\\n)*/\n" if is_free else f"reply: {_OBJECT}\n"
        return f"{reply}{_objects(names, 'parameters')}"


class _Mistral(ToolStyle):
    def reader(self) -> CallReader:
        return _ObjectReader(opening="[", separator=",", closing="]")

    def call_id(self) -> str:
        """Nine letters and digits: the template refuses others."""
        return "".join(secrets.choice(_LETTERS) for _ in range(9))

    def rules(self, names: Sequence[str], tags: Tags, *, is_free: bool, is_parallel: bool) -> str:
        more = f' (", " {_OBJECT})*' if is_parallel else ""
        calls = f'calls: {self._lead(tags, is_free=is_free)} " "? "[" {_OBJECT}{more} "]"\n'
        reply = "reply: calls? TEXT?\n" if is_free else "reply: calls\n"
        return f"{reply}{calls}{_objects(names)}{self._text(tags, is_free)}"


class _MistralNamed(_Mistral):
    def reader(self) -> CallReader:
        return _NamedReader()

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.opening, "[ARGS]", "[CALL_ID]")

    def rules(self, names: Sequence[str], tags: Tags, *, is_free: bool, is_parallel: bool) -> str:
        lead = self._lead(tags, is_free=is_free)
        ways = [f"{lead} {json.dumps(name)} {tags('[ARGS]')} arguments_{index}" for index, name in enumerate(names)]
        return f"{_repeated('', is_free, is_parallel)}{_either('call', ways)}{self._text(tags, is_free)}"


HERMES = ToolStyle("hermes", "<tool_call>", "</tool_call>")
LLAMA = _Llama("llama", "", is_parallel=False)
MISTRAL = _Mistral("mistral", "[TOOL_CALLS]")
MISTRAL_NAMED = _MistralNamed("mistral", "[TOOL_CALLS]")


def style_of(template: str) -> ToolStyle | None:
    """How a chat template has its model write calls; None if it knows tools, but not in a way that is known here."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return LLAMA
    return None if knows_tools(template) else HERMES


def knows_tools(template: str) -> bool:
    """Whether a chat template writes what tools there are."""
    return "tools" in template
