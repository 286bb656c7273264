"""The figure of a benchmark: speed-up by category, accepted tokens by round, and one generation over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench.document import Document
from specdec.bench.harness import BatchResult, Settings
from specdec.bench.report import MethodReport
from specdec.bench.running import Run
from specdec.specs import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_ACCEPTED = 10
"""Longer runs of accepted tokens share one bin."""
_GREY = "0.35"
_HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}


def draw(document: Document, results: Sequence[BatchResult], out: Path) -> None:
    """Write the figure; the ending of `out` says in which format. A row of panels for all settings in turn."""
    from matplotlib.figure import Figure

    points = list(dict.fromkeys(result.settings for result in results))
    figure = Figure(figsize=(_width(document), 0.6 + 6.6 * len(points)), layout="constrained")
    figure.suptitle(_title(document), x=0.01, ha="left", fontsize="large", fontweight="bold")
    all_colours = _colours([row.name for row in document.methods])
    parts = figure.subfigures(len(points), squeeze=False, hspace=0.05).flat
    for part, settings in zip(parts, points, strict=True):
        rows = [row for row in document.methods if _is_at(row, settings)]
        colours = {name: all_colours[name] for name in dict.fromkeys(row.name for row in rows)}
        if len(points) > 1:
            title = f"Batch {settings.batch_size}, at most {settings.max_new_tokens} new tokens"
            part.suptitle(title, x=0.01, ha="left")
        speed, acceptance, timeline = part.subplot_mosaic([["speed", "speed"], ["accepted", "time"]]).values()
        confidence = document.environment["settings"]["confidence"]
        speed.set_title(f"Speed-up by category, with its {confidence:.0%} interval", loc="left", fontsize="medium")
        _draw_speedups(speed, rows, colours)
        _draw_acceptance(acceptance, rows, colours)
        _draw_timeline(timeline, [result for result in results if result.settings == settings], colours)
        handles, labels = timeline.get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(out, dpi=150)


def _draw_speedups(axes: Axes, rows: Sequence[MethodReport], colours: dict[str, str]) -> None:
    """Bars by category; the whiskers are the bootstrap intervals."""
    categories = list(dict.fromkeys(row.category for row in rows))
    names = [name for name in colours if name != PLAIN]
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        own = {row.category: row for row in rows if row.name == name}
        positions = np.array([categories.index(category) for category in own]) + (index - (len(names) - 1) / 2) * width
        heights = np.array([row.speedup_vs_plain for row in own.values()])
        axes.bar(positions, heights, width=0.92 * width, color=colours[name])
        ends = [row.speedup_interval or (row.speedup_vs_plain,) * 2 for row in own.values()]
        whiskers = np.maximum([[-1], [1]] * (np.array(ends).T - heights), 0)
        known = np.array([row.speedup_interval is not None for row in own.values()])  # a flat one would look certain
        if known.any():
            style: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 0.8, "capsize": 2}
            axes.errorbar(positions[known], heights[known], yerr=whiskers[:, known], **style)
        for position, height, (_, high) in zip(positions, heights, ends, strict=True):
            above = (position, max(height, high))
            axes.annotate(
                f"{height:.2f}", above, (0, 2), textcoords="offset points", ha="center", fontsize=7, bbox=_HALO
            )
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    right = ("axes fraction", "data")
    axes.annotate("plain", (1, 1), (3, 0), xycoords=right, textcoords="offset points", va="center")
    axes.set_xticks(range(len(categories)), categories)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("speed-up over plain")
    _tidy(axes)


def _draw_acceptance(axes: Axes, rows: Sequence[MethodReport], colours: dict[str, str]) -> None:
    """Share of rounds by number of accepted tokens, over all categories."""
    total = [row for row in rows if row.category == rows[-1].category]
    drafted = [row for row in total if row.accepted_histogram is not None and len(row.accepted_histogram) > 1]
    width = 0.84 / max(len(drafted), 1)
    last = min(_MAX_ACCEPTED, max((len(row.accepted_histogram or []) - 1 for row in drafted), default=1))
    for index, row in enumerate(drafted):
        counts = np.array(row.accepted_histogram)
        binned = np.append(counts[:_MAX_ACCEPTED], counts[_MAX_ACCEPTED:].sum())
        positions = np.arange(len(binned)) + (index - (len(drafted) - 1) / 2) * width
        axes.bar(positions, binned / counts.sum(), width=0.92 * width, color=colours[row.name])
    ticks = [f"{count}+" if count == _MAX_ACCEPTED else f"{count}" for count in range(last + 1)]
    axes.set_xticks(range(last + 1), ticks)
    axes.set_xlabel("drafted tokens accepted in a round")
    axes.set_ylabel("share of rounds")
    axes.set_title("Acceptance, all categories", loc="left", fontsize="medium")
    if not drafted:
        axes.text(0.5, 0.5, "nothing was drafted", transform=axes.transAxes, ha="center", color=_GREY)
    _tidy(axes)


def _draw_timeline(axes: Axes, results: Sequence[BatchResult], colours: dict[str, str]) -> None:
    """The first prompt's generation, of every method the repetition that took the median time."""
    first = results[0]
    drawn = [_typical(first.runs[name]) for name in colours]
    for (name, colour), run in zip(colours.items(), drawn, strict=True):
        seconds = [0.0, *run.token_seconds]
        axes.step(seconds, range(len(seconds)), where="post", color=colour, linewidth=1.6, label=name)
        axes.plot(seconds[-1], len(seconds) - 1, marker="o", markersize=4, color=colour)
    axes.set_xlim(left=0.98 * min(run.token_seconds[0] for run in drawn if run.token_seconds))  # not the prefill
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("seconds since the call")
    axes.set_ylabel("tokens generated")
    prompts = "prompt" if len(first.prompts) == 1 else "batch"
    axes.set_title(f"One generation: the first {prompts} ({first.category})", loc="left", fontsize="medium")
    _tidy(axes)


def _typical(runs: Sequence[Run]) -> Run:
    middle = median_low(run.seconds for run in runs)
    return next(run for run in runs if run.seconds == middle)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Black for plain, a palette for the colour-blind otherwise (Okabe and Ito 2008; brown for its faint yellow)."""
    palette = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C510A", "#999999")
    others = [name for name in dict.fromkeys(names) if name != PLAIN]
    return {PLAIN: "black"} | {name: palette[index % len(palette)] for index, name in enumerate(others)}


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _width(document: Document) -> float:
    num_bars = len({row.name for row in document.methods}) * len({row.category for row in document.methods})
    return min(18.0, max(10.0, 0.22 * num_bars + 3))


def _title(document: Document) -> str:
    environment = document.environment
    weights = environment["settings"].get("weights", "stock")
    return (
        f"{document.model} on {document.suite}: {environment['device']}, {environment['dtype']}"
        f"{'' if weights == 'stock' else f', {weights} weights'}, threads: {environment['threads']}"
    )


def _is_at(row: MethodReport, settings: Settings) -> bool:
    return (row.batch_size, row.max_new_tokens) == (settings.batch_size, settings.max_new_tokens)
