"""What the runs come to: one row per method and category."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median, stdev
from typing import Any

from specdec.bench.harness import BatchResult, Settings
from specdec.bench.intervals import Timing, speedup_interval
from specdec.bench.running import Run
from specdec.specs import PLAIN
from specdec.suites import ALL
from specdec.testing.equality import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodReport:
    """One method on one category, or on `"all"`; the fields are those of the JSON document (`schema.json`).

    `tokens_per_second` is the number of new tokens over the sum of each batch's median seconds; `_mean` and `_std` are
    over repetitions, each of them tokens over seconds. `ttft_ms` is the median over all runs. In `ms_per_token`, the
    time between two commits is shared out evenly among the tokens of the later one, and the first commit is left out.
    `accepted_histogram[n]` counts rounds that accepted n drafted tokens, `acceptance_per_position[n]` is the share of
    rounds that accepted more than n. The last fields are of rows with a router: shares of its steps and tokens that the
    target wrote, tokens that were drafted in vain for each one of the text, and the router's own time. None: not
    applicable, or not measurable.
    """

    name: str
    category: str
    batch_size: int
    max_new_tokens: int
    tokens_per_second: float
    tokens_per_second_mean: float
    tokens_per_second_std: float | None
    speedup_vs_plain: float
    speedup_interval: tuple[float, float] | None
    tokens_per_round: float | None
    acceptance_rate: float | None
    acceptance_per_position: list[float] | None
    accepted_histogram: list[int] | None
    tokens_per_target_forward: float | None
    draft_forwards_per_round: float | None
    mean_depth: float | None
    mean_size: float | None
    identical_to_plain: bool | None
    compared_with: str
    num_identical: int | None
    ties: int | None
    num_prompts: int
    num_tokens: int
    ttft_ms: float
    ms_per_token: dict[str, float | None]
    peak_memory_mib: float | None
    target_step_share: float | None = None
    target_token_share: float | None = None
    vain_tokens_per_token: float | None = None
    router_us_per_step: float | None = None
    router_time_share: float | None = None


def summarise(results: Sequence[BatchResult]) -> list[MethodReport]:
    """For all settings in turn: a report per category and method, then one per method over all categories.

    A method that is missing on some batch, a peer that failed there, has none: its prompts would be others.
    """
    return [
        _report(method, category, part)
        for settings in dict.fromkeys(result.settings for result in results)
        for category, part, methods in _parts([result for result in results if result.settings == settings])
        for method in methods
    ]


def _parts(results: list[BatchResult]) -> Iterator[tuple[str, list[BatchResult], list[str]]]:
    methods = [name for name in results[0].runs if all(name in result.runs for result in results)]
    for category in dict.fromkeys(result.category for result in results):
        yield category, [result for result in results if result.category == category], methods
    yield ALL, results, methods


def mismatches(results: Sequence[BatchResult], *, of_peers: bool = False) -> Iterator[str]:
    """A line for every greedy output of specdec, or of its peers, that differs from its reference and is no tie."""
    for result in results:
        for method, comparisons in result.comparisons.items():
            if (method in result.peers) is not of_peers:
                continue
            reference = result.references.get(method, result.reference)
            for prompt, comparison in zip(result.prompts, comparisons, strict=True):
                if comparison.verdict is Verdict.DIFFERENT:
                    where = f"{result.category} prompt {prompt.text[:50]!r}"
                    yield f"{method} differs from {reference} on {where}: {comparison}"


def trace(results: Sequence[BatchResult]) -> Iterator[dict[str, Any]]:
    """What drafters that choose have chosen, round by round, in every timed call."""
    for result in results:
        for method, runs in result.runs.items():
            for repetition, run in enumerate(runs):
                choices = [] if run.stats is None else run.stats.trace
                where = {"category": result.category, "prompt": result.prompts[0].text, "method": method}
                for number, choice in enumerate(choices):
                    yield {**where, "repetition": repetition, "round": number, **choice}


def _report(method: str, category: str, results: list[BatchResult]) -> MethodReport:
    runs = [run for result in results for run in result.runs[method]]
    verdicts = [comparison.verdict for result in results for comparison in result.comparisons.get(method, [])]
    tokens_per_second = _tokens_per_second(method, results)
    rates = _rates(method, results)
    histogram = _accepted_histogram(runs)
    peaks = [run.peak_memory_mib for run in runs if run.peak_memory_mib is not None]
    settings: Settings = results[0].settings
    return MethodReport(
        name=method,
        category=category,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        tokens_per_second=tokens_per_second,
        tokens_per_second_mean=mean(rates),
        tokens_per_second_std=stdev(rates) if len(rates) > 1 else None,
        speedup_vs_plain=tokens_per_second / _tokens_per_second(PLAIN, results),
        speedup_interval=None if method == PLAIN else speedup_interval([_timing(method, one) for one in results]),
        tokens_per_round=_ratio(runs, "num_committed", "num_rounds"),
        acceptance_rate=_ratio(runs, "num_accepted", "num_drafted"),
        acceptance_per_position=None if histogram is None else _per_position(histogram),
        accepted_histogram=histogram,
        tokens_per_target_forward=_ratio(runs, "num_new_tokens", "target_forwards"),
        draft_forwards_per_round=_ratio(runs, "draft_forwards", "num_batch_rounds"),
        mean_depth=_ratio(runs, "num_levels", "num_rounds"),
        mean_size=_ratio(runs, "num_drafted", "num_rounds"),
        identical_to_plain=Verdict.DIFFERENT not in verdicts if verdicts else None,
        compared_with=results[0].references.get(method, results[0].reference),
        num_identical=verdicts.count(Verdict.IDENTICAL) if verdicts else None,
        ties=verdicts.count(Verdict.TIE) if verdicts else None,
        num_prompts=sum(len(result.prompts) for result in results),
        num_tokens=sum(result.runs[method][0].num_tokens for result in results),
        ttft_ms=1e3 * median(run.token_seconds[0] for run in runs),
        ms_per_token=_percentiles([cost for run in runs for cost in token_costs_ms(run.token_seconds)]),
        peak_memory_mib=max(peaks, default=None),
        **_routed(runs),
    )


def _routed(runs: list[Run]) -> dict[str, float]:
    """What is only there to be said of a method with a router."""
    routed = [run.stats for run in runs if run.stats is not None and run.stats.steps]
    steps = [step for stats in routed for step in stats.steps]
    if not steps:
        return {}
    num_tokens, router_seconds = sum(step.num_tokens for step in steps), sum(stats.router_seconds for stats in routed)
    return {
        "target_step_share": sum(step.writer == "target" for step in steps) / len(steps),
        "target_token_share": sum(step.num_tokens for step in steps if step.writer == "target") / num_tokens,
        "vain_tokens_per_token": sum(step.num_discarded for step in steps) / num_tokens,
        "router_us_per_step": 1e6 * router_seconds / len(steps),
        "router_time_share": router_seconds / sum(run.seconds for run in runs),
    }


def _tokens_per_second(method: str, results: list[BatchResult]) -> float:
    num_tokens = sum(result.runs[method][0].num_tokens for result in results)
    return num_tokens / sum(median(run.seconds for run in result.runs[method]) for result in results)


def _rates(method: str, results: list[BatchResult]) -> list[float]:
    """Tokens per second over all batches, by repetition."""
    turns = zip(*(result.runs[method] for result in results), strict=True)
    return [sum(run.num_tokens for run in runs) / sum(run.seconds for run in runs) for runs in turns]


def _timing(method: str, result: BatchResult) -> Timing:
    runs, plain = result.runs[method], result.runs[PLAIN]
    return Timing(
        stratum=result.category,
        seconds=[run.seconds for run in runs],
        num_tokens=runs[0].num_tokens,
        plain_seconds=[run.seconds for run in plain],
        num_plain_tokens=plain[0].num_tokens,
    )


def _ratio(runs: list[Run], numerator: str, denominator: str) -> float | None:
    """The ratio of two counts, each summed over the runs; None if nobody counted, or there are none to divide by."""
    pairs = [(getattr(run.counts, numerator, None), getattr(run.counts, denominator, None)) for run in runs]
    counted = [(above, below) for above, below in pairs if above is not None and below is not None]
    total = sum(below for _, below in counted)
    return sum(above for above, _ in counted) / total if total else None


def _accepted_histogram(runs: list[Run]) -> list[int] | None:
    """By number of accepted tokens how many rounds."""
    total: Counter[int] = Counter()
    for run in runs:
        total.update(getattr(run.counts, "accepted_histogram", None) or {})
    return [total[count] for count in range(max(total) + 1)] if total else None


def _per_position(histogram: list[int]) -> list[float]:
    num_rounds = sum(histogram)
    return [sum(histogram[position:]) / num_rounds for position in range(1, len(histogram))]


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
