"""Where `specdec bench` puts its results: stdout, a file, a figure, a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console, Group, RenderableType

from specdec.cli.common import err_console, naming

if TYPE_CHECKING:
    from specdec.bench.document import Document
    from specdec.bench.harness import BatchResult

TABLE_WIDTH = 120
"""Where stdout is not a terminal."""
TABLE = "table"
_FORMATS_OF_ENDINGS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".md": "md", ".txt": TABLE}
_FIGURE_ENDINGS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOutput:
    """What is wanted. Raises `ValueError` for what could not be written, before anything is measured."""

    format: Literal["table", "md", "csv", "json", "jsonl"] = "table"
    output: Path | None = None
    plot: Path | None = None
    trace: Path | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        _check_ending("--output", self.output, tuple(_FORMATS_OF_ENDINGS))
        _check_ending("--plot", self.plot, _FIGURE_ENDINGS)
        for option, path in (("--output", self.output), ("--plot", self.plot), ("--trace", self.trace)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option} {path}: there is no folder {path.parent}")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'specdec-runtime[bench]'")

    def write(self, document: Document, results: Sequence[BatchResult]) -> None:
        if self.trace is not None:
            from specdec.bench.report import trace

            text = "".join(f"{json.dumps(choice)}\n" for choice in trace(results))
            with naming(self.trace):
                self.trace.write_text(text, encoding="utf-8")
        if self.output is not None:
            text = _text(document, _FORMATS_OF_ENDINGS[self.output.suffix])
            with naming(self.output):
                self.output.write_text(f"{text}\n", encoding="utf-8")
        if self.plot is not None:
            from specdec.bench.plots import draw

            with naming(self.plot):
                draw(document, results, self.plot)
        if self.format == TABLE:
            _print_table(document)
        else:
            print(_text(document, self.format))
        if self.explain:
            from specdec.bench.explain import explain, to_grid
            from specdec.bench.tables import rich_parts

            # beside another format stdout holds just that
            console = Console() if self.format == TABLE else err_console
            _print(Group(*rich_parts(to_grid(explain(results)), _width(console))), console)


def _check_ending(option: str, path: Path | None, allowed: Sequence[str]) -> None:
    if path is not None and path.suffix not in allowed:
        raise ValueError(f"{option} {path}: the ending says what is written; it may be {', '.join(allowed)}")


def _text(document: Document, format: str) -> str:
    from specdec.bench.document import to_csv, to_json, to_jsonl
    from specdec.bench.tables import to_markdown, to_text

    if format == TABLE:
        return to_text(document, TABLE_WIDTH)
    writers: dict[str, Callable[[Document], str]] = {
        "json": to_json,
        "jsonl": to_jsonl,
        "csv": to_csv,
        "md": to_markdown,
    }
    return writers[format](document)


def _print_table(document: Document) -> None:
    from specdec.bench.tables import to_rich

    console = Console()
    _print(to_rich(document, _width(console)), console)


def _width(console: Console) -> int:
    return console.width if console.is_terminal else TABLE_WIDTH


def _print(what: RenderableType, console: Console) -> None:
    console.width = _width(console)
    console.print(what, highlight=False)
