"""The document for people: tables in a terminal, or in markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from specdec.bench.document import Document
from specdec.bench.report import MethodReport
from specdec.specs import AUTO, PLAIN
from specdec.suites import ALL

NOT_IDENTICAL = "NO"
_NOT_MEASURED = "-"
_LABEL_WIDTH = 18
"""Characters that a method or category has at least."""
_NUM_POSITIONS = 5
"""Of the acceptance per position; the document has them all."""

Cell: TypeAlias = Callable[[MethodReport], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table in words. The first `num_labels` columns are texts, the others numbers; a section starts a new group.

    `spare`: headings of columns that a narrow terminal can do without, the first one first.
    """

    title: str
    headings: list[str]
    num_labels: int
    sections: list[list[list[str]]]
    legend: list[str] = field(default_factory=list)
    spare: tuple[str, ...] = ()

    def without(self, heading: str) -> Grid:
        """The same without one of the columns."""
        index = self.headings.index(heading)
        sections = [[cells[:index] + cells[index + 1 :] for cells in section] for section in self.sections]
        return replace(self, headings=[*self.headings[:index], *self.headings[index + 1 :]], sections=sections)

    def fitting(self, width: int) -> Grid:
        """Without as many spare columns as it takes to fit in so many characters, where labels may be folded."""
        grid, left_out = self, []
        for heading in filter(self.headings.__contains__, self.spare):
            if grid._width() <= width:
                break
            grid = grid.without(heading)
            left_out.append(heading)
        if not left_out:
            return grid
        return replace(grid, legend=[*grid.legend, f"left out in {width} columns: {', '.join(left_out)}"])

    def label_widths(self) -> list[int]:
        """Of the label columns at least: longer labels are folded where there is no room."""
        return [min(self._longest(index), _LABEL_WIDTH) for index in range(self.num_labels)]

    def _width(self) -> int:
        numbers = (self._longest(index) for index in range(self.num_labels, len(self.headings)))
        between = 2 * (len(self.headings) - 1)  # what keeps two columns apart
        return sum(self.label_widths()) + sum(numbers) + between

    def _longest(self, index: int) -> int:
        rows = [cells for section in self.sections for cells in section]
        return max(len(cells[index]) for cells in [self.headings, *rows])


def speed_grid(document: Document) -> Grid:
    """How fast everyone is, and whether it says the same; the total too, if there is more than one category."""
    has_total = len({row.category for row in document.methods}) > 2
    rows = [row for row in document.methods if row.category != ALL or has_total]
    swept = _swept(rows)
    columns: dict[str, Cell] = {
        "tok/s": _with_spread,
        "speed-up": _speedup,
        "interval": _interval,
        "tok/round": lambda row: _number(row.tokens_per_round, ".2f"),
        "identical": _identical,
        "TTFT ms": lambda row: _milliseconds(row.ttft_ms),
        "ms p50/90/99": lambda row: "/".join(map(_milliseconds, row.ms_per_token.values())),
    }
    if all(_interval(row) == _NOT_MEASURED for row in rows):
        del columns["interval"]  # nothing was repeated
    confidence = document.environment["settings"]["confidence"]
    return Grid(
        title=f"{document.model} on {document.suite}",
        headings=[*swept, "category", "method", *columns],
        num_labels=len(swept) + 2,
        sections=[
            [_labels(row, index, swept) + [cell(row) for cell in columns.values()] for index, row in enumerate(section)]
            for section in _sections(rows)
        ],
        legend=[
            "tok/s: mean ± standard deviation over repetitions",
            f"speed-up: against plain, by each batch's median time; interval: {confidence:.0%}, by bootstrap",
            "tok/round counts the bonus token: 1 is plain decoding; ms: per token after the first",
            *_comparison_legend(rows),
        ],
        spare=("ms p50/90/99", "TTFT ms", "interval", "tok/round"),
    )


def progress_grid(rows: Sequence[MethodReport]) -> Grid:
    """What is known of each category while others are still measured."""
    swept = _swept(rows)
    columns: dict[str, Cell] = {"tok/s": _with_spread, "speed-up": _speedup, "identical": _identical}
    done = [row for row in rows if row.category != ALL]
    return Grid(
        title="so far",
        headings=[*swept, "category", "method", *columns],
        num_labels=len(swept) + 2,
        sections=[
            [_labels(row, index, swept) + [cell(row) for cell in columns.values()] for index, row in enumerate(section)]
            for section in _sections(done)
        ],
    )


def draft_grid(document: Document) -> Grid:
    """The rows over all categories: what was drafted, and how much memory there was to it."""
    rows = [row for row in document.methods if row.category == ALL]
    swept = _swept(rows)
    columns: dict[str, Cell] = {
        "accepted": lambda row: _number(row.acceptance_rate, ".0%"),
        f"by position 1-{_NUM_POSITIONS}": _by_position,
        "tok/forward": lambda row: _number(row.tokens_per_target_forward, ".2f"),
        "calls": lambda row: _number(row.draft_forwards_per_round, ".1f"),
        "depth": lambda row: _number(row.mean_depth, ".1f"),
        "nodes": lambda row: _number(row.mean_size, ".1f"),
        "MiB": lambda row: _number(row.peak_memory_mib, ".0f"),
    }
    return Grid(
        title="Drafts and memory, over all prompts",
        headings=[*swept, "method", *columns],
        num_labels=len(swept) + 1,
        sections=[[[*_values(row, swept), row.name] + [cell(row) for cell in columns.values()] for row in rows]],
        legend=[
            "by position: share of rounds in which that many drafted tokens were accepted",
            "tok/forward: of the target, prefill included; MiB: the process's peak",
            "per round: calls of the draft model (its prefill included), depth and nodes of a row's tree",
        ],
        spare=("tok/forward", f"by position 1-{_NUM_POSITIONS}", "calls", "depth"),
    )


def steps_grid(document: Document) -> Grid | None:
    """Who wrote the steps of rows with a router; None if there is no such row."""
    rows = [row for row in document.methods if row.category == ALL and row.target_step_share is not None]
    swept = _swept(rows)
    columns: dict[str, Cell] = {
        "steps by target": lambda row: _number(row.target_step_share, ".0%"),
        "tokens by target": lambda row: _number(row.target_token_share, ".0%"),
        "in vain": lambda row: _number(row.vain_tokens_per_token, ".2f"),
        "router us/step": lambda row: _number(row.router_us_per_step, ".0f"),
        "of the time": lambda row: _number(row.router_time_share, ".2%"),
    }
    grid = Grid(
        title="Steps of the methods that are LOSSY, over all prompts",
        headings=[*swept, "method", *columns],
        num_labels=len(swept) + 1,
        sections=[[[*_values(row, swept), row.name] + [cell(row) for cell in columns.values()] for row in rows]],
        legend=[
            "in vain: tokens that were drafted and thrown away, for each token of the text",
            "router us/step: its own time, without what it asked of the target",
        ],
        spare=("of the time", "tokens by target"),
    )
    return grid if rows else None


def _grids(document: Document) -> list[Grid]:
    steps = steps_grid(document)
    return [speed_grid(document), draft_grid(document), *([] if steps is None else [steps])]


def verdict(document: Document) -> list[str]:
    """What it comes to, a line for auto, or for each method where auto was not asked for; none of a sweep."""
    rows = {row.name: row for row in document.methods if row.category == ALL}
    if _swept(document.methods):
        return []
    ours = [row for name, row in rows.items() if name not in (PLAIN, row.compared_with) and "/" not in name]
    return [_verdict(row, rows) for row in ours if row.name == AUTO] or [_verdict(row, rows) for row in ours]


def _verdict(row: MethodReport, rows: Mapping[str, MethodReport]) -> str:
    reference = rows[row.compared_with]
    times = f"{row.tokens_per_second / reference.tokens_per_second:.2f} x {reference.name}"
    plain = "" if reference.name == PLAIN else f", {row.speedup_vs_plain:.2f} x plain"
    return f"{row.name}: {times}{plain}; {_same_output(row)}"


def _same_output(row: MethodReport) -> str:
    if row.target_step_share is not None:
        return "another text than the target's"
    if row.identical_to_plain is None:
        return "sampled, so outputs differ by chance"
    if row.identical_to_plain and not row.ties:
        return f"identical on all {row.num_prompts} prompts"
    ties = f", equal up to a numerical tie on {row.ties}" if row.ties else ""
    return f"identical on {row.num_identical} of {row.num_prompts} prompts{ties}"


def environment_line(document: Document) -> str:
    """What the numbers depend on, in short."""
    environment = document.environment
    settings = environment["settings"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("specdec", "transformers", "torch"))
    how = f"temperature {settings['temperature'] or 'of the model'}" if settings["sample"] else "greedy"
    return (
        f"{versions}; {environment['device']}, threads: {environment['threads']}, {environment['dtype']}, "
        f"weights: {environment.get('weights', 'stock')}; {how}, new tokens: {_listed(settings['max_new_tokens'])}, "
        f"batch: {_listed(settings['batch_size'])}, repetitions: {settings['repetitions']} after {settings['warmup']}"
    )


def to_rich(document: Document, width: int) -> RenderableType:
    parts = [part for grid in _grids(document) for part in (*rich_parts(grid, width), Text())]
    parts += [Text(line, style="yellow") for line in _not_available(document)]
    parts.append(Text(environment_line(document), style="dim"))
    return Group(*parts, *(Text(line, style="bold") for line in verdict(document)))


def to_text(document: Document, width: int) -> str:
    """The terminal's tables, `width` characters wide."""
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(to_rich(document, width))
    return capture.get().rstrip("\n")


def to_markdown(document: Document) -> str:
    lines = []
    for grid in _grids(document):
        lines += [*_pipe_table(grid), "", *(f"{line}." for line in grid.legend), ""]
    return "\n".join([*lines, *_not_available(document), environment_line(document), *verdict(document)])


def rich_parts(grid: Grid, width: int) -> list[RenderableType]:
    """A table that fits in so many characters, and its legend."""
    fitting = grid.fitting(width)
    return [_rich_table(fitting), *(Text(line, style="dim") for line in fitting.legend)]


def _rich_table(grid: Grid) -> Table:
    widths = grid.label_widths()
    table = Table(
        title=escape(grid.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for index, heading in enumerate(grid.headings):
        is_label = index < grid.num_labels
        table.add_column(
            heading,
            justify="left" if is_label else "right",
            no_wrap=not is_label,
            overflow="fold",
            min_width=widths[index] if is_label else None,
        )
    for section in grid.sections:
        table.add_section()
        for cells in section:
            table.add_row(*(f"[red]{cell}[/red]" if cell.startswith(NOT_IDENTICAL) else escape(cell) for cell in cells))
    return table


def _pipe_table(grid: Grid) -> list[str]:
    ruler = ["---" if index < grid.num_labels else "--:" for index in range(len(grid.headings))]
    rows = [row for section in grid.sections for row in section]
    return [f"**{grid.title}**", "", *(f"| {' | '.join(cells)} |" for cells in [grid.headings, ruler, *rows])]


def _sections(rows: Sequence[MethodReport]) -> list[list[MethodReport]]:
    """Rows of the same settings and category."""
    sections: dict[tuple[Any, ...], list[MethodReport]] = {}
    for row in rows:
        sections.setdefault((row.batch_size, row.max_new_tokens, row.category), []).append(row)
    return list(sections.values())


def _swept(rows: Sequence[MethodReport]) -> dict[str, str]:
    """Heading and field of what differs between rows."""
    fields = {"batch": "batch_size", "new": "max_new_tokens"}
    return {heading: name for heading, name in fields.items() if len({getattr(row, name) for row in rows}) > 1}


def _labels(row: MethodReport, index: int, swept: dict[str, str]) -> list[str]:
    """What a section has in common stands in its first line only."""
    shared = [*_values(row, swept), row.category]
    return [*(shared if index == 0 else [""] * len(shared)), row.name]


def _values(row: MethodReport, swept: dict[str, str]) -> list[str]:
    return [str(getattr(row, name)) for name in swept.values()]


def _comparison_legend(rows: Sequence[MethodReport]) -> list[str]:
    """Who is compared with a plain decoding of its own."""
    first = rows[0].compared_with
    others = dict.fromkeys(row.compared_with for row in rows if row.compared_with != first)
    line = f"identical: greedy output equals that of {first}"
    return [line] + [f"{other} reads other weights: its family is compared with it" for other in others]


def _not_available(document: Document) -> list[str]:
    is_sweep = bool(_swept(document.methods))
    return [
        f"not available: {one.name}{f' at batch {one.batch_size}' if is_sweep else ''}: {one.reason}"
        for one in document.not_available
    ]


def _listed(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_spread(row: MethodReport) -> str:
    spread = "" if row.tokens_per_second_std is None else f" ±{row.tokens_per_second_std:.1f}"
    return f"{row.tokens_per_second_mean:.1f}{spread}"


def _speedup(row: MethodReport) -> str:
    return f"{row.speedup_vs_plain:.2f}"


def _interval(row: MethodReport) -> str:
    """None where it would look surer than it is: of measurements that were not repeated."""
    if row.speedup_interval is None or row.speedup_interval[0] == row.speedup_interval[1]:
        return _NOT_MEASURED
    low, high = row.speedup_interval
    return f"{low:.2f}-{high:.2f}"


def _by_position(row: MethodReport) -> str:
    shares = (row.acceptance_per_position or [])[:_NUM_POSITIONS]
    return " ".join(f"{100 * share:.0f}" for share in shares) + "%" if shares else _NOT_MEASURED


def _identical(row: MethodReport) -> str:
    if row.identical_to_plain is None:
        return _NOT_MEASURED
    if not row.identical_to_plain:
        return f"{NOT_IDENTICAL} ({row.num_identical}/{row.num_prompts})"
    return f"{row.ties} tied" if row.ties else "yes"


def _milliseconds(value: float | None) -> str:
    return _number(value, ".1f" if value is not None and value < 10 else ".0f")


def _number(value: float | None, spec: str) -> str:
    return _NOT_MEASURED if value is None else format(value, spec)
