"""A reply as it comes, taken apart: reasoning, text for the user, calls of tools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum, auto

from specdec.server.replies.scanner import CallStart, MalformedCall, Piece, Reasoning, Text
from specdec.server.replies.styles import CallReader, ToolStyle

_PYTHON_TAG = "<|python_tag|>"


class _Mode(Enum):
    BEGINNING = auto()
    REASONING = auto()
    TEXT = auto()
    CALL = auto()


class ReplyParser:
    """Takes a reply apart. What was told is never taken back; what may become a tag is held back.

    What looks like a call and is none is text. White space around calls and behind the reasoning is left out.

    Args:
        style: how calls are written; None: there are none.
        names: of the tools. Where calls have no tag, an object that names none of them is text.
        thoughts: the tags around reasoning; None: it is not looked for.
        is_thinking: whether the prompt has opened the reasoning already.
    """

    def __init__(
        self,
        style: ToolStyle | None,
        names: Collection[str] = (),
        thoughts: tuple[str, str] | None = None,
        *,
        is_thinking: bool = False,
    ):
        self._style = style
        self._names = frozenset(names)
        self._thoughts = thoughts
        self._mode = _Mode.REASONING if is_thinking else _Mode.BEGINNING if thoughts or style else _Mode.TEXT
        self._reader: CallReader | None = None
        self._held = ""
        """Not told yet: it may begin a tag, or it is what a call has had so far."""
        self._is_past_reasoning = False
        self._has_told = False
        self._num_added = self._reasoning_end = 0
        """Characters: all so far, and those up to the end of the tag that closes the reasoning."""
        self._offsets: list[int] = []
        self.num_calls = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far, its tags included."""
        end = self._num_added if self._mode is _Mode.REASONING else self._reasoning_end
        return sum(offset < end for offset in self._offsets)

    def add(self, text: str, offsets: Sequence[int] = ()) -> list[Piece]:
        """What can be told now.

        Args:
            offsets: where each new token starts, in characters of the whole reply.
        """
        self._num_added += len(text)
        self._offsets += offsets
        pieces: list[Piece] = []
        while text:
            text = self._step(text, pieces)
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """What is still held back, once nothing more comes."""
        held, self._held = self._held, ""
        if self._mode is _Mode.REASONING:
            return [Reasoning(held)] if held else []
        if self._mode is _Mode.CALL and self._reader is not None and self._reader.has_begun:
            return []
        return [Text(held)] if held and not (self.num_calls and not held.strip()) else []

    def _step(self, text: str, pieces: list[Piece]) -> str:
        """Take some of the text, and return what is left."""
        if self._mode is _Mode.CALL:
            return self._read_call(text, pieces)
        self._held += text
        if self._mode is _Mode.BEGINNING:
            return self._begin()
        if self._mode is _Mode.REASONING:
            return self._reason(pieces)
        return self._say(pieces)

    def _begin(self) -> str:
        """Decide what a reply begins with."""
        stripped = self._held.lstrip()
        openings = [] if self._thoughts is None or self._is_past_reasoning else [self._thoughts[0]]
        if self._has_bare_calls:
            openings += ["{", _PYTHON_TAG]
        for opening in openings:
            if stripped.startswith(opening):
                if self._thoughts is not None and opening == self._thoughts[0]:
                    self._mode, self._held = _Mode.REASONING, ""
                    return stripped[len(opening) :]
                self._held = self._held[: len(self._held) - len(stripped)]
                return self._open_call(stripped if opening == "{" else stripped[len(_PYTHON_TAG) :])
        if any(opening.startswith(stripped) for opening in openings):
            return ""
        self._mode = _Mode.TEXT
        return self._take_held()

    def _reason(self, pieces: list[Piece]) -> str:
        assert self._thoughts is not None
        if not self._has_told:
            self._held = self._held.lstrip()
        before, tag, after = self._held.partition(self._thoughts[1])
        if tag:
            self._held, self._is_past_reasoning = "", True
            self._reasoning_end = self._num_added - len(after)
            self._mode = _Mode.BEGINNING if self._has_bare_calls else _Mode.TEXT
            pieces.append(Reasoning(before.rstrip()))
            return after
        self._tell(pieces, Reasoning, self._thoughts[1:])
        return ""

    def _say(self, pieces: list[Piece]) -> str:
        if self._is_past_reasoning:
            self._held = self._held.lstrip()
            self._is_past_reasoning = not self._held
        tags = () if self._style is None else self._style.tags
        found = [(place, tag) for tag in tags if (place := self._held.find(tag)) >= 0]
        if not found:
            self._tell(pieces, Text, tags)
            return ""
        place, tag = min(found)
        before, after = self._held[:place].rstrip(), self._held[place + len(tag) :]
        if before:
            pieces.append(Text(before))
        assert self._style is not None
        self._held = ""
        if tag != self._style.opening:
            return after
        self._held = tag
        return self._open_call(after)

    def _open_call(self, text: str) -> str:
        assert self._style is not None
        self._mode, self._reader = _Mode.CALL, self._style.reader()
        return text

    def _read_call(self, text: str, pieces: list[Piece]) -> str:
        """Characters of a call; its beginning is held until it is certain that it is one."""
        assert self._reader is not None
        for place, char in enumerate(text):
            self._held += char
            try:
                told = self._reader.add(char)
            except MalformedCall:
                return self._give_up(text[place + 1 :], pieces)
            if any(isinstance(piece, CallStart) and not self._is_known(piece) for piece in told):
                return self._give_up(text[place + 1 :], pieces)
            if told:
                self._held = ""
                self.num_calls += sum(isinstance(piece, CallStart) for piece in told)
                pieces += told
            if self._reader.is_done:
                self._mode, self._held = _Mode.TEXT, ""
                return text[place + 1 :]
        return ""

    def _give_up(self, rest: str, pieces: list[Piece]) -> str:
        """It is no call: what is held is text."""
        held, self._held, self._mode = self._held, "", _Mode.TEXT
        if held:
            pieces.append(Text(held))
        return rest

    def _is_known(self, start: CallStart) -> bool:
        return not self._has_bare_calls or start.name in self._names

    @property
    def _has_bare_calls(self) -> bool:
        return self._style is not None and not self._style.opening

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _tell(self, pieces: list[Piece], kind: type[Text] | type[Reasoning], tags: Sequence[str]) -> None:
        """Tell what is no beginning of a tag; before a tag, white space is held back too."""
        count = len(self._held) - _num_suspect(self._held, tags)
        if tags:
            count = len(self._held[:count].rstrip())
        if count:
            self._has_told = True
            pieces.append(kind(self._held[:count]))
            self._held = self._held[count:]


def _num_suspect(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of a text that begins a tag."""
    longest = max(map(len, tags), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """With neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and type(piece) is type(joined[-1]) and not isinstance(piece, CallStart):
            joined[-1] = type(piece)(joined[-1].text + piece.text)  # type: ignore[union-attr]
        else:
            joined.append(piece)
    return [piece for piece in joined if isinstance(piece, CallStart) or piece.text]
