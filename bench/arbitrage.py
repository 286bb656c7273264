"""Accuracy against latency and escalation: every router, random routing at equal rate, and token-level speculation.

    python -m bench.arbitrage TARGET DRAFT --problems gsm8k_test.jsonl --limit 50 --router router/ --output OUTPUT

The problems are solved one by one, each by every method in turn (in an order that changes), greedily, in one process;
so that a busy machine is busy for all of them. `speculative` is lossless token-level speculation by the same draft,
which is what routing has to beat; `draft` is the draft alone. A method and its knob are written `name@value`, with
`+early`, `+guard` and `+band` for what can be switched on besides, and `/N` for steps of N tokens at most:

    arbitrage@RATE (needs --router)   random@RATE   likelihood@RATE   regret@RATE   grade@RATE   oracle

`likelihood` is RSD's rule with the target's likelihood as the reward, `grade` SpecReason's; `regret` is what
`arbitrage` learns to foretell, asked of the target itself. With `--batch-size` several problems are solved at a time,
which says as much about accuracy in less time; seconds are then a batch's over its size, and `speculative` and `draft`
are generated without a router, which writes the same. Every result is appended
to OUTPUT.jsonl at once, and what stands there is not run again: the same command goes on where it was stopped. The
report is OUTPUT.md and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import PreTrainedModel

import routers
import specdec
from bench._script import command, log, parser_of, pipe_table
from routers import Router
from specdec.drafters import Auto, SmallModel
from specdec.model_options import ModelOptions
from specdec.models.pair import load_pair
from specdec.training.routers.collect import Problem, encode_problems, final_answer, read_problems

BASELINE = "speculative"
METHODS = (BASELINE, "draft", "random@0.3", "likelihood@0.3", "grade@0.3", "arbitrage@0.3")
GUARD = (r"\boxed",)
EARLY = routers.EarlyEscalation(entropy=1.5, tokens=4)
NUM_RESAMPLES = 10_000


class Doubt:
    """The target's own doubt of a step: the judge in the abstain band."""

    def score(self, steps: Sequence[routers.DraftedStep], target: routers.TargetView) -> list[float]:
        return [1 - likelihood for likelihood in routers.TargetLikelihood().rewards(steps, target)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One problem solved by one method."""

    method: str
    problem: int
    correct: bool
    seconds: float
    num_tokens: int
    num_discarded: int
    num_steps: int
    num_escalated: int
    router_seconds: float
    tokens_of_draft: int
    text: str


def make_router(method: str, trained: Path | None, seed: int) -> Router:
    """The router that a method names.

    Raises:
        ValueError: it names none.
    """
    method, _, longest = method.partition("/")
    name, *extras = method.split("+")
    name, _, value = name.partition("@")
    if name in (BASELINE, "draft", "oracle"):
        simple: dict[str, Callable[[], Router]] = {
            BASELINE: routers.AlwaysTarget,
            "draft": routers.AlwaysDraft,
            "oracle": lambda: routers.Oracle(routers.TargetRegret(), threshold=routers.TargetRegret.margin),
        }
        return simple[name]()
    rate = float(value)
    options = {"guard": GUARD if "guard" in extras else (), "early": EARLY if "early" in extras else None}
    options["steps"] = routers.Steps(max_tokens=int(longest)) if longest else routers.Steps()
    if name == "random":
        return routers.RandomRouter(rate, seed=seed, steps=options["steps"])
    if name == "likelihood":
        return routers.RewardThreshold(routers.TargetLikelihood(), escalation_rate=rate, **options)
    if name == "regret":
        return routers.Arbitrage(routers.Shortfall(routers.TargetRegret()), escalation_rate=rate, **options)
    if name == "grade":
        return routers.SelfScore(escalation_rate=rate, **options)
    if name != "arbitrage" or trained is None:
        raise ValueError(f"{method!r}: name a method of those above, and --router for arbitrage")
    scorer = routers.load(trained)
    if "band" not in extras:
        return routers.Arbitrage(scorer, escalation_rate=rate, **options)
    band = routers.AbstainBand(low=rate - 0.1, high=rate + 0.1, judge=Doubt(), threshold=0.1)
    return routers.Arbitrage(scorer, threshold=rate, band=band, **options)  # with a band the value is a threshold


def solve(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: object,
    method: str,
    router: Router,
    problems: Mapping[int, Problem],
    max_new_tokens: int,
) -> list[Result]:
    """Problems by their number, all at once."""
    target, draft = models
    inputs = encode_problems(tokenizer, list(problems.values()))
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    started = perf_counter()
    if len(problems) > 1 and method == BASELINE:
        out = specdec.generate(target, **inputs, drafter=Auto(SmallModel(draft)), **options)
    elif len(problems) > 1 and method == "draft":
        out = specdec.generate(draft, **inputs, generation_config=target.generation_config, **options)
    else:
        drafter = SmallModel(draft, num_tokens=4)
        out = specdec.generate(target, **inputs, drafter=drafter, router=router, tokenizer=tokenizer, **options)
    seconds = perf_counter() - started
    texts = tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    results = []
    for row, ((index, problem), text) in enumerate(zip(problems.items(), texts, strict=True)):
        steps = [step for step in out.stats.steps if step.row == row]
        results.append(
            Result(
                method=method,
                problem=index,
                correct=problem.answer is not None and final_answer(text) == final_answer(problem.answer),
                seconds=seconds / len(problems),
                num_tokens=len(tokenizer.encode(text, add_special_tokens=False)),
                num_discarded=sum(step.num_discarded for step in steps),
                num_steps=len(steps),
                num_escalated=sum(step.writer == "target" for step in steps),
                router_seconds=out.stats.router_seconds / len(problems),
                tokens_of_draft=sum(step.num_tokens for step in steps if step.writer == "draft"),
                text=text,
            )
        )
    return results


def run(arguments: argparse.Namespace, problems: Sequence[Problem], path: Path) -> list[Result]:
    """Solve what has not been solved yet."""
    done = [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(result.method, result.problem) for result in done}
    size = arguments.batch_size
    todo = [
        (method, rest)
        for first in range(arguments.first, len(problems), size)
        for method in random.Random(first).sample(arguments.methods, len(arguments.methods))
        if (rest := [n for n in range(first, min(first + size, len(problems))) if (method, n) not in known])
    ]
    if not todo:
        return done
    routers_of = {method: make_router(method, arguments.router, arguments.seed) for method in arguments.methods}
    options = ModelOptions(dtype="float32", device="cpu", threads=arguments.threads, weights=arguments.weights)
    target, draft = load_pair(arguments.target, arguments.draft, options)
    assert draft is not None
    models = (target.model, draft.model)
    solve(models, target.tokenizer, "", routers.RandomRouter(0.5), {0: problems[0]}, 16)  # warm up
    with path.open("a") as file:
        for method, numbers in todo:
            batch, budget = {number: problems[number] for number in numbers}, arguments.max_new_tokens
            for result in solve(models, target.tokenizer, method, routers_of[method], batch, budget):
                file.write(json.dumps(asdict(result)) + "\n")
                done.append(result)
                log(f"{result.problem} {method}: {result.seconds:.1f} s, {result.correct}")
            file.flush()
    return done


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, over problems."""
    chosen = np.random.default_rng(seed).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    return tuple(np.quantile(values[chosen].mean(1), (0.025, 0.975)))


def speedup_interval(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a ratio of total times, over problems."""
    chosen = np.random.default_rng(seed).integers(0, len(ours), (NUM_RESAMPLES, len(ours)))
    return tuple(np.quantile(theirs[chosen].sum(1) / ours[chosen].sum(1), (0.025, 0.975)))


def against_random(method: str, columns: Mapping[str, Sequence[Result]]) -> str:
    """What a method gains over random routing at its rate: 95 % interval of the difference in accuracy, paired."""
    _, _, knob = method.partition("@")
    control = columns.get(f"random@{knob.partition('+')[0]}")
    if control is None or method.startswith("random"):
        return ""
    gains = [float(ours.correct) - theirs.correct for ours, theirs in zip(columns[method], control, strict=True)]
    low, high = interval(np.array(gains))
    return f"{low:+.1%} .. {high:+.1%}"


def table(results: Sequence[Result], methods: Sequence[str], baseline: str) -> list[list[str]]:
    """A row a method, over the problems that all of them have solved."""
    by_method = {method: {r.problem: r for r in results if r.method == method} for method in methods}
    common = sorted(set.intersection(*(set(solved) for solved in by_method.values())))
    columns = {method: [solved[index] for index in common] for method, solved in by_method.items()}
    base = columns[baseline]
    base_correct, base_seconds = (np.array([getattr(r, name) for r in base], float) for name in ("correct", "seconds"))
    rows = []
    for method, solved in columns.items():
        correct, seconds = (np.array([getattr(r, name) for r in solved], float) for name in ("correct", "seconds"))
        low, high = interval(correct - base_correct)
        slow, fast = speedup_interval(seconds, base_seconds)
        num_steps = sum(r.num_steps for r in solved)
        rows.append(
            [
                method,
                str(len(common)),
                f"{correct.mean():.1%}",
                f"{low:+.1%} .. {high:+.1%}",
                against_random(method, columns),
                f"{sum(r.num_escalated for r in solved) / max(1, num_steps):.1%}",
                f"{base_seconds.sum() / seconds.sum():.2f} ({slow:.2f} .. {fast:.2f})",
                f"{np.quantile(seconds, 0.5):.1f} / {np.quantile(seconds, 0.95):.1f}",
                f"{sum(r.num_tokens for r in solved) / len(solved):.0f}",
                f"{sum(r.num_discarded for r in solved) / len(solved):.0f}",
                f"{sum(r.router_seconds for r in solved) / seconds.sum():.2%}",
            ]
        )
    return rows


HEADINGS = (
    *("method", "problems", "accuracy", "less {baseline}'s, 95 %", "less random's, 95 %", "steps by the target"),
    *("speed over {baseline}, 95 %", "s, p50 / p95", "tokens", "discarded", "router's time"),
)


def draw(rows: Sequence[Sequence[str]], baseline: str, path: Path) -> None:
    """Accuracy over latency and over escalation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(10, 4), layout="constrained")
    for row in rows:
        accuracy = float(row[2].rstrip("%"))
        for axes, value in zip(panels, (1 / float(row[6].split()[0]), float(row[5].rstrip("%"))), strict=True):
            axes.plot(value, accuracy, "o")
            axes.annotate(row[0], (value, accuracy), textcoords="offset points", xytext=(4, 4), fontsize=7)
    panels[0].set_xlabel(f"time, over that of {baseline}")
    panels[1].set_xlabel("steps by the target, %")
    panels[0].set_ylabel("accuracy, %")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem to solve")
    parser.add_argument("--limit", type=int, help="number of problems; 0 reports what stands in OUTPUT.jsonl")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--baseline", default=BASELINE, help="one of the methods, with which the others are compared")
    parser.add_argument("--router", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=448)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    problems = read_problems(arguments.problems)
    if arguments.limit is not None:
        problems = problems[: arguments.first + arguments.limit]
    if arguments.baseline not in arguments.methods:
        parser.error(f"--baseline {arguments.baseline} is none of the methods")
    for method in arguments.methods:
        make_router(method, arguments.router, arguments.seed)  # what cannot be is said before any work
    results = run(arguments, problems, Path(f"{arguments.output}.jsonl"))
    rows = table(results, arguments.methods, arguments.baseline)
    headings = [heading.format(baseline=arguments.baseline) for heading in HEADINGS]
    text = pipe_table(headings, rows)
    Path(f"{arguments.output}.md").write_text(f"`{command('arbitrage')}`\n\n{text}\n")
    draw(rows, arguments.baseline, Path(f"{arguments.output}.png"))
    print(text)


if __name__ == "__main__":
    main()
