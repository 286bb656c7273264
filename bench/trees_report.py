"""What the growth policies of `bench.trees` come to: tokens per target forward, their ratios, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench._script import pipe_table

TASKS = ("mt-bench", "translation", "summarization", "qa", "math_reasoning", "rag")
NUM_RESAMPLES = 2000
WALK, TOPDOWN, TRAVERSAL = "walk", "topdown", "traversal"
BARS = {
    (0.0, ("DySpec", WALK), ("Sequoia", WALK)): {16: 1.10, 32: 1.10, 64: 1.10},
    (0.0, ("DySpec", WALK), ("Chain", WALK)): {16: 1.10, 32: 1.10, 64: 1.25},
    (0.6, ("DySpec calibrated", TRAVERSAL), ("Sequoia", TRAVERSAL)): {16: 1.05, 32: 1.05, 64: 1.05},
    (0.6, ("DySpec calibrated", TRAVERSAL), ("Chain", TRAVERSAL)): {16: 1.10, 32: 1.10, 64: 1.25},
    (0.6, ("DySpec calibrated", TRAVERSAL), ("DySpec calibrated", TOPDOWN)): {16: 1.00, 32: 1.00, 64: 1.00},
}
"""The ratios that matter: temperature, numerator, denominator; what each should be at least, by budget."""
PER_ROUND = ("draft_forwards", "depth", "size", "accepted")


class Way(NamedTuple):
    """Of decoding a question."""

    temperature: float
    budget: int
    policy: str
    verify: str


class Table:
    """What the ways at one temperature come to, on the questions (and seeds) that all of them have decoded.

    Shape legend: W ways, Q questions, S resamples, K tasks.

    Args:
        runs: by the fields of `Way`, question id and seed.
        tasks: of every question.
    """

    def __init__(self, temperature: float, runs: dict[tuple, dict[str, Any]], tasks: dict[int, str]):
        by_way: dict[Way, dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
        for (*way, question, seed), run in runs.items():
            if way[0] == temperature:
                by_way[Way(*way)][question, seed] = run
        common = sorted(set.intersection(*map(set, by_way.values())))
        questions = sorted({question for question, _ in common})
        self.runs = {way: [by_way[way][key] for key in common] for way in sorted(by_way)}
        self._question_of_run = [questions.index(question) for question, _ in common]
        self._task_QK = np.array([[tasks[question] == task for task in TASKS] for question in questions], float)

    def average(self, way: Way, name: str) -> float:
        """Of a round."""
        return sum(run[name] for run in self.runs[way]) / sum(run["rounds"] for run in self.runs[way])

    def rates_WK(self) -> np.ndarray:
        """Tokens per target forward in every task."""
        return self._rates(np.arange(len(self._task_QK))[None])[:, 0]

    def resampled_means_WS(self) -> np.ndarray:
        """Means over the tasks, with each task's questions drawn anew."""
        generator = np.random.default_rng(0)
        chosen_SQ = np.empty((NUM_RESAMPLES, len(self._task_QK)), int)
        for task_Q in self._task_QK.T:
            members = np.flatnonzero(task_Q)
            chosen_SQ[:, members] = generator.choice(members, (NUM_RESAMPLES, len(members)))
        return geometric_mean(self._rates(chosen_SQ))

    def _rates(self, chosen_SQ: np.ndarray) -> np.ndarray:
        committed_WQ, rounds_WQ = (self._sums(name) for name in ("committed", "rounds"))
        return (committed_WQ[:, chosen_SQ] @ self._task_QK) / (rounds_WQ[:, chosen_SQ] @ self._task_QK)

    def _sums(self, name: str) -> np.ndarray:
        """[W, Q]: over the seeds."""
        counts = [[run[name] for run in runs] for runs in self.runs.values()]
        return np.array([np.bincount(self._question_of_run, row) for row in counts])


def geometric_mean(rates: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return np.exp(np.log(rates).mean(-1))


def interval_of(samples_S: np.ndarray) -> list[float]:
    return np.percentile(samples_S, (2.5, 97.5)).tolist()


def summarise(table: Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for every way, and the ratios between them."""
    rates_WK, samples_WS = table.rates_WK(), table.resampled_means_WS()
    means = dict(zip(table.runs, geometric_mean(rates_WK).tolist(), strict=True))
    samples = dict(zip(table.runs, samples_WS, strict=True))
    rows = [
        way._asdict()
        | dict(zip(TASKS, rates_K, strict=True))
        | {"mean": means[way], "interval": interval_of(samples[way]), "num_runs": len(table.runs[way])}
        | {name: table.average(way, name) for name in PER_ROUND}
        for way, rates_K in zip(table.runs, rates_WK.tolist(), strict=True)
    ]
    ratios = []
    for (temperature, *sides), bars in BARS.items():
        for budget, bar in bars.items():
            above, below = (Way(temperature, budget, *side) for side in sides)
            if above in means and below in means:
                ratio = {"temperature": temperature, "budget": budget, "above": sides[0], "below": sides[1], "bar": bar}
                value, interval = means[above] / means[below], interval_of(samples[above] / samples[below])
                ratios.append(ratio | {"value": value, "interval": interval})
    return rows, ratios


def way_table(rows: list[dict[str, Any]]) -> str:
    headings = ("T", "policy", "verified by", "nodes", *TASKS, "mean", "draft calls", "depth", "size", "accepted")
    lines = [
        [
            *(row[name] for name in ("temperature", "policy", "verify", "budget")),
            *(f"{row[task]:.2f}" for task in TASKS),
            with_interval(row["mean"], row["interval"]),
            *(f"{row[name]:.1f}" for name in PER_ROUND),
        ]
        for row in rows
    ]
    return pipe_table(headings, lines)


def ratio_table(ratios: list[dict[str, Any]]) -> str:
    lines = [
        [
            ratio["temperature"],
            " / ".join(" ".join(ratio[side]) for side in ("above", "below")),
            ratio["budget"],
            with_interval(ratio["value"], ratio["interval"]),
            f"{ratio['bar']:.2f}",
        ]
        for ratio in ratios
    ]
    return pipe_table(("T", "ratio of means", "nodes", "value", "at least"), lines)


def with_interval(value: float, interval: Sequence[float]) -> str:
    return f"**{value:.2f}** [{interval[0]:.2f}, {interval[1]:.2f}]"
