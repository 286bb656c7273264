"""Draws what an adaptive drafter did over one generation: exit layer, draft length and acceptance.

    python -m bench.figures TRACE.jsonl OUT.png [--category NAME] [--method NAME] [--repetition 0]

TRACE.jsonl is written by `specdec bench --trace` or `python -m bench.del --trace`; the first generation in it that fits
is drawn. OUT may be any kind of file that matplotlib writes (.png, .svg, .pdf). It is needed here only: `pip install
matplotlib`.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Entry = dict[str, Any]


def read(path: Path, **wanted: str | int | None) -> list[Entry]:
    """The rounds of the first generation that fits; None fits everything."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    fitting = [entry for entry in entries if all(value is None or entry[key] == value for key, value in wanted.items())]
    keys = ("category", "prompt", "method", "repetition")
    return [entry for entry in fitting if all(entry[key] == fitting[0][key] for key in keys)]


def draw(rounds: list[Entry], out: Path) -> None:
    """Three panels over the tokens that had been generated when each round began; rows of a batch are averaged."""
    committed = [float(np.mean(entry["committed"])) for entry in rounds]
    starts = [0.0, *accumulate(committed)][:-1]
    figure, (exits, lengths, acceptance) = plt.subplots(
        3, sharex=True, figsize=(9, 7), layout="constrained", height_ratios=(3, 2, 3)
    )
    first = rounds[0]
    figure.suptitle(f"{first['method']}, {first['category']}: {len(rounds)} rounds, {sum(committed):.0f} tokens")
    _draw_exits(exits, starts, rounds)
    _draw_lengths(lengths, starts, rounds, committed)
    _draw_acceptance(acceptance, starts, rounds)
    for axes in (exits, lengths, acceptance):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    acceptance.set_xlabel("tokens generated")
    figure.savefig(out, dpi=150)


def _draw_exits(axes: Axes, starts: list[float], rounds: list[Entry]) -> None:
    layers = [np.nan if entry["exit_layer"] is None else entry["exit_layer"] for entry in rounds]
    axes.step(starts, layers, where="post", color="tab:blue")
    axes.set_ylabel("exit layer")
    axes.set_ylim(0, max(map(int, rounds[0]["acceptance"])) + 1)
    for start, entry in zip(starts, rounds, strict=True):
        if entry["exit_layer"] is None:
            axes.axvline(start, color="0.85", linewidth=1, zorder=0)
    axes.set_title("a gap on grey: no speculation", loc="right", fontsize="small")


def _draw_lengths(axes: Axes, starts: list[float], rounds: list[Entry], committed: list[float]) -> None:
    drafted = [float(np.mean(entry["drafted"])) for entry in rounds]
    axes.bar(starts, drafted, width=committed, align="edge", color="0.8", label="drafted")
    accepted = [count - 1 for count in committed]  # the last token of a round is the target's own
    axes.bar(starts, accepted, width=committed, align="edge", color="tab:green", label="accepted")
    axes.set_ylabel("tokens")
    axes.legend(loc="upper right", fontsize="small")


def _draw_acceptance(axes: Axes, starts: list[float], rounds: list[Entry]) -> None:
    """What each exit was believed to be worth (colour), and the exit that drafted (line)."""
    layers = sorted(map(int, rounds[0]["acceptance"]))
    believed_ER = np.array([[entry["acceptance"][str(layer)] for entry in rounds] for layer in layers])
    edges_R = [*starts, starts[-1] + 1]
    edges_E = [*(layer - 0.5 for layer in layers), layers[-1] + 0.5]
    mesh = axes.pcolormesh(edges_R, edges_E, believed_ER, vmin=0, vmax=1, cmap="viridis")
    axes.figure.colorbar(mesh, ax=axes, label="acceptance", pad=0.01)
    axes.step(
        starts,
        [np.nan if entry["exit_layer"] is None else entry["exit_layer"] for entry in rounds],
        where="post",
        color="white",
        linewidth=1,
    )
    axes.set_ylabel("exit layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--category")
    parser.add_argument("--method")
    parser.add_argument("--repetition", type=int, default=0)
    args = parser.parse_args()
    rounds = read(args.trace, category=args.category, method=args.method, repetition=args.repetition)
    if not rounds:
        sys.exit(f"{args.trace} holds no generation of that kind")
    draw(rounds, args.out)


if __name__ == "__main__":
    main()
