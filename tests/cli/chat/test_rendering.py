"""What a reply looks like while it comes and when it is there. No model is needed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from specdec.cli.chat import rendering
from specdec.cli.chat.markdown import num_finished, render
from specdec.cli.chat.rendering import MarkdownView, PlainView, make_view, shows_styles
from specdec.cli.chat.reply import Piece
from tests.support.screen import Screen

REPLY = """\
# Title

A paragraph with **bold**, `code`, a [link](https://example.org), <b>HTML</b>, and more words than fit on one line.
Its second line.

1. one
2. two, which is long enough to go on in the next line of the screen

   with a paragraph
   - nested
3. three

| name | value |
|------|------:|
| a | 1 |
| b | 22 |

> quoted

```python
def f(x):

    return x  # done
```

---
The end."""

SHOWN = """\
                 Title

A paragraph with bold, code, a link
(https://example.org), <b>HTML</b>, and
more words than fit on one line.
Its second line.

 1 one
 2 two, which is long enough to go on in
   the next line of the screen
   with a paragraph
    • nested
 3 three

 name  value
 ───────────
 a         1
 b        22

▌ quoted

```python
def f(x):

    return x  # done
```

----------------------------------------

The end.
"""


@pytest.fixture(autouse=True)
def draw_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SECONDS_BETWEEN_DRAWINGS", 0.0)


class Terminal:
    """A console whose output goes to a screen."""

    def __init__(self, width: int = 40, height: int = 30, **options: object):
        self.screen = Screen(width, height)
        self._file = io.StringIO()
        self.sent = ""
        theme = rendering.REPLY_THEME
        self.console = Console(
            file=self._file, force_terminal=True, width=width, height=height, theme=theme, _environ={}, **options
        )

    def update(self) -> None:
        new = self._file.getvalue()[len(self.sent) :]
        self.sent += new
        self.screen.feed(new)

    @property
    def text(self) -> str:
        self.update()
        return self.screen.text


def pieces(text: str, size: int = 3) -> list[Piece]:
    return [Piece(text[start : start + size], False) for start in range(0, len(text), size)]


def show(terminal: Terminal, parts: Iterable[Piece], *, tinted: bool = False) -> None:
    with MarkdownView(terminal.console, tinted=tinted) as view:
        for part in parts:
            view.show([part])
            terminal.update()


@pytest.mark.parametrize("height", [30, 8, 5])
def test_it_ends_as_if_it_had_come_at_once(height: int):
    """Also where blocks are taller than the screen: what has left it is never missed or repeated."""
    terminal = Terminal(height=height)
    show(terminal, pieces(REPLY))
    assert terminal.text == SHOWN


def test_what_is_finished_is_never_written_again():
    text = "".join(f"paragraph {number}\n\n" for number in range(30))
    terminal = Terminal()
    show(terminal, pieces(text))
    assert terminal.text == "".join(f"paragraph {number}\n\n" for number in range(30))[:-1]
    assert "\x1b[2A" not in terminal.sent
    assert terminal.sent.count("paragraph 7") <= len("paragraph 7\n\n")


def test_of_a_block_taller_than_the_screen_the_end_is_shown():
    terminal = Terminal(height=3)
    with MarkdownView(terminal.console) as view:
        view.show(pieces("\n".join(f"line {number}" for number in range(9))))
        assert terminal.text == "line 6\nline 7\nline 8"
    assert terminal.text == "\n".join(f"line {number}" for number in range(9)) + "\n"


def test_an_error_leaves_the_cursor_visible_on_a_new_line():
    terminal = Terminal()

    def reply() -> Iterator[Piece]:
        yield Piece("half a rep", False)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        show(terminal, reply())
    assert terminal.text == "half a rep\n"
    assert terminal.sent.rindex("\x1b[?25h") > terminal.sent.rindex("\x1b[?25l")


def test_nothing_is_shown_of_a_reply_that_never_began():
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), MarkdownView(terminal.console):
        raise KeyboardInterrupt
    assert (terminal.text, terminal.sent) == ("", "")


BLOCKS = st.sampled_from(
    ["word ", "**bold** ", "`x` ", "\n", "\n\n", "- item\n", "1. ", "# ", "```\n", "> ", "| a |", "-", "é中"]
)


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(BLOCKS, max_size=25), height=st.integers(3, 12))
def test_any_text_ends_as_if_it_had_come_in_blocks(parts: Sequence[str], height: int):
    whole, growing = Terminal(height=100), Terminal(height=100)
    text = "".join(parts)
    show(growing, [Piece(part, False) for part in parts])
    show(whole, [Piece(line, False) for line in text.splitlines(keepends=True)])
    assert growing.text == whole.text
    small = Terminal(height=height)
    show(small, [Piece(part, False) for part in parts])
    assert "".join(small.text.split()).count("word") >= text.count("word"), "nothing is lost"


def marked(terminal: Terminal, style: str) -> str:
    """The characters that have a style, in order."""
    terminal.update()
    runs = terminal.sent.replace("\x1b[0m", "\0").split("\x1b[")
    return "".join(
        run.partition("m")[2].partition("\0")[0] for run in runs if style in run.partition("m")[0].split(";")
    )


def test_drafted_tokens_are_underlined_among_colours():
    """Upper case is drafted; mark-up between and around it changes nothing, and the colours of code stay."""
    text = "# aa\n\naa BB **CC dd EE** `FF gg`\n\n- HH [ii](JJ)\n- kk\n\n```python\ndef LL(mm): NN\n```\n\nthe end"
    terminal = Terminal(color_system="standard")
    with MarkdownView(terminal.console, tinted=True) as view:
        view.show([Piece(char, char.isupper()) for char in text])
    assert marked(terminal, "4").replace(" ", "") == "BBCCEEFFHHJJLLNN"
    coloured = re.search(r"\x1b\[([\d;]*)mLL", terminal.sent)
    assert coloured
    assert {code for code in coloured[1].split(";") if code[0] in "39"}


def test_drafted_tokens_are_underlined_without_colours():
    terminal = Terminal(no_color=True)
    show(terminal, [Piece("own ", False), Piece("drafted ", True), Piece("own", False)], tinted=True)
    assert "\x1b[4mdrafted" in terminal.sent
    assert not any(colour in terminal.sent for colour in ("\x1b[3", "\x1b[9"))


def test_a_model_cannot_control_the_terminal():
    evil = "\x1b[2J\x1b]52;c;AAAA\x07 \x9b31m \r\x08\x7f."
    terminal = Terminal()
    show(terminal, [Piece(evil, False)])
    assert "␛[2J␛]52;c;AAAA␇ \ufffd31m ␍␈\ufffd." in terminal.text  # the screen knows no such sequences


def test_a_plain_view_writes_what_comes():
    file = io.StringIO()
    console = Console(file=file, force_terminal=False)
    assert isinstance(make_view(console), PlainView)
    with make_view(console) as view:
        view.show([Piece("**a** ", True), Piece("\x1b", False)])
        assert file.getvalue() == "**a** \x1b"
    assert file.getvalue() == "**a** \x1b\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_text_without_control_characters(term: str):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": term})
    assert not shows_styles(console)
    with make_view(console, tinted=True) as view:
        view.show([Piece("**a** \x1b[2J", True)])
    assert file.getvalue() == "**a** ␛[2J\n"


def test_a_block_is_finished_when_the_next_one_has_a_word():
    assert num_finished("a\n\n") == 0
    assert num_finished("a\n\n1. ") == 0
    assert num_finished("a\n\n1. be") == 3
    assert num_finished("a\n\nb\n") == 3
    assert num_finished("a\n---\n") == 0, "it may be a heading"
    assert num_finished("```\na\n\nb\n") == 0
    assert num_finished("- a\n\n- b\n\n- c\n") == 0
    assert num_finished("- a\n\nb\n") == 5


def test_what_rich_would_hide_is_shown():
    console = Console(width=40, file=io.StringIO())
    assert [line.plain for line in render("<div>a</div>\nb <br> c", console)] == ["<div>a</div>", "b <br> c"]
