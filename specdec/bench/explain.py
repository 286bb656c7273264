"""What `auto` did, and whether it knew what it was doing: chosen drafters, predicted and actual tokens per second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.bench.harness import BatchResult
from specdec.bench.report import trace
from specdec.bench.tables import Grid

NOBODY = "(plain)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The rounds of one category that one drafter drafted, or nobody.

    Args:
        drafted: tokens a round of a row, on average.
        committed: likewise, the bonus included.
        predicted, actual: tokens per second of these rounds, as expected before them and as they were.
        plain: tokens per second that plain decoding was expected to make instead.
    """

    category: str
    method: str
    drafter: str
    num_rounds: int
    share: float
    drafted: float
    committed: float
    predicted: float
    actual: float
    plain: float


def explain(results: Sequence[BatchResult]) -> list[Explanation]:
    """Of every method that says for each round what it expects of it, as `Auto` does."""
    rounds: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for choice in trace(results):
        if "expected_ms" in choice:
            rounds[choice["category"], choice["method"]].append(choice)
    return [
        _explanation(category, method, drafter, chosen, len(choices))
        for (category, method), choices in rounds.items()
        for drafter, chosen in _by_drafter(choices)
    ]


def _by_drafter(choices: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for choice in choices:
        groups[choice["drafter"] or NOBODY].append(choice)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _explanation(
    category: str, method: str, drafter: str, choices: Sequence[dict[str, Any]], num_all: int
) -> Explanation:
    num_rows = sum(len(choice["committed"]) for choice in choices)
    committed = sum(sum(choice["committed"]) for choice in choices)
    return Explanation(
        category=category,
        method=method,
        drafter=drafter,
        num_rounds=len(choices),
        share=len(choices) / num_all,
        drafted=sum(sum(choice["drafted"]) for choice in choices) / num_rows,
        committed=committed / num_rows,
        predicted=_per_second(sum(choice["expected_tokens"] for choice in choices), choices, "expected_ms"),
        actual=_per_second(committed, choices, "ms"),
        plain=_per_second(num_rows, choices, "plain_ms"),
    )


def _per_second(tokens: float, choices: Sequence[dict[str, Any]], milliseconds: str) -> float:
    return 1000 * tokens / sum(choice[milliseconds] for choice in choices)


def to_grid(explanations: Sequence[Explanation]) -> Grid:
    """For people: tokens per second as predicted and as they were, and what plain decoding would have made."""
    return Grid(
        title="what was chosen, in tokens per second",
        headings=["category", "method", "drafted by", *_NUMBERS],
        num_labels=3,
        sections=[[_cells(each) for each in explanations]],
        legend=["drafted, committed: tokens a round; plain: as predicted"],
        spare=("share", "drafted", "rounds"),
    )


_NUMBERS = ("rounds", "share", "drafted", "committed", "predicted", "actual", "plain")


def _cells(each: Explanation) -> list[str]:
    numbers = (each.drafted, each.committed, each.predicted, each.actual, each.plain)
    labels = (each.category, each.method, each.drafter, str(each.num_rounds), f"{each.share:.0%}")
    return [*labels, *(f"{number:.1f}" for number in numbers)]
