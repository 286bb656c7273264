"""Markdown as lines for a terminal: which part of an unfinished text is final, and what it looks like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from specdec.cli.chat.live_lines import Line

_CODE_THEME = "ansi_dark"
"""The terminal's own colours, on its own background."""
_LOOK_AHEAD = 64
"""How far the mark-up between two shown characters may reach, in characters."""

_WORD = re.compile(r"[^\W\d_]{2}")

# HTML is not rendered, so it is shown as it stands
_PARSER = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])


def num_finished(text: str) -> int:
    """Characters at the beginning of a growing text whose look is final: all blocks but the last one."""
    last_line = text.rfind("\n") + 1
    # before it has a word, the beginning of a line can look like something else than the line
    sure = text if _WORD.search(text, last_line) else text[:last_line]
    return _block_starts(sure)[-1]


def render(text: str, console: Console, width: int) -> list[Line]:
    """Lines of at most `width` cells; a blank one stands between two blocks, and none at the ends."""
    starts = _block_starts(text)
    lines: list[Line] = []
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        block = _render_block(text[start:stop], console, width)
        lines += [[], *block] if lines and block else block
    return lines


def _block_starts(text: str) -> list[int]:
    """Where each of the top-level blocks starts; the first one at 0."""
    tokens = [token for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    ends = list(itertools.accumulate((len(line) + 1 for line in text.split("\n")), initial=0))
    return [0, *(ends[token.map[0]] for token in tokens[1:] if token.map)]


def _render_block(text: str, console: Console, width: int) -> list[Line]:
    options = console.options.update(width=width, height=None)
    lines = console.render_lines(_ChatMarkdown(text), options, pad=False)
    lines = [_without_trailing_space(line) for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def tint(lines: Sequence[Line], text: str, marks: Sequence[bool], style: Style) -> list[Line]:
    """Restyle the characters of `lines` that come from marked characters of `text`.

    The lines show the characters of their source in its order, without mark-up and with ornaments. So each shown
    character is looked for in the source behind the one found before; what is not found soon is an ornament. (Cells
    of a table that are broken into several lines are out of order, and may be tinted in part.)

    Args:
        marks: for each character of `text`.
    """
    places = _places(_characters(lines), text)
    return [[part for segment in line for part in _tint_segment(segment, places, marks, style)] for line in lines]


def _tint_segment(
    segment: Segment, places: Iterator[int | None], marks: Sequence[bool], style: Style
) -> Iterator[Segment]:
    run, run_marked = "", False
    for char in segment.text:
        marked = run_marked  # a space is as its neighbour
        if not char.isspace():
            place = next(places)
            marked = place is not None and marks[place]
        if run and marked != run_marked:
            yield _segment(run, segment.style, style if run_marked else None)
            run = ""
        run, run_marked = run + char, marked
    if run:
        yield _segment(run, segment.style, style if run_marked else None)


def _segment(text: str, style: Style | None, over: Style | None) -> Segment:
    return Segment(text, style if over is None else Style.combine([style or Style.null(), over]))


def _characters(lines: Iterable[Line]) -> Iterator[str]:
    return (char for line in lines for segment in line for char in segment.text if not char.isspace())


def _places(shown: Iterable[str], text: str) -> Iterator[int | None]:
    """For each shown character its place in the text, or None."""
    start = 0
    for char in shown:
        place = text.find(char, start, start + _LOOK_AHEAD)
        if place >= 0:
            start = place + 1
        yield None if place < 0 else place


def _without_trailing_space(line: Line) -> Line:
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        last = kept[-1]
        kept[-1] = Segment(last.text.rstrip(), last.style)
    return kept


class _Code(CodeBlock):
    """Code between its fences, without an indent: it can be copied as it is shown."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fence = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{fence}", style="dim")
        yield Syntax(
            str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )
        yield Text("```", style="dim")


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar = {}
    """All headings to the left."""


class _ChatMarkdown(Markdown):
    """Markdown as chat models write it: line breaks are kept, HTML and addresses are shown."""

    elements: ClassVar = {**Markdown.elements, "fence": _Code, "code_block": _Code, "heading_open": _Heading}

    def __init__(self, text: str):
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.parsed = [_with_breaks(token) for token in _PARSER.parse(text)]


def _with_breaks(token: Token) -> Token:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token
