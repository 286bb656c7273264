"""What the runs come to: one row per method and category, as a table and as a JSON document."""

import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import transformers
from rich import box
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

import specdec
from specdec.bench.equality import TIE_BOUND, Verdict
from specdec.bench.harness import BatchResult, Method, Run, Settings
from specdec.bench.methods import PLAIN
from specdec.bench.suite import ALL

_LEGEND = "tok/round counts the bonus token; tok/s = tokens / sum of median seconds; speedup = tok/s vs plain"
_TREE_LEGEND = "per round: calls of the draft model (its prefill included), depth and nodes of a row's tree"
_NUMBERS = ("tok/s", "speedup", "tok/round", "accept", "identical", "TTFT ms", "ms p50/90/99", "MiB")
_TREE_NUMBERS = ("tok/s", "speedup", "tok/round", "calls", "depth", "nodes", "accept", "identical")
_NOT_MEASURED = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodReport:
    """One method on one category, or on `"all"`; the fields are those of the JSON document.

    `tokens_per_second` is the number of new tokens over the sum of each batch's median seconds. `ttft_ms` is
    the median over all runs. In `ms_per_token`, the time between two commits is shared out evenly among the
    tokens of the later one, and the first commit is left out. None: not applicable, or not measurable.
    """

    name: str
    category: str
    tokens_per_second: float
    speedup_vs_plain: float
    tokens_per_round: float | None
    acceptance_rate: float | None
    tokens_per_target_forward: float | None
    draft_forwards_per_round: float | None
    mean_depth: float | None
    mean_size: float | None
    identical_to_plain: bool | None
    ties: int | None
    num_prompts: int
    num_tokens: int
    ttft_ms: float
    ms_per_token: dict[str, float | None]
    peak_memory_mib: float | None


def summarise(results: list[BatchResult]) -> list[MethodReport]:
    """A report per category and method, then one per method over all categories."""
    categories = dict.fromkeys(result.category for result in results)
    parts = {name: [result for result in results if result.category == name] for name in categories}
    parts[ALL] = results
    return [_report(method, name, part) for name, part in parts.items() for method in part[0].runs]


def mismatches(results: list[BatchResult]) -> Iterator[str]:
    """A line for every greedy output that differs from the reference's by more than a tie."""
    for result in results:
        for method, comparisons in result.comparisons.items():
            for prompt, comparison in zip(result.prompts, comparisons, strict=True):
                if comparison.verdict is Verdict.DIFFERENT:
                    where = f"{result.category} prompt {prompt.text[:50]!r}"
                    yield f"{method} differs from {result.reference} on {where}: {comparison}"


def trace(results: list[BatchResult]) -> Iterator[dict[str, Any]]:
    """What drafters that choose have chosen, round by round, in every timed call."""
    for result in results:
        for method, runs in result.runs.items():
            for repetition, run in enumerate(runs):
                choices = [] if run.stats is None else run.stats.trace
                where = {"category": result.category, "prompt": result.prompts[0].text, "method": method}
                for number, choice in enumerate(choices):
                    yield {**where, "repetition": repetition, "round": number, **choice}


def to_json(
    results: list[BatchResult],
    *,
    model: PreTrainedModel,
    model_name: str,
    suite_name: str,
    methods: Sequence[Method],
    settings: Settings,
) -> dict[str, object]:
    """The document of `specdec bench --json`."""
    trees = {method.name: repr(method.tree) for method in methods if method.tree is not None}
    return {
        "environment": _environment(model, asdict(settings) | {"reference": results[0].reference, "trees": trees}),
        "model": model_name,
        "suite": suite_name,
        "methods": [asdict(report) for report in summarise(results)],
    }


def _environment(model: PreTrainedModel, settings: dict[str, object]) -> dict[str, object]:
    """What the numbers depend on besides the model and the prompts."""
    return {
        "specdec": specdec.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "settings": settings | {"tie_bound": TIE_BOUND[model.dtype]},
    }


def to_table(reports: list[MethodReport], *, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("category", "method"):
        table.add_column(heading, overflow="fold")
    headings = _TREE_NUMBERS if _has_trees(reports) else _NUMBERS
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for report in reports:
        if previous not in (None, report.category):
            table.add_section()
        category = "" if report.category == previous else escape(report.category)
        cells = _cells(report)
        table.add_row(category, escape(report.name), *(cells[heading] for heading in headings))
        previous = report.category
    return table


def legend(reports: list[MethodReport]) -> str:
    """What the table's headings mean."""
    return f"{_LEGEND}\n{_TREE_LEGEND}" if _has_trees(reports) else _LEGEND


def _has_trees(reports: list[MethodReport]) -> bool:
    """Whether anything but chains was drafted."""
    return any((report.mean_size or 0) > (report.mean_depth or 0) for report in reports)


def _cells(report: MethodReport) -> dict[str, str]:
    latencies = [_milliseconds(value) for value in report.ms_per_token.values()]
    return {
        "tok/s": _number(report.tokens_per_second, ".1f"),
        "speedup": _number(report.speedup_vs_plain, ".2f"),
        "tok/round": _number(report.tokens_per_round, ".2f"),
        "calls": _number(report.draft_forwards_per_round, ".1f"),
        "depth": _number(report.mean_depth, ".1f"),
        "nodes": _number(report.mean_size, ".1f"),
        "accept": _number(report.acceptance_rate, ".0%"),
        "identical": _identical(report),
        "TTFT ms": _milliseconds(report.ttft_ms),
        "ms p50/90/99": "/".join(latencies),
        "MiB": _number(report.peak_memory_mib, ".0f"),
    }


def _identical(report: MethodReport) -> str:
    if report.identical_to_plain is None:
        return _NOT_MEASURED
    if not report.identical_to_plain:
        return "[red]NO[/red]"
    return f"{report.ties} tied" if report.ties else "yes"


def _milliseconds(value: float | None) -> str:
    return _number(value, ".1f" if value is not None and value < 10 else ".0f")


def _number(value: float | None, spec: str) -> str:
    return _NOT_MEASURED if value is None else format(value, spec)


def _report(method: str, category: str, results: list[BatchResult]) -> MethodReport:
    runs = [run for result in results for run in result.runs[method]]
    verdicts = [comparison.verdict for result in results for comparison in result.comparisons.get(method, [])]
    tokens_per_second = _tokens_per_second(method, results)
    peaks = [run.peak_memory_mib for run in runs if run.peak_memory_mib is not None]
    return MethodReport(
        name=method,
        category=category,
        tokens_per_second=tokens_per_second,
        speedup_vs_plain=tokens_per_second / _tokens_per_second(PLAIN, results),
        tokens_per_round=_ratio(runs, "num_committed", "num_rounds"),
        acceptance_rate=_ratio(runs, "num_accepted", "num_drafted"),
        tokens_per_target_forward=_ratio(runs, "num_new_tokens", "target_forwards"),
        draft_forwards_per_round=_ratio(runs, "draft_forwards", "num_batch_rounds"),
        mean_depth=_ratio(runs, "num_levels", "num_rounds"),
        mean_size=_ratio(runs, "num_drafted", "num_rounds"),
        identical_to_plain=Verdict.DIFFERENT not in verdicts if verdicts else None,
        ties=verdicts.count(Verdict.TIE) if verdicts else None,
        num_prompts=sum(len(result.prompts) for result in results),
        num_tokens=sum(result.runs[method][0].num_tokens for result in results),
        ttft_ms=1e3 * median(run.token_seconds[0] for run in runs),
        ms_per_token=_percentiles([cost for run in runs for cost in token_costs_ms(run.token_seconds)]),
        peak_memory_mib=max(peaks, default=None),
    )


def _tokens_per_second(method: str, results: list[BatchResult]) -> float:
    num_tokens = sum(result.runs[method][0].num_tokens for result in results)
    return num_tokens / sum(median(run.seconds for run in result.runs[method]) for result in results)


def _ratio(runs: list[Run], numerator: str, denominator: str) -> float | None:
    """The ratio of two counts, each summed over the runs; None if there are none to divide by."""
    stats = [run.stats for run in runs if run.stats is not None]
    total = sum(getattr(one, denominator) for one in stats)
    return sum(getattr(one, numerator) for one in stats) / total if total else None


def token_costs_ms(token_seconds: list[float]) -> list[float]:
    """The cost of every token after the first commit; the tokens of one commit share a stamp."""
    num_tokens_at = Counter(token_seconds)
    return [
        1e3 * (stamp - previous) / num_tokens_at[stamp]
        for previous, stamp in pairwise(sorted(num_tokens_at))
        for _ in range(num_tokens_at[stamp])
    ]


def _percentiles(values: list[float]) -> dict[str, float | None]:
    """Nearest-rank percentiles."""
    ranked = sorted(values)
    return {
        f"p{percent}": ranked[math.ceil(percent / 100 * len(ranked)) - 1] if ranked else None
        for percent in (50, 90, 99)
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return str(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"
