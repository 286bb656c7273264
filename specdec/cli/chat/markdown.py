"""Markdown as lines for a terminal: which part of an unfinished text is final, and what it looks like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Markdown
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

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


def render(text: str, console: Console) -> list[Text]:
    """The lines of a text; a blank one stands between two blocks, and none at the ends."""
    starts = _block_starts(text)
    lines: list[Text] = []
    for start, stop in itertools.pairwise([*starts, len(text)]):
        block = _render_block(text[start:stop], console)
        lines += [Text(), *block] if lines and block else block
    return lines


def tint(lines: Sequence[Text], text: str, marks: Sequence[bool], style: Style) -> None:
    """Restyle the characters of `lines` that come from marked characters of `text`.

    The lines show the characters of their source in its order, without mark-up and with ornaments. So each shown
    character is looked for in the source behind the one found before; what is not found soon is an ornament. (Cells
    of a table that are broken into several lines are out of order, and may be tinted in part.)

    Args:
        marks: for each character of `text`.
    """
    start = 0
    for line in lines:
        is_marked: list[bool] = []
        for char in line.plain:
            if char.isspace():
                is_marked.append(bool(is_marked) and is_marked[-1])
                continue
            position = text.find(char, start, start + _LOOK_AHEAD)
            is_marked.append(position >= 0 and marks[position])
            start = max(start, position + 1)
        column = 0
        for mark, run in itertools.groupby(is_marked):
            first, column = column, column + len(list(run))
            if mark:
                line.stylize(style, first, column)


def _block_starts(text: str) -> list[int]:
    """Where each of the top-level blocks starts; the first one at 0."""
    tokens = [token for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    ends = list(itertools.accumulate((len(line) + 1 for line in text.split("\n")), initial=0))
    return [0, *(ends[token.map[0]] for token in tokens[1:] if token.map)]


def _render_block(text: str, console: Console) -> list[Text]:
    segments = console.render_lines(_ChatMarkdown(text), console.options.update(height=None), pad=False)
    lines = [Text.assemble(*((part.text, part.style or "") for part in line), no_wrap=True) for line in segments]
    for line in lines:
        line.rstrip()
    while lines and not lines[-1]:
        lines.pop()
    return list(itertools.dropwhile(lambda line: not line, lines))


class _Code(CodeBlock):
    """Code between its fences, without an indent: it can be copied as it is shown."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Text(f"```{'' if self.lexer_name == 'text' else self.lexer_name}", style="dim")
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")
        yield Text("```", style="dim")


class _ChatMarkdown(Markdown):
    """Markdown as chat models write it: line breaks are kept, HTML and addresses are shown."""

    elements: ClassVar = {**Markdown.elements, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str):
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.parsed = [_with_breaks(token) for token in _PARSER.parse(text)]


def _with_breaks(token: Token) -> Token:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token
