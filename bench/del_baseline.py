"""DEL beside fixed exits, on a model that was trained to exit early.

    python -m bench.del_baseline [--model-dir FOLDER] [--steps 500] [--name small] [--trace FILE.jsonl]

A small llama (16 layers) is trained from scratch on six kinds of texts, once (`bench/del_model.py`); one core takes
about a quarter of an hour. All that is compared decodes greedily on prompts that were not trained on:

    plain           no speculation
    best common     the fixed exit and length that are best for all tasks together, found on tuning prompts
    oracle          the fixed exit and length that are best for this task, found on the very prompts that are reported
    DEL             EarlyExit(objective="tokens-per-layer", shadow_share=1): the paper's
    early exit      EarlyExit(): tokens per second

How fixed settings are found: one forward of the target over plain decoding's output says at which positions each exit
agrees with it, so the rounds of every (exit, length) can be counted exactly. Seconds of a round are measured, for each
setting, on texts of several tasks, in CPU time of the thread: other programs do not sway it. The product is compared.

The sides run interleaved in one process with one thread; of each prompt the median of the repetitions counts, prefill
included; tokens must equal plain decoding's but for numerical ties, or the run fails. `tokens/layer` is new tokens over
layers run, times the number of layers: 1 for plain decoding (the paper's eTPL). Results: `bench/results/del-NAME.*`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from bench import del_model
from bench._script import RESULTS, log, parser_of, write_report
from specdec import kernels
from specdec.drafters import Drafter, EarlyExit, Plain
from specdec.testing.equality import Verdict, compare
from specdec.tree_model.early_exit import EarlyExitModel

EXITS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)
PLAIN, COMMON, ORACLE, PAPER, OURS = "plain", "best common", "oracle", "DEL", "early exit"


class Setting(NamedTuple):
    """A fixed exit, and how many tokens it drafts in every round."""

    exit_layer: int
    length: int

    def drafter(self) -> Drafter:
        return EarlyExit(self.exit_layer, num_tokens=self.length)

    def __str__(self) -> str:
        return f"{self.exit_layer}-{self.length}"


@dataclass
class Case:
    """A prompt with plain decoding's output [1, P + N], and at which new tokens each exit agrees: [E, N]."""

    task: str
    prompt_1P: Tensor
    output_1L: Tensor
    agreement: dict[int, list[bool]]

    def num_rounds(self, setting: Setting) -> int:
        """Rounds in which this setting decodes it: each commits its agreed drafts and one more token."""
        agreement, position, rounds = self.agreement[setting.exit_layer], 1, 0  # the prefill yields the first token
        while position < len(agreement):
            longest = min(setting.length, len(agreement) - position - 1)
            accepted = next((i for i in range(longest) if not agreement[position + i]), longest)
            position += accepted + 1
            rounds += 1
        return rounds


@dataclass
class Calls:
    """What the repetitions of one side on one prompt took."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    stats: specdec.DecodingStats | None = None
    num_layers_run: int = 0


class Bench:
    """One model, and the cases that were prepared for it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace):
        self.model = model
        self.tokenizer = tokenizer
        self.num_layers: int = model.config.num_hidden_layers
        self._num_new: int = args.new_tokens
        self._prompt_tokens: int = args.prompt_tokens

    def cases(self, seed: str, count: int) -> list[Case]:
        return [
            self._case(task, prompt_1P)
            for task in del_model.TASKS
            for prompt_1P in del_model.prompts(task, count, seed, self.tokenizer, self._prompt_tokens)
        ]

    @torch.no_grad()
    def _case(self, task: str, prompt_1P: Tensor) -> Case:
        output_1L = self.generate(prompt_1P, Plain()).sequences
        target = EarlyExitModel(self.model)
        target.keep_states(EXITS)
        target.prefill(output_1L[:, :-1])
        before = prompt_1P.shape[1] - 1
        new_N = output_1L[0, before + 1 :]
        agreement = {
            layer: (target.exit_logits(states[:, before:]).argmax(-1)[0] == new_N).tolist()
            for layer, states in target.states.items()
        }
        return Case(task, prompt_1P, output_1L, agreement)

    def generate(self, prompt_1P: Tensor, drafter: Drafter, max_new_tokens: int | None = None) -> Any:
        return specdec.generate(
            self.model,
            prompt_1P,
            attention_mask=torch.ones_like(prompt_1P),
            drafter=drafter,
            max_new_tokens=max_new_tokens or self._num_new,
            do_sample=False,
            return_dict_in_generate=True,
        )

    def round_seconds(self, cases: Sequence[Case], sweeps: int) -> dict[Setting, float]:
        """Median CPU seconds of a round for every setting, over one prompt of each sweep. Settings take turns."""
        seconds: dict[Setting, list[float]] = defaultdict(list)
        for sweep in range(sweeps):
            case = cases[sweep * len(cases) // sweeps]
            prefill_seconds = self._prefill_seconds(case)
            for setting in (Setting(*pair) for pair in product(EXITS, LENGTHS)):
                started = thread_time()
                num_rounds = self.generate(case.prompt_1P, setting.drafter()).stats.num_batch_rounds
                seconds[setting].append((thread_time() - started - prefill_seconds) / num_rounds)
            log(f"  sweep {sweep + 1}/{sweeps}")
        return {setting: median(values) for setting, values in seconds.items()}

    def _prefill_seconds(self, case: Case) -> float:
        """CPU seconds of a call that generates one token."""
        seconds = []
        for _ in range(5):
            started = thread_time()
            self.generate(case.prompt_1P, Plain(), max_new_tokens=1)
            seconds.append(thread_time() - started)
        return median(seconds)

    def time(self, case: Case, drafter: Drafter, calls: Calls) -> None:
        """One more repetition."""
        cpu, wall = thread_time(), perf_counter()
        output = self.generate(case.prompt_1P, drafter)
        calls.wall.append(perf_counter() - wall)
        calls.cpu.append(thread_time() - cpu)
        calls.stats = output.stats
        calls.num_layers_run = self._layers_run(drafter, output.stats)
        prompt_length = case.prompt_1P.shape[1]
        reference, tokens = case.output_1L[0, prompt_length:].tolist(), output.sequences[0, prompt_length:].tolist()
        comparison = compare(self.model, case.prompt_1P[0], reference, tokens, {"do_sample": False})
        if comparison.verdict is Verdict.DIFFERENT:
            sys.exit(f"{case.task}: {drafter} differs from plain decoding: {comparison}")

    def _layers_run(self, drafter: Drafter, stats: specdec.DecodingStats) -> int:
        """The paper's count: d l + L for a round of d drafts from exit l."""
        drafted = 0
        if stats.trace:
            drafted = sum(entry["drafted"][0] * (entry["exit_layer"] or 0) for entry in stats.trace)
        elif isinstance(drafter, EarlyExit):
            assert isinstance(drafter.exit_layer, int)
            drafted = stats.num_drafted * drafter.exit_layer
        return drafted + self.num_layers * stats.num_batch_rounds


def best(settings: dict[Setting, float], cases: Sequence[Case]) -> Setting:
    """The setting with the highest geometric mean of tokens per second over the tasks of these cases."""

    def task_seconds(setting: Setting) -> list[float]:
        rounds: dict[str, int] = defaultdict(int)
        for case in cases:
            rounds[case.task] += case.num_rounds(setting)
        return [count * settings[setting] for count in rounds.values()]

    return min(settings, key=lambda setting: geometric_mean(task_seconds(setting)))


def measure(bench: Bench, cases: Sequence[Case], sides: dict[str, Callable[[Case], Drafter]], repetitions: int) -> Any:
    """Calls of every case and side; sides take turns."""
    bench.time(cases[0], EarlyExit(), Calls())  # the costs are measured once for a model
    results: list[dict[str, Calls]] = [{name: Calls() for name in sides} for _ in cases]
    for repetition in range(repetitions):
        for case, calls in zip(cases, results, strict=True):
            for name, make in sides.items():
                bench.time(case, make(case), calls[name])
        log(f"  repetition {repetition + 1}/{repetitions}")
    return results


def summarise(bench: Bench, cases: Sequence[Case], results: list[dict[str, Calls]]) -> dict[str, dict[str, Any]]:
    """For each task and side: tokens per second of wall and of CPU time, and what was drafted."""
    tasks: dict[str, dict[str, Any]] = {}
    for task in del_model.TASKS:
        mine = [calls for case, calls in zip(cases, results, strict=True) if case.task == task]
        tasks[task] = {name: _summary(bench, [calls[name] for calls in mine]) for name in mine[0]}
    return tasks


def _summary(bench: Bench, calls: Sequence[Calls]) -> dict[str, float]:
    stats = [call.stats for call in calls if call.stats is not None]
    tokens = sum(entry.num_new_tokens for entry in stats)
    committed = sum(entry.num_committed for entry in stats)
    drafted = sum(entry.num_drafted for entry in stats)
    return {
        "tokens_per_second": tokens / sum(median(call.wall) for call in calls),
        "tokens_per_cpu_second": tokens / sum(median(call.cpu) for call in calls),
        "tokens_per_layer": bench.num_layers * committed / sum(call.num_layers_run for call in calls),
        "tokens_per_round": committed / sum(entry.num_rounds for entry in stats),
        "acceptance": sum(entry.num_accepted for entry in stats) / drafted if drafted else 0.0,
        "drafted_per_round": drafted / sum(entry.num_rounds for entry in stats),
        "control_share": sum(entry.control_seconds / entry.total_seconds for entry in stats) / len(stats),
    }


def ratios(tasks: dict[str, dict[str, Any]], unit: str) -> dict[str, float]:
    """The bars: geometric means over the tasks, and the worst task beside its oracle."""

    def over(side: str, other: str) -> list[float]:
        return [task[side][unit] / task[other][unit] for task in tasks.values()]

    return {
        "early exit / plain": geometric_mean(over(OURS, PLAIN)),
        "early exit / best common": geometric_mean(over(OURS, COMMON)),
        "early exit / oracle": geometric_mean(over(OURS, ORACLE)),
        "early exit / oracle, worst task": min(over(OURS, ORACLE)),
        "early exit / DEL": geometric_mean(over(OURS, PAPER)),
        "DEL / best common": geometric_mean(over(PAPER, COMMON)),
    }


def markdown(document: dict[str, Any]) -> str:
    tasks, sides = document["tasks"], (PLAIN, COMMON, ORACLE, PAPER, OURS)
    lines = [f"`{document['command']}`", "", f"Best common setting (exit-length): {document['common']}", ""]
    for unit in ("tokens_per_second", "tokens_per_cpu_second", "tokens_per_layer"):
        lines += [f"| {unit.replace('_', ' ')} | {' | '.join(sides)} | of it: early exit / oracle |"]
        lines += ["|---" * (len(sides) + 2) + "|"]
        for task, rows in tasks.items():
            cells = " | ".join(f"{rows[side][unit]:.2f}" for side in sides)
            oracle = document["oracles"][task]
            lines.append(f"| {task} ({oracle}) | {cells} | {rows[OURS][unit] / rows[ORACLE][unit]:.3f} |")
        lines.append("")
    for unit, bars in document["ratios"].items():
        lines += [f"{unit}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in bars.items()), ""]
    return "\n".join(lines)


def trace(cases: Sequence[Case], results: list[dict[str, Calls]], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the adaptive sides chose, in the form of `specdec bench --trace`."""
    lines = []
    for case, calls in zip(cases, results, strict=True):
        where = {"category": case.task, "prompt": tokenizer.decode(case.prompt_1P[0])}
        for method in (PAPER, OURS):
            stats = calls[method].stats
            for number, entry in enumerate(stats.trace if stats else ()):
                lines.append(json.dumps({**where, "method": method, "repetition": 0, "round": number, **entry}))
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model-dir", type=Path, default=Path("models/early-exit-small"))
    parser.add_argument("--steps", type=int, default=500, help="of training, if the folder holds no model yet")
    parser.add_argument("--tuning-prompts", type=int, default=3, help="of each task")
    parser.add_argument("--report-prompts", type=int, default=3, help="of each task")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--sweeps", type=int, default=6, help="runs of every fixed setting, for its seconds a round")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="small")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what adaptive sides chose, as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.model_dir / "config.json").exists():
        for progress in del_model.train(args.model_dir, args.steps):
            print(f"\r{progress}", end="", file=sys.stderr, flush=True)
    model, tokenizer = del_model.load(args.model_dir)
    bench = Bench(kernels.prepare(model), tokenizer, args)
    tuning, report = bench.cases("tuning", args.tuning_prompts), bench.cases("report", args.report_prompts)
    seconds = bench.round_seconds(tuning, args.sweeps)
    common = best(seconds, tuning)
    oracles = {task: best(seconds, [case for case in report if case.task == task]) for task in del_model.TASKS}
    results = measure(
        bench,
        report,
        {
            PLAIN: lambda _: Plain(),
            COMMON: lambda _: common.drafter(),
            ORACLE: lambda case: oracles[case.task].drafter(),
            PAPER: lambda _: EarlyExit(objective="tokens-per-layer", shadow_share=1),
            OURS: lambda _: EarlyExit(),
        },
        args.repetitions,
    )
    tasks = summarise(bench, report, results)
    document = {
        "command": f"python -m bench.del_baseline {' '.join(sys.argv[1:])}".strip(),
        "torch": torch.__version__,
        "common": str(common),
        "oracles": {task: str(setting) for task, setting in oracles.items()},
        "ratios": {unit: ratios(tasks, unit) for unit in ("tokens_per_second", "tokens_per_cpu_second")},
        "tasks": tasks,
        "round_milliseconds": {str(setting): round(1000 * value, 3) for setting, value in seconds.items()},
    }
    write_report(RESULTS / f"del-{args.name}", document, markdown(document))
    if args.trace is not None:
        args.trace.write_text(trace(report, results, tokenizer))
    print(markdown(document))


if __name__ == "__main__":
    main()
