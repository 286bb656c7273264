"""Accuracy and time against escalation: every router, random routing at equal rate, and token-level speculation.

    python -m bench.arbitrage TARGET [DRAFT] --problems gsm8k_test.jsonl --limit 50 --router router/ --output OUTPUT

Without DRAFT the target's own copy of `--copy` bits writes the steps; DRAFT may also be a copy, as a file. A method and
its knob are written `name@value`, with `+early`, `+guard` and `+band` for what can be switched on besides, `~N` to look
at a step every N tokens while it is written, and `/N` for steps of N tokens at most; of `--batched` and `--live`
methods also `+onecache` (`Router.shares_cache`) and `+aheadN` (`Router.lookahead`):

    speculative   draft   random@RATE   confidence@RATE   entropy@RATE   arbitrage@RATE (needs --router)
    likelihood@RATE   regret@RATE   grade@RATE   oracle

`speculative` is lossless token-level speculation by the same draft, which is what routing has to beat; `draft` the
draft alone; `confidence` and `entropy` are SelfConfidence and FirstTokenEntropy; `likelihood` is RSD's rule with the
target's likelihood as the reward, `grade` SpecReason's; `regret` is what `arbitrage` learns to foretell, asked of the
target itself. RATE is a share of steps.

**Replayed.** `--methods` are replayed on greedy steps that are kept in OUTPUT.steps.jsonl (`bench/step_cache.py`): a
model writes a step only where no method has had that text before it, `--batch-size` problems at a time. Accuracy,
tokens and forwards are those of a live run; the speed is computed from them, with what a token and a verification cost
alone, measured on `--alone` problems (OUTPUT.costs.jsonl). **Batched.** `--batched` methods, also those that cannot be
replayed, are run for their answers, `--batch-size` problems at a time, and not timed (OUTPUT.batched.jsonl). **Live.**
`--live` methods are run as a user would, one problem at a time and in an order that changes, and timed
(OUTPUT.live.jsonl). All these files are appended to at once, and what stands there is not done again: the same command
goes on where it was stopped, by `--minutes` or otherwise. The report, OUTPUT.md and OUTPUT.png, is of what stands
there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import routers
import specdec
from bench._script import command, log, parser_of
from bench.arbitrage_report import Costs, Outcome, write_report
from bench.arbitrage_results import Results
from bench.step_cache import CachedStep, Request, StepCache, StepSource, with_source
from bench.step_replay import Replayed, replay_all
from routers import Router
from specdec.drafters import Auto, QuantizedSelf, SmallModel
from specdec.model_options import ModelOptions
from specdec.models.pair import load_draft, load_target
from specdec.routing.options import check_shared_cache
from specdec.training.routers.collect import INSTRUCTION, Problem, encode_problems, final_answer, read_problems

BASELINE = "speculative"
ONE_CACHE = "onecache"
RATES = (0.1, 0.2, 0.4)
METHODS = (
    BASELINE,
    "draft",
    *(f"{name}@{rate}" for rate in RATES for name in ("random", "confidence", "entropy", "likelihood", "regret")),
)
GUARD = (r"\boxed",)
EARLY = routers.EarlyEscalation(entropy=1.5, tokens=4)


class Doubt:
    """The target's own doubt of a step: the judge in the abstain band."""

    def score(self, steps: Sequence[routers.DraftedStep], target: routers.TargetView) -> list[float]:
        return [1 - likelihood for likelihood in routers.TargetLikelihood().rewards(steps, target)]


Write: TypeAlias = Callable[[Sequence[Request]], list[CachedStep]]


class _StepMissing(Exception):
    """A replay needs a step that has not been written."""


def _refuse(requests: Sequence[Request]) -> list[CachedStep]:
    raise _StepMissing


class Pair(NamedTuple):
    """What writes, loaded when something is first to be written."""

    target: PreTrainedModel
    drafter: SmallModel | QuantizedSelf


def make_router(method: str, trained: Path | None, seed: int) -> Router:
    """The router that a method names.

    Raises:
        ValueError: it names none.
    """
    rest, _, longest = method.partition("/")
    rest, _, every = rest.partition("~")
    name, *extras = rest.split("+")
    name, _, value = name.partition("@")
    ahead = [extra.removeprefix("ahead") for extra in extras if extra.startswith("ahead")]
    known = {"early", "guard", "band", ONE_CACHE, *(f"ahead{count}" for count in ahead if count.isdecimal())}
    if unknown := [extra for extra in extras if extra not in known]:
        raise ValueError(f"{method!r}: +{unknown[0]} is none of those above; ~N and /N stand last")
    router = _router(name, value, extras, every, longest, trained, seed)
    router.shares_cache, router.lookahead = ONE_CACHE in extras, int(ahead[0]) if ahead else 1
    return router


def runs_live_only(method: str) -> bool:
    """Whether its steps are no function of the text before them, or what it asks is not kept with them."""
    return method.startswith("grade") or "+ahead" in method or f"+{ONE_CACHE}" in method


def _router(
    name: str, value: str, extras: Sequence[str], every: str, longest: str, trained: Path | None, seed: int
) -> Router:
    if name in (BASELINE, "draft", "oracle"):
        simple: dict[str, Callable[[], Router]] = {
            BASELINE: routers.AlwaysTarget,
            "draft": routers.AlwaysDraft,
            "oracle": lambda: routers.Oracle(routers.TargetRegret(), threshold=routers.TargetRegret.margin),
        }
        return simple[name]()
    if every and name != "confidence":
        raise ValueError(f"{name}~{every}: only confidence looks at steps while they are written")
    rate = float(value)
    options = {"guard": GUARD if "guard" in extras else (), "early": EARLY if "early" in extras else None}
    options["steps"] = routers.Steps(max_tokens=int(longest)) if longest else routers.Steps()
    if name == "confidence":
        look = {"look_every": int(every)} if every else {}
        return routers.SelfConfidence(escalation_rate=rate, guard=options["guard"], steps=options["steps"], **look)
    if name == "entropy":
        return routers.FirstTokenEntropy(escalation_rate=rate, steps=options["steps"])
    if name == "random":
        return routers.RandomRouter(rate, seed=seed, steps=options["steps"])
    if name == "likelihood":
        return routers.RewardThreshold(routers.TargetLikelihood(), escalation_rate=rate, **options)
    if name == "regret":
        return routers.Arbitrage(routers.Shortfall(routers.TargetRegret()), escalation_rate=rate, **options)
    if name == "grade":
        return routers.SelfScore(escalation_rate=rate, **options)
    if name != "arbitrage" or trained is None:
        raise ValueError(f"{name!r}: name a method of those above, and --router for arbitrage")
    scorer = routers.load(trained)
    if "band" not in extras:
        return routers.Arbitrage(scorer, escalation_rate=rate, **options)
    band = routers.AbstainBand(low=rate - 0.1, high=rate + 0.1, judge=Doubt(), threshold=0.1)
    return routers.Arbitrage(scorer, threshold=rate, band=band, **options)  # with a band the value is a threshold


def load(arguments: argparse.Namespace) -> Pair:
    options = ModelOptions(dtype="float32", device="cpu", threads=arguments.threads, weights=arguments.weights)
    target = load_target(arguments.target, options)
    if arguments.draft is None:
        return Pair(target.model, QuantizedSelf(weights=arguments.copy, num_tokens=4))
    draft = load_draft(arguments.draft, target, replace(options, weights=arguments.draft_weights))
    return Pair(target.model, SmallModel(draft.model, num_tokens=4))


class Run:
    """The bench at work.

    Args:
        problems: by their number.
    """

    def __init__(self, arguments: argparse.Namespace, problems: Mapping[int, Problem]):
        self.arguments, self.problems = arguments, problems
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(arguments.target)
        self.pair = cache(lambda: load(arguments))
        self.steps = routers.Steps()
        self._ends = perf_counter() + 60 * arguments.minutes

    def _is_over(self) -> bool:
        """Whether nothing is to be begun any more."""
        return perf_counter() > self._ends

    def path(self, suffix: str) -> Path:
        return Path(f"{self.arguments.output}.{suffix}")

    def costs(self) -> Costs | None:
        """What a token and a verification cost alone; None where that has not been asked for."""
        path = self.path("costs.jsonl")
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        known = {one["problem"] for one in found}
        for number in list(self.problems)[: self.arguments.alone]:
            if number not in known and not self._is_over():
                found.append({"problem": number, **self._alone(number)})
                with path.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
        return Costs.of(found) if found else None

    def _alone(self, number: int) -> dict[str, Any]:
        """Seconds and tokens of the target's steps, of the draft's, and of verifications of these."""
        spent = {f"{kind}_{what}": 0.0 for kind in ("target", "draft", "score") for what in ("seconds", "tokens")}

        def timed(source: StepSource, request: Request) -> CachedStep:
            if not request.text:
                source.write([request])  # reads the prompt, and measures what is measured once
            (step,) = source.write([request])
            spent[f"{request.kind}_seconds"] += step.seconds
            spent[f"{request.kind}_tokens"] += len(step.tokens)
            return step

        def job(source: StepSource) -> None:
            for kind in ("draft", "target"):
                text: tuple[int, ...] = ()
                while True:
                    step = timed(source, Request(kind, number, text))
                    if kind == "draft":
                        timed(source, Request("score", number, text, tuple(step.tokens)))
                    text += tuple(step.tokens)
                    if step.is_last:
                        break

        self._with_source([number], job)
        log(f"{number} alone: {spent}")
        return spent

    def _with_source(self, numbers: Sequence[int], job: Callable[[StepSource], None]) -> None:
        target, drafter = self.pair()
        some = {number: self.problems[number] for number in numbers}
        longest = self.arguments.max_new_tokens
        with_source(target, drafter, self.tokenizer, some, job, max_new_tokens=longest, steps=self.steps)

    def replayed(self, methods: Sequence[str]) -> dict[str, list[Outcome]]:
        """Every method on every problem, a batch of problems after the other."""
        arguments = self.arguments
        plan = {name: Path(value).name for name in ("target", "draft") if (value := getattr(arguments, name))}
        plan |= {"weights": arguments.weights, "instruction": INSTRUCTION}
        plan |= {"draft_weights": arguments.draft_weights} if arguments.draft else {"copy": arguments.copy}
        plan |= {"max_new_tokens": arguments.max_new_tokens, "max_step": self.steps.max_tokens}
        cached, routers_of = StepCache(self.path("steps.jsonl"), plan), self._routers(methods)
        found: dict[str, list[Outcome]] = {method: [] for method in methods}
        for batch in self._batches():
            as_before = copy.deepcopy(routers_of)
            try:
                outcomes = self._replay(routers_of, batch, cached, _refuse)
            except _StepMissing:  # only then models are loaded
                if self._is_over():
                    log(f"time is up: {len(found[BASELINE])} of {len(self.problems)} problems are replayed")
                    break
                outcomes, routers_of = self._write_missing(as_before, batch, cached), as_before
            for method, some in outcomes.items():
                found[method] += some
        return found

    def _write_missing(
        self, routers_of: Mapping[str, Router], batch: Sequence[int], cached: StepCache
    ) -> dict[str, list[Outcome]]:
        outcomes: dict[str, list[Outcome]] = {}
        self._with_source(batch, lambda source: outcomes.update(self._replay(routers_of, batch, cached, source.write)))
        return outcomes

    def _replay(
        self, routers_of: Mapping[str, Router], batch: Sequence[int], cached: StepCache, write: Write
    ) -> dict[str, list[Outcome]]:
        prompts = {number: self.prompt(number) for number in batch}
        outcomes: dict[str, list[Outcome]] = {}
        for method, router in routers_of.items():
            started, before = perf_counter(), len(cached)
            runs = replay_all(router, batch, prompts, self.decode, cached, write)
            outcomes[method] = [self._outcome(run) for run in runs]
            if len(cached) > before:
                solved = sum(outcome.correct for outcome in outcomes[method])
                spent = f"{len(cached) - before} steps in {perf_counter() - started:.0f} s"
                log(f"{batch[0]}-{batch[-1]} {method}: {solved} of {len(batch)}; {spent}")
        return outcomes

    def live(self, methods: Sequence[str]) -> list[dict[str, Any]]:
        """The first problems as a user would run them, timed."""
        results, routers_of = Results.read(self.path("live.jsonl")), self._routers(methods)
        results.recall(routers_of)
        for number in list(self.problems)[: self.arguments.live_limit]:
            if self._is_over():
                log(f"time is up: {len(results.done)} live runs stand in {results.path.name}")
                break
            for method in random.Random(number).sample(methods, len(methods)):
                if results.missing(method, [number]):
                    if results.is_unchanged:  # the first call of a process
                        self._solve(BASELINE, routers_of.get(BASELINE), [number], 8)
                    results.add(self._solve(method, routers_of[method], [number], self.arguments.max_new_tokens))
                    log(f"{number} {method} live: {results.done[-1]['seconds']:.1f} s, {results.done[-1]['correct']}")
        return results.of(methods, self.problems)

    def batched(self, methods: Sequence[str]) -> list[dict[str, Any]]:
        """All problems, for the answers."""
        results, routers_of = Results.read(self.path("batched.jsonl")), self._routers(methods)
        results.recall(routers_of)
        for batch in self._batches():
            for method in methods:
                missing = results.missing(method, batch)
                if missing and not self._is_over():
                    results.add(self._solve(method, routers_of[method], missing, self.arguments.max_new_tokens))
                    solved = sum(result["correct"] for result in results.done[-len(missing) :])
                    log(f"{batch[0]}-{batch[-1]} {method} batched: {solved} of {len(missing)}")
        return results.of(methods, self.problems)

    def _batches(self) -> list[list[int]]:
        numbers, size = list(self.problems), self.arguments.batch_size
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def prompt(self, number: int) -> list[int]:
        return encode_problems(self.tokenizer, [self.problems[number]])["input_ids"][0].tolist()

    def _routers(self, methods: Sequence[str]) -> dict[str, Router]:
        return {method: make_router(method, self.arguments.router, self.arguments.seed) for method in methods}

    def _is_right(self, number: int, tokens: Sequence[int]) -> bool:
        answer = self.problems[number].answer
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return answer is not None and final_answer(text) == final_answer(answer)

    def _outcome(self, run: Replayed) -> Outcome:
        return Outcome(run=run, correct=self._is_right(run.problem, run.tokens))

    def _solve(
        self, method: str, router: Router | None, numbers: Sequence[int], max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Problems in one batch."""
        target, drafter = self.pair()
        inputs = encode_problems(self.tokenizer, [self.problems[number] for number in numbers])
        routed = {} if method == BASELINE else {"router": router, "tokenizer": self.tokenizer}
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
        started = perf_counter()
        out = specdec.generate(target, **inputs, drafter=Auto(drafter), **routed, **options)
        seconds, stats = perf_counter() - started, out.stats
        results = []
        for row, number in enumerate(numbers):
            steps = [step for step in stats.steps if step.row == row]
            tokens = out.sequences[row, inputs["input_ids"].shape[1] :].tolist()
            results.append(
                {
                    "method": method,
                    "problem": number,
                    "correct": self._is_right(number, tokens),
                    "seconds": seconds - stats.setup_seconds,
                    "num_tokens": sum(step.num_tokens for step in steps) or stats.num_new_tokens,
                    "num_vain": sum(step.num_discarded for step in steps),
                    "num_steps": len(steps),
                    "num_escalated": sum(step.writer == "target" for step in steps),
                    "router_seconds": stats.router_seconds,
                    "decisions": [(step.score, step.writer == "target") for step in steps],
                }
            )
        return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem to solve")
    parser.add_argument("--limit", type=int, help="number of problems")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="replayed")
    parser.add_argument("--live", nargs="+", default=[], help="run as a user would")
    parser.add_argument("--batched", nargs="+", default=[], help="run in batches, for their answers")
    parser.add_argument("--live-limit", type=int, default=5, help="number of problems of --live")
    parser.add_argument("--alone", type=int, default=2, help="number of problems on which costs are measured")
    parser.add_argument("--router", type=Path)
    parser.add_argument("--copy", default="int4", help="weights of the target's own copy: int8 or int4")
    parser.add_argument("--max-new-tokens", type=int, default=448)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--weights", default="float", help="of the target")
    parser.add_argument("--draft-weights", default="float", help="of a DRAFT; gguf for a file as it is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    problems = dict(enumerate(read_problems(arguments.problems)))
    last = len(problems) if arguments.limit is None else arguments.first + arguments.limit
    problems = {number: problem for number, problem in problems.items() if arguments.first <= number < last}
    if BASELINE in arguments.batched:
        parser.error(f"{BASELINE} is replayed, or live: leave it out of --batched")
    if BASELINE not in arguments.methods:
        parser.error(f"the methods are compared with {BASELINE}: name it too")
    if lacking := [method for method in arguments.methods if runs_live_only(method)]:
        parser.error(f"{' '.join(lacking)}: cannot be replayed on kept steps; name it in --batched or --live")
    if arguments.live and BASELINE not in arguments.live:
        parser.error(f"live runs are compared with {BASELINE}: name it in --live too")
    for method in (*arguments.methods, *arguments.live, *arguments.batched):
        make_router(method, arguments.router, arguments.seed)  # what cannot be is said before any work
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    run = Run(arguments, problems)
    if arguments.draft and any(f"+{ONE_CACHE}" in method for method in (*arguments.live, *arguments.batched)):
        target, drafter = run.pair()
        check_shared_cache(drafter, target)  # not after hours
    costs, replayed = run.costs(), run.replayed(arguments.methods)
    batched, live = run.batched(arguments.batched), run.live(arguments.live)
    if not replayed[BASELINE]:
        raise SystemExit("not one batch of problems was done: give it more --minutes, or a smaller --batch-size")
    print(write_report(replayed, costs, batched, live, BASELINE, arguments.output, command("arbitrage")))


if __name__ == "__main__":
    main()
