"""Is `auto` ever slower than plain decoding, and is it as good as the best setting that one could have typed?

    python -m bench.control MODEL [--prompts spec_bench.jsonl] [--draft MODEL] [--weights int8|float|stock] [--limit 5]
        [--repetitions 3] [--max-new-tokens 64] [--threads 1] [--methods NAME ...] [--out NAME]
    python -m bench.control demo --draft HEAD --prompts spec_bench.jsonl --methods early-exit draft-head --out heads

Everyone decodes the same prompts (of a Spec-Bench file those whose ids are divisible by 3, the others were for tuning;
without a file the built-in suite), greedily, interleaved in one process, prefill included. Figures are ratios of
medians of the repetitions: of wall time, and, with one thread, of that thread's CPU time, to which other programs add
less; and tokens a round, the first one of a call left out. With a draft model or head, `auto-alone` is `auto` without
it. Outputs must equal plain decoding's but for numerical ties, or the run fails. A table goes to stdout; `--out NAME`
also writes `bench/results/NAME.md` and `.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter, thread_time

import specdec
from bench._script import RESULTS, WEIGHTS, command, log, parser_of, write_report
from specdec.model_options import ModelOptions
from specdec.models.pair import LoadedPair, load_draft, load_target
from specdec.specs import DrafterSpec, drafter_of
from specdec.suites import Prompt, load_suite
from specdec.testing.equality import Verdict, compare
from specdec.text.prompting import encode_prompts

PLAIN, AUTO, AUTO_ALONE = "plain", "auto", "auto-alone"
GRID = ["prompt-lookup:num_tokens=3:min_match=1", "prompt-lookup:num_tokens=10"]
DRAFT_LENGTHS = (2, 4)


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, help="of Spec-Bench")
    parser.add_argument("--draft", help="a smaller model, or a head")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--limit", type=int, default=5, help="prompts of each category")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", help="fixed settings beside plain and auto; none: only those two")
    parser.add_argument("--out")
    return parser.parse_args()


def reporting_prompts(path: Path | None, limit: int) -> list[Prompt]:
    """The first `limit` of each category, ids divisible by 3, category after category."""
    if path is None:
        return load_suite(None).select([], limit).prompts
    by_category: defaultdict[str, list[Prompt]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompts = by_category[record["category"]]
        if record["question_id"] % 3 == 0 and len(prompts) < limit:
            prompts.append(Prompt(text=record["turns"][0], category=record["category"]))
    return [prompt for prompts in by_category.values() for prompt in prompts]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One prompt: for every method the seconds of each repetition, and committed tokens and rounds of all of them."""

    category: str
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    committed: Counter[str]
    rounds: Counter[str]

    def speedups(self, clock: str) -> dict[str, float]:
        """Of every method over plain decoding."""
        seconds = {name: median(each) for name, each in getattr(self, clock).items()}
        return {name: seconds[PLAIN] / each for name, each in seconds.items()}


class Contest:
    """A model, and the ways to decode with it."""

    def __init__(self, args: argparse.Namespace):
        options = ModelOptions(dtype="float32", device="cpu", threads=args.threads, weights=args.weights)
        target = load_target(args.model, options)
        in_int8 = dataclasses.replace(options, weights="int8")
        pair = LoadedPair(target, None if args.draft is None else load_draft(args.draft, target, in_int8))
        self._model, self._tokenizer = pair.target.model, pair.target.tokenizer
        fixed = GRID if args.methods is None else args.methods
        if args.draft is not None and args.methods is None:
            name = drafter_of(args.draft, args.model)
            fixed = [*GRID, *(f"{name}:num_tokens={length}" for length in DRAFT_LENGTHS)]
        self._drafters = {name: pair.build(DrafterSpec.parse(name)) for name in (PLAIN, AUTO, *fixed)}
        if args.draft is not None:
            self._drafters[AUTO_ALONE] = AUTO
        self._repetitions = args.repetitions
        self._settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "repetition_penalty": 1.0}
        self.verdicts: Counter[Verdict] = Counter()

    def measure(self, prompt: Prompt) -> Measured:
        inputs = encode_prompts(self._tokenizer, [prompt.text])
        num_prompt = inputs["input_ids"].shape[1]
        wall, cpu = ({name: [] for name in self._drafters} for _ in range(2))
        committed, rounds = Counter[str](), Counter[str]()
        names, reference = list(self._drafters), None
        for turn in range(self._repetitions):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                started, worked = perf_counter(), thread_time()
                drafter = self._drafters[name]
                out = specdec.generate(
                    self._model, **inputs, drafter=drafter, return_dict_in_generate=True, **self._settings
                )
                wall[name].append(perf_counter() - started)
                cpu[name].append(thread_time() - worked)
                committed[name] += out.stats.num_committed
                rounds[name] += out.stats.num_rounds
                output = out.sequences[0, num_prompt:].tolist()
                reference = reference or output
                settings = {**self._settings, "pad_token_id": 0}
                verdict = compare(self._model, inputs["input_ids"][0], reference, output, settings).verdict
                self.verdicts[verdict] += 1
        return Measured(category=prompt.category, wall=wall, cpu=cpu, committed=committed, rounds=rounds)


def report(results: Sequence[Measured], clock: str) -> tuple[list[str], dict[str, object]]:
    """Lines of Markdown, and the same for JSON."""
    by_category: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        by_category[result.category].append(result.speedups(clock))
    names = list(results[0].wall)
    fixed = [name for name in names if name not in (AUTO, AUTO_ALONE)]
    means = {
        category: {name: geometric_mean(one[name] for one in each) for name in names}
        for category, each in by_category.items()
    }
    overall = {name: geometric_mean(each[name] for each in means.values()) for name in names}
    worst = sorted(one[AUTO] for each in by_category.values() for one in each)
    oracle = geometric_mean(max(each[name] for name in fixed) for each in means.values())
    best = max(fixed, key=overall.__getitem__)
    lines = [f"| {clock} time | prompts | {' | '.join(names[1:])} |", "|---|--:|" + "--:|" * len(names[1:])]
    for category, each in means.items():
        cells = " | ".join(f"{each[name]:.2f}" for name in names[1:])
        lines.append(f"| {category} | {len(by_category[category])} | {cells} |")
    cells = " | ".join(f"**{overall[name]:.2f}**" for name in names[1:])
    lines += [
        f"| **geometric mean** | {len(results)} | {cells} |",
        "",
        f"auto: slowest category {min(each[AUTO] for each in means.values()):.2f}x plain, slowest prompt "
        f"{worst[0]:.2f}x, {sum(one < 0.93 for one in worst)} of {len(worst)} prompts below 0.93x; over the best fixed "
        f"setting of each category {overall[AUTO] / oracle:.2f}, over the best single one ({best}) "
        f"{overall[AUTO] / overall[best]:.2f}.",
        "",
    ]
    return lines, {"categories": means, "overall": overall, "slowest_prompts": worst[:8], "num_prompts": len(results)}


def per_round(results: Sequence[Measured]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Committed tokens of a category's prompts together over their rounds."""
    names = list(results[0].wall)
    by_category: defaultdict[str, list[Measured]] = defaultdict(list)
    for result in results:
        by_category[result.category].append(result)
    by_category["all"] = list(results)
    found = {
        category: {
            name: sum(one.committed[name] for one in each) / max(sum(one.rounds[name] for one in each), 1)
            for name in names
        }
        for category, each in by_category.items()
    }
    lines = [f"| tokens a round | {' | '.join(names[1:])} |", "|---|" + "--:|" * len(names[1:])]
    lines += [
        f"| {category} | {' | '.join(f'{each[name]:.2f}' for name in names[1:])} |" for category, each in found.items()
    ]
    return [*lines, ""], found


def main() -> None:
    args = parse_args()
    contest, results = Contest(args), []
    prompts = reporting_prompts(args.prompts, args.limit)
    contest.measure(prompts[0])  # warm
    try:
        for prompt in prompts:
            results.append(contest.measure(prompt))
            each = ", ".join(f"{name} {speedup:.2f}" for name, speedup in results[-1].speedups("cpu").items())
            log(f"{prompt.category}: {each}")
    except KeyboardInterrupt:
        log("interrupted: what was measured until then is reported")
    compared, ties = contest.verdicts.total(), contest.verdicts[Verdict.TIE]
    lines = [f"    {command('control')}", ""]
    lines += [f"{compared} outputs compared with plain decoding's: {ties} ties, the others identical.", ""]
    document: dict[str, object] = {}
    for clock in ("cpu", "wall") if args.threads == 1 else ("wall",):
        part, document[clock] = report(results, clock)
        lines += part
    part, document["tokens_per_round"] = per_round(results)
    lines += part
    print("\n".join(lines))
    if contest.verdicts[Verdict.DIFFERENT]:
        sys.exit("an output differs from plain decoding by more than a numerical tie")
    if args.out:
        write_report(RESULTS / args.out, document, f"# {args.out}", "\n".join(lines))


if __name__ == "__main__":
    main()
