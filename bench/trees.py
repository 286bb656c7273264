"""Tokens per target forward by growth policy: DySpec's tables on a real pair.

    python -m bench.trees TARGET DRAFT --prompts spec_bench.jsonl --output bench/results/trees
    python -m bench.trees TARGET HEAD --prompts spec_bench.jsonl --output heads --budgets 16 32 --policies Chain DySpec
    python -m bench.trees TARGET DRAFT --prompts spec_bench.jsonl --output bench/results/trees-time --time --limit 1

TARGET and DRAFT are folders or hub ids; both become int8 models. DRAFT may be a draft head (HEAD): one that drafts a
block takes one forward a round for chains and trees alike, and a chain is no longer than its block. The prompts are
Spec-Bench's, in its six tasks. Those whose question id is divisible by 3 are reported; what is measured beforehand
(Sequoia's acceptance vector, DySpec's calibration) comes from the others. Policies share prompts and random seeds.
Sampling is by temperature alone.

Tokens per target forward are committed tokens over rounds (neither counts the prefill and its token). A task's figure
is that of its prompts together, `mean` is the geometric mean of the tasks, brackets hold a 95% bootstrap interval
(prompts resampled within tasks, the same ones for all policies). Greedy outputs must equal the target's own
`generate()`, up to numerical ties: exit code 1 if one does not.

Finished work is kept in OUTPUT.jsonl: a run that was broken off goes on from there, and seeds can be added. The report,
OUTPUT.json and OUTPUT.md, is of all that is there.

--time measures wall time instead, greedily: plain decoding, chains and trees of several sizes take turns. A speed-up is
that of the time after the first token, the draft's prefill included; the median over the repetitions.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import specdec
from bench._script import command, log, pair_parser, pipe_table, write_report
from bench.trees_report import (
    TASKS,
    TOPDOWN,
    TRAVERSAL,
    WALK,
    Table,
    Way,
    geometric_mean,
    ratio_table,
    summarise,
    way_table,
)
from specdec import kernels
from specdec.bench import harness
from specdec.bench.ranks import probe
from specdec.bench.report import mismatches
from specdec.drafters import DraftHead, Plain, SmallModel
from specdec.drafters.head.network import HeadNetwork
from specdec.hf import CACHE
from specdec.model_options import ModelOptions
from specdec.models.pair import load_pair
from specdec.specs import PLAIN
from specdec.suites import Prompt
from specdec.testing.equality import Verdict, compare
from specdec.text.prompting import encode_prompts
from trees import Calibration, Chain, DySpec, DySpecThreshold, GrowthPolicy, Sequoia

LAST_MT_BENCH_ID = 160
"""Spec-Bench counts the eight categories of MT-Bench as one task."""
REPORTED = 3
"""Question ids divisible by this are reported: nothing is tuned on them."""
CHAIN_LENGTHS = (2, 3, 4, 5, 6, 8)
TREE_SIZES = (4, 8, 16, 32)
"""What --time compares."""

SIDES = {
    False: (("Chain", WALK), ("Sequoia", WALK), ("DySpec", WALK), ("DySpecThreshold", WALK)),
    True: (
        ("Chain", TRAVERSAL),
        ("Sequoia", TRAVERSAL),
        ("DySpec", TRAVERSAL),
        ("DySpec calibrated", TRAVERSAL),
        ("DySpec calibrated", TOPDOWN),
    ),
}
"""Policy and verification, by whether tokens are sampled."""
UNMEASURED = ("Chain", "DySpec", "DySpecThreshold")
"""Policies that need nothing to be known beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    id: int
    prompt: Prompt


class Journal:
    """Finished work, one JSON object a line.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._done = {tuple(record["key"]): record["value"] for record in map(json.loads, lines)}
        known = self.once(("settings",), lambda: settings)
        if known != settings:
            raise ValueError(f"{path} is of other settings, {known}: name another output")

    def once(self, key: tuple, work: Callable[[], Any]) -> Any:
        """What `work` returned for this key, now or in an earlier run."""
        if key not in self._done:
            self._done[key] = work()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self._done[key]}) + "\n")
        return self._done[key]

    def having(self, kind: str) -> dict[tuple, Any]:
        """The values of the keys that start with `kind`, which is left out."""
        return {key[1:]: value for key, value in self._done.items() if key[0] == kind}


class Pair:
    """Target and draft, at work on one question at a time."""

    def __init__(
        self, target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_new: int
    ):
        self.target = target
        self.drafter = DraftHead(draft) if isinstance(draft, HeadNetwork) else SmallModel(draft)
        self.tokenizer = tokenizer
        self.num_new = num_new
        self._read: tuple[int, DynamicCache] | None = None
        # checkpoints ask for penalties and nuclei of their own
        config = target.generation_config
        config.repetition_penalty, config.top_k, config.top_p = 1.0, 0, 1.0

    def measure(self, questions: list[Question], temperature: float) -> dict[str, Any]:
        """Sequoia's vector, and DySpec's calibration."""
        settings = harness.Settings(
            max_new_tokens=self.num_new, sample=temperature > 0, temperature=temperature or None
        )
        prompts = [question.prompt for question in questions]
        found = probe(self.target, self.tokenizer, self.drafter, prompts, settings)
        return {"acceptance": found.acceptance, "calibration": asdict(found.calibration) if temperature else None}

    def decode(self, question: Question, way: Way, tree: GrowthPolicy, seed: int) -> dict[str, Any]:
        """The new tokens, and what the rounds after the first token came to."""
        inputs = self._inputs(question)
        cache = self._cache(question.id, inputs["input_ids"])
        out = specdec.generate(
            self.target,
            **inputs,
            **self._options(way.temperature),
            past_key_values=None if isinstance(self.drafter, DraftHead) else cache,  # a head reads the prompt's states
            drafter=self.drafter,
            tree=tree,
            verify=TOPDOWN if way.verify == WALK else way.verify,
            generator=torch.Generator().manual_seed(1000 * seed + question.id),
            return_dict_in_generate=True,
        )
        stats = out.stats
        return {
            "tokens": out.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
            "rounds": stats.num_rounds,
            "committed": stats.num_committed,
            "accepted": stats.num_accepted,
            "size": stats.num_drafted,
            "depth": stats.num_levels,
            "draft_forwards": max(0, stats.draft_forwards - 1),  # without the prefill
        }

    def plain(self, question: Question) -> list[int]:
        """The target's own greedy output."""
        inputs = self._inputs(question)
        cache = self._cache(question.id, inputs["input_ids"])
        ids = self.target.generate(**inputs, **self._options(0.0), **{CACHE: cache})
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def judge(self, question: Question, reference: list[int], output: list[int]) -> Verdict:
        prompt_ids = self._inputs(question)["input_ids"][0]
        return compare(self.target, prompt_ids, reference, output, self._options(0.0)).verdict

    def _inputs(self, question: Question) -> dict[str, torch.Tensor]:
        return dict(encode_prompts(self.tokenizer, [question.prompt.text]))

    def _options(self, temperature: float) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return {"max_new_tokens": self.num_new, **sampling}

    @torch.no_grad()
    def _cache(self, question_id: int, input_ids: torch.Tensor) -> DynamicCache:
        """The prompt but for its last token, read once for all ways to decode a question."""
        if self._read is None or self._read[0] != question_id:
            outputs = self.target(input_ids[:, :-1], use_cache=True, logits_to_keep=1)
            self._read = question_id, outputs[CACHE]
        return copy.deepcopy(self._read[1])


def load_questions(path: Path, *, reported: bool, limit: int) -> list[Question]:
    """`limit` questions of every task, of those that are reported or of the others, evenly spaced; tasks take turns."""
    by_task: dict[str, list[Question]] = {task: [] for task in TASKS}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        task = TASKS[0] if record["question_id"] <= LAST_MT_BENCH_ID else record["category"]
        if (record["question_id"] % REPORTED == 0) == reported:
            prompt = Prompt(text=record["turns"][0], category=task)
            by_task[task].append(Question(id=record["question_id"], prompt=prompt))
    return [some[index * len(some) // limit] for index in range(limit) for some in by_task.values()]


def policy_of(name: str, budget: int, measured: dict[str, Any]) -> GrowthPolicy:
    match name:
        case "Chain":
            return Chain(budget)
        case "Sequoia":
            return Sequoia(budget, tuple(measured["acceptance"]))
        case "DySpec calibrated":
            return DySpec(budget, calibration=Calibration(**measured["calibration"]))
        case "DySpecThreshold":
            return DySpecThreshold(threshold=1 / budget, max_nodes=budget)
    return DySpec(budget)


def measure_tokens(pair: Pair, journal: Journal, questions: list[Question], arguments: argparse.Namespace) -> None:
    """Fill the journal, one temperature after the other."""
    tuning = load_questions(arguments.prompts, reported=False, limit=arguments.tuning_limit)
    for temperature in arguments.temperatures:
        sides = [side for side in SIDES[temperature > 0] if side[0] in (arguments.policies or [side[0]])]
        measured = {}
        if any(policy not in UNMEASURED for policy, _ in sides):
            measured = journal.once(("measured", temperature), partial(pair.measure, tuning, temperature))
        for seed, question in product(range(arguments.seeds if temperature else 1), questions):
            log(f"temperature {temperature}, seed {seed}: {question.prompt.category} {question.id}")
            for budget, (policy, verify) in product(arguments.budgets, sides):
                way = Way(temperature, budget, policy, verify)
                tree = policy_of(policy, budget, measured)
                run = journal.once(("run", *way, question.id, seed), partial(pair.decode, question, way, tree, seed))
                if verify == WALK:
                    plain = journal.once(("plain", question.id), partial(pair.plain, question))
                    judge = partial(pair.judge, question, plain, run["tokens"])
                    journal.once(("verdict", *way, question.id), lambda judge=judge: judge().name)


def report_tokens(journal: Journal, questions: list[Question], heading: dict[str, Any], output: Path) -> list[str]:
    """Write the report; returns what is wrong."""
    tasks = {question.id: question.prompt.category for question in questions}
    runs = {key: run for key, run in journal.having("run").items() if key[-2] in tasks}
    verdicts = journal.having("verdict")
    rows, ratios = [], []
    for temperature in sorted({temperature for temperature, *_ in runs}):
        new_rows, new_ratios = summarise(Table(temperature, runs, tasks))
        rows += new_rows
        ratios += new_ratios
    measured = {str(temperature): value for (temperature,), value in journal.having("measured").items()}
    found = {"measured": measured, "num_ties": list(verdicts.values()).count(Verdict.TIE.name)}
    write(heading | found | {"rows": rows, "ratios": ratios}, output, way_table(rows), ratio_table(ratios))
    return [f"{key} differs from plain decoding" for key, one in verdicts.items() if one == Verdict.DIFFERENT.name]


def measure_time(pair: Pair, questions: list[Question], repetitions: int) -> list[harness.BatchResult]:
    """Plain, chains and trees in turns, greedily."""
    trees = {f"Chain {length}": Chain(length) for length in CHAIN_LENGTHS}
    trees |= {f"DySpec {size}": DySpec(size) for size in TREE_SIZES}
    methods = [harness.Method(PLAIN, Plain())]
    methods += [harness.Method(name, pair.drafter, tree) for name, tree in trees.items()]
    settings = harness.Settings(max_new_tokens=pair.num_new, repetitions=repetitions)
    runner = harness.Harness(pair.target, pair.tokenizer, methods, settings)
    prompts = [question.prompt for question in questions]
    calls = count(1)
    return list(
        runner.run(
            prompts, on_call=lambda call: call.is_over and log(f"call {next(calls)} of {runner.num_calls(prompts)}")
        )
    )


def report_time(results: list[harness.BatchResult], heading: dict[str, Any], output: Path) -> list[str]:
    """Write the report; returns what is wrong."""
    rows = []
    for method in results[0].runs:
        by_task = defaultdict(list)
        for result in results:
            by_task[result.category].append(speedup(result, method))
        speedups = {task: float(geometric_mean(np.array(values))) for task, values in by_task.items()}
        speedups["mean"] = float(geometric_mean(np.array(list(speedups.values()))))
        rows.append({"method": method} | speedups)
    lines = [[row["method"], *(f"{value:.2f}" for value in list(row.values())[1:])] for row in rows]
    write(heading | {"rows": rows}, output, pipe_table(("speed-up", *list(rows[0])[1:]), lines))
    return list(mismatches(results))


def speedup(result: harness.BatchResult, method: str) -> float:
    """Over plain in the same turn; the median of the turns."""
    turns = zip(result.runs[PLAIN], result.runs[method], strict=True)
    return median(seconds_after_first(plain) / seconds_after_first(run) for plain, run in turns)


def seconds_after_first(run: harness.Run) -> float:
    return run.token_seconds[-1] - run.token_seconds[0]


def write(document: dict[str, Any], output: Path, *tables: str) -> None:
    """The document as JSON, and its tables as Markdown."""
    title = f"# {document['target']}, drafted by {document['draft']}"
    write_report(output, document, title, f"    {document['command']}", document["kernels"], *tables)


def parse_arguments() -> argparse.Namespace:
    parser = pair_parser(__doc__, limit=4, max_new_tokens=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64])
    names = sorted({policy for sides in SIDES.values() for policy, _ in sides})
    parser.add_argument("--policies", nargs="+", choices=names, help="all, if absent")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--seeds", type=int, default=1, help="of every question, when sampling")
    parser.add_argument("--tuning-limit", type=int, default=3, help="of each task, for what is measured beforehand")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--repetitions", type=int, default=3, help="with --time")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    questions = load_questions(arguments.prompts, reported=True, limit=arguments.limit)
    options = ModelOptions(dtype="float32", device="cpu", threads=arguments.threads, weights="int8")
    (target, tokenizer, name), draft = load_pair(arguments.target, arguments.draft, options)
    pair = Pair(target, draft.model, tokenizer, arguments.max_new_tokens)
    heading = {
        "target": name,
        "draft": Path(arguments.draft).name,
        "command": command("trees"),
        "kernels": f"int8, {kernels.describe()}, {arguments.threads} threads",
        "versions": {module.__name__: module.__version__ for module in (specdec, torch, transformers)},
        "questions": [question.id for question in questions],
    }
    if arguments.time:
        wrong = report_time(measure_time(pair, questions, arguments.repetitions), heading, arguments.output)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"target": name, "draft": heading["draft"], "max_new_tokens": arguments.max_new_tokens}
        journal = Journal(Path(f"{arguments.output}.jsonl"), settings)
        measure_tokens(pair, journal, questions, arguments)
        wrong = report_tokens(journal, questions, heading, arguments.output)
    for line in wrong:
        log(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
