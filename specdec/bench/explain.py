"""What `auto` did, and whether it knew what it was doing: chosen drafters, predicted and actual tokens per second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from specdec.bench.harness import BatchResult
from specdec.bench.report import trace

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


def to_table(explanations: Sequence[Explanation]) -> Table:
    """For `rich` to print."""
    table = Table(
        title="what was chosen", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for heading in ("category", "method", "drafted by"):
        table.add_column(heading, overflow="fold")
    for heading in ("rounds", "share", "drafted", "committed", "tokens/s predicted", "actual", "plain (predicted)"):
        table.add_column(heading, justify="right")
    for each in explanations:
        numbers = (each.drafted, each.committed, each.predicted, each.actual, each.plain)
        labels = (each.category, each.method, each.drafter, str(each.num_rounds), f"{each.share:.0%}")
        table.add_row(*labels, *(f"{number:.1f}" for number in numbers))
    return table
