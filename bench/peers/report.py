"""What a contest comes to: rates by category, the ratios that matter, a table and a JSON document."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import specdec
from bench.peers.contest import FLOAT, GGUF, INT8, METRICS, Configuration, Sample, Task
from bench.peers.economized import ECONOMIZE
from specdec import kernels
from specdec.bench.peers import LLAMA_CPP
from specdec.bench.peers.llama_cpp import LlamaFiles, describe
from specdec.specs import AUTO, PLAIN, QUANTIZED_SELF, TRANSFORMERS
from specdec.suites import ALL
from specdec.testing.equality import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A configuration on the prompts of a category, or on `"all"`. Rates: geometric means; None: one-token outputs."""

    category: str
    side: str
    method: str
    decode: float | None
    end_to_end: float | None
    spread: float
    """Of the end-to-end rate: the median over prompts of (fastest - slowest) / median of the repetitions."""
    num_prompts: int
    num_tokens: int
    acceptance_rate: float | None
    num_same: int
    num_ties: int

    @property
    def name(self) -> str:
        return f"{self.side} {self.method}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    what: str
    category: str
    metric: str
    value: float
    bar: float | None
    numerator: str
    denominator: str


def summarise(configurations: list[Configuration], tasks: list[Task]) -> list[Row]:
    parts = {name: [i for i, task in enumerate(tasks) if task.prompt.category == name] for name in categories(tasks)}
    parts[ALL] = list(range(len(tasks)))
    verdicts = {configuration.name: judge_all(configuration, configurations, tasks) for configuration in configurations}
    return [
        to_row(category, one, part, comparable(configurations, part), verdicts[one.name])
        for category, part in parts.items()
        for one in configurations
    ]


def categories(tasks: list[Task]) -> list[str]:
    return list(dict.fromkeys(task.prompt.category for task in tasks))


def comparable(configurations: list[Configuration], part: list[int]) -> list[int]:
    """The prompts on which every configuration has a decode rate."""
    return [i for i in part if all(one.rate(i, "decode") is not None for one in configurations)]


def judge_all(configuration: Configuration, configurations: list[Configuration], tasks: list[Task]) -> list[Verdict]:
    """By task the worst verdict of all repetitions, against the plain decoding of the same weights."""
    plain = next((one for one in configurations if is_plain(one, configuration.side)), configuration)
    return [
        max(configuration.judge(task, sample.output, plain.samples[index][0].output) for sample in samples)
        for index, (task, samples) in enumerate(zip(tasks, configuration.samples, strict=True))
    ]


def is_plain(configuration: Configuration, side: str) -> bool:
    """Of the sides that have transformers' own weights the reference is transformers."""
    if side in (TRANSFORMERS, FLOAT, ECONOMIZE):
        return (configuration.side, configuration.method) == (TRANSFORMERS, PLAIN)
    return (configuration.side, configuration.method) == (side, PLAIN)


def to_row(category: str, one: Configuration, part: list[int], decoded: list[int], verdicts: list[Verdict]) -> Row:
    samples = [sample for index in part for sample in one.samples[index]]
    num_drafted = sum(sample.num_drafted for sample in samples)
    return Row(
        category=category,
        side=one.side,
        method=one.method,
        decode=statistics.geometric_mean(one.rate(i, "decode") for i in decoded) if decoded else None,
        end_to_end=statistics.geometric_mean(one.rate(i, "end_to_end") for i in part),
        spread=statistics.median(spread(one.samples[i]) for i in part),
        num_prompts=len(part),
        num_tokens=sum(one.samples[index][0].num_tokens for index in part),
        acceptance_rate=sum(sample.num_accepted for sample in samples) / num_drafted if num_drafted else None,
        num_same=sum(verdicts[index] is Verdict.IDENTICAL for index in part),
        num_ties=sum(verdicts[index] is Verdict.TIE for index in part),
    )


def spread(samples: list[Sample]) -> float:
    rates = [sample.rates["end_to_end"] for sample in samples]
    return (max(rates) - min(rates)) / statistics.median(rates)


def ratios(rows: list[Row], is_small: bool) -> list[Ratio]:
    """The ratios that matter, by category and metric; those whose sides were not measured are left out."""
    found = [
        ratio
        for category, metric in itertools.product(dict.fromkeys(row.category for row in rows), METRICS)
        for ratio in category_ratios([r for r in rows if r.category == category], category, metric, is_small)
    ]
    return [*found, *over_categories(found)]


def over_categories(found: list[Ratio]) -> Iterator[Ratio]:
    """Float32 beside whatever mode of transformers is the best in each category: the geometric mean over categories."""
    for metric in METRICS:
        each = [
            ratio.value
            for ratio in found
            if (ratio.what, ratio.metric) == ("best float32 / transformers", metric) and ratio.category != ALL
        ]
        if each:
            yield Ratio(
                what="best float32 / transformers, of each category",
                category=ALL,
                metric=metric,
                value=statistics.geometric_mean(each),
                bar=2.0,
                numerator=FLOAT,
                denominator=TRANSFORMERS,
            )


def category_ratios(rows: list[Row], category: str, metric: str, is_small: bool) -> Iterator[Ratio]:
    def best(*sides: str, method: str | None = None) -> Row | None:
        candidates = [row for row in rows if row.side in sides and method in (None, row.method.partition(":")[0])]
        measured = [row for row in candidates if getattr(row, metric) is not None]
        return max(measured, key=lambda row: getattr(row, metric), default=None)

    stock, int8_plain, quantized = best(TRANSFORMERS), best(INT8, method=PLAIN), best(FLOAT, method=QUANTIZED_SELF)
    stock_bar, llama_bar = (4.0, 0.6) if is_small else (5.0, 0.8)
    wanted = [
        ("int8 plain / transformers", int8_plain, stock, stock_bar),
        ("int8 plain / llama.cpp plain", int8_plain, best(LLAMA_CPP, method=PLAIN), llama_bar),
        ("best int8 / best llama.cpp", best(INT8), best(LLAMA_CPP), {"edit": 1.4, "code": 1.0}.get(category)),
        ("gguf plain / llama.cpp plain", best(GGUF, method=PLAIN), best(LLAMA_CPP, method=PLAIN), 1.5),
        ("gguf auto / best llama.cpp", best(GGUF, method=AUTO), best(LLAMA_CPP), {"edit": 2.5}.get(category, 1.5)),
        ("gguf auto / gguf plain", best(GGUF, method=AUTO), best(GGUF, method=PLAIN), 0.97),
        ("quantized-self / transformers", quantized, stock, 2.2),
        ("quantized-self / float32 plain", quantized, best(FLOAT, method=PLAIN), None),
        ("best int8 / transformers", best(INT8), stock, None),
        ("best float32 / transformers", best(FLOAT), stock, None),
        ("best float32 / economize", best(FLOAT), best(ECONOMIZE), None),
    ]
    for what, numerator, denominator, bar in wanted:
        if numerator is not None and denominator is not None:
            yield Ratio(
                what=what,
                category=category,
                metric=metric,
                value=getattr(numerator, metric) / getattr(denominator, metric),
                bar=bar,
                numerator=numerator.name,
                denominator=denominator.name,
            )


def show(document: dict[str, Any], rows: list[Row], found: list[Ratio]) -> None:
    console = Console()
    console.width = console.width if console.is_terminal else 120
    console.print(rates_table(document, rows))
    console.print(ratios_table(found))
    for name, reason in document["not_available"].items():
        console.print(f"not available: {name}: {reason}", markup=False, highlight=False)


def rates_table(document: dict[str, Any], rows: list[Row]) -> Table:
    settings = document["environment"]
    title = f"{document['model']}, {settings['threads']} threads, {settings['max_new_tokens']} new tokens at most"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("category", "side", "method"):
        table.add_column(heading, overflow="fold")
    for heading in (*METRICS.values(), "spread", "accepted", "tokens", "same", "ties"):
        table.add_column(heading, justify="right")
    for category, group in itertools.groupby(rows, key=lambda row: row.category):
        table.add_section()
        for row in group:
            rates = (number(row.decode, ".1f"), number(row.end_to_end, ".1f"), f"{row.spread:.0%}")
            counts = (str(row.num_tokens), f"{row.num_same}/{row.num_prompts}", str(row.num_ties))
            labels = map(escape, (category, row.side, row.method))
            table.add_row(*labels, *rates, number(row.acceptance_rate, ".0%"), *counts)
    return table


def ratios_table(found: list[Ratio]) -> Table:
    table = Table(title="ratios", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("category", "ratio", "metric", "value", "bar", "of"):
        table.add_column(heading, justify="right" if heading in ("value", "bar") else "left")
    for ratio in found:
        colour = "" if ratio.bar is None else "green" if ratio.value >= ratio.bar else "red"
        labels = (escape(ratio.category), ratio.what, ratio.metric.replace("_", " "))
        best = f"{ratio.numerator} / {ratio.denominator}" if "best" in ratio.what else ""
        table.add_row(*labels, f"{ratio.value:.2f}", number(ratio.bar, ".1f"), best, style=colour)
    return table


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def to_json(configurations: list[Configuration], tasks: list[Task], rows: list[Row], found: list[Ratio]) -> dict:
    return {
        "not_available": {one.name: one.unavailable for one in configurations if one.unavailable},
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in found],
        "prompts": [{"category": task.prompt.category, "num_prompt_tokens": len(task.ids)} for task in tasks],
        "samples": {one.name: [list(map(numbers, samples)) for samples in one.samples] for one in configurations},
    }


def numbers(sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in asdict(sample).items() if name != "output"}


def available(configurations: list[Configuration]) -> list[Configuration]:
    return [one for one in configurations if one.decode is not None]


def environment(arguments: argparse.Namespace, files: LlamaFiles) -> dict[str, Any]:
    return {
        "specdec": specdec.__version__,
        "kernels": kernels.describe(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **describe(files),
        "platform": platform.platform(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "max_new_tokens": arguments.max_new_tokens,
        "repetitions": arguments.repetitions,
    }


def is_wrong(row: Row) -> bool:
    return row.num_same + row.num_ties < row.num_prompts
