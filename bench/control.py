"""Is `auto` ever slower than plain decoding, and is it as good as the best setting that one could have typed?

    python -m bench.control MODEL --prompts spec_bench.jsonl [--draft MODEL] [--weights int8|float|stock] [--limit 5]
        [--repetitions 3] [--max-new-tokens 64] [--threads 1] [--methods NAME ...] [--out NAME]

Everyone decodes the same prompts (of a Spec-Bench file those whose ids are divisible by 3; the others were for tuning),
greedily, interleaved in one process; times are whole calls, and medians of the repetitions. Outputs must equal plain
decoding's but for numerical ties, or the run fails. A table goes to stdout; `--out NAME` also writes
`bench/results/NAME.md` and `.json`. What was measured until Ctrl-C is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median

import torch

import specdec
from specdec.bench.equality import Verdict
from specdec.bench.harness import BatchResult, Harness, Method, Settings
from specdec.bench.methods import DrafterSpec
from specdec.bench.suite import Prompt
from specdec.models import load

RESULTS = Path(__file__).parent / "results"
PLAIN, AUTO = "plain", "auto"
GRID = ["prompt-lookup:num_tokens=3:min_match=1", "prompt-lookup:num_tokens=10"]
DRAFT_GRID = ["small-model:num_tokens=2", "small-model:num_tokens=4"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--draft")
    parser.add_argument("--weights", choices=("stock", "float", "int8"), default="int8")
    parser.add_argument("--limit", type=int, default=5, help="prompts of each category")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", help="fixed settings beside plain and auto; none: only those two")
    parser.add_argument("--out")
    return parser.parse_args()


def reporting_prompts(path: Path, limit: int) -> list[Prompt]:
    """The first `limit` of each category, ids divisible by 3, category after category."""
    by_category: defaultdict[str, list[Prompt]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompts = by_category[record["category"]]
        if record["question_id"] % 3 == 0 and len(prompts) < limit:
            prompts.append(Prompt(text=record["turns"][0], category=record["category"]))
    return [prompt for prompts in by_category.values() for prompt in prompts]


def build(args: argparse.Namespace) -> Harness:
    torch.set_num_threads(args.threads)
    model, tokenizer, _ = load(args.model)
    model = model.float()
    draft = None
    if args.draft is not None:
        draft = specdec.prepare(load(args.draft).model, weights="int8")
    if args.weights != "stock":
        specdec.prepare(model, weights="int8" if args.weights == "int8" else None)
    fixed = args.methods if args.methods is not None else GRID + (DRAFT_GRID if draft is not None else [])
    methods = [Method(name, DrafterSpec.parse(name).build(draft)) for name in (PLAIN, AUTO, *fixed)]
    settings = Settings(max_new_tokens=args.max_new_tokens, repetitions=args.repetitions, without_penalty=True)
    return Harness(model, tokenizer, methods, settings)


def speedups(result: BatchResult) -> dict[str, float]:
    """Of every method over plain decoding, on one prompt."""
    seconds = {name: median(run.seconds for run in runs) for name, runs in result.runs.items()}
    return {name: seconds[PLAIN] / each for name, each in seconds.items()}


def report(results: Sequence[BatchResult]) -> tuple[list[str], dict[str, object]]:
    """Lines of Markdown, and the same for JSON."""
    by_category: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        by_category[result.category].append(speedups(result))
    names = list(results[0].runs)
    means = {
        category: {name: geometric_mean(one[name] for one in each) for name in names}
        for category, each in by_category.items()
    }
    overall = {name: geometric_mean(each[name] for each in means.values()) for name in names}
    fixed = [name for name in names if name != AUTO]
    worst = min(one[AUTO] for each in by_category.values() for one in each)
    oracle = geometric_mean(max(each[name] for name in fixed) for each in means.values())
    best = max(fixed, key=overall.__getitem__)
    slow = sum(one[AUTO] < 0.93 for each in by_category.values() for one in each)
    lines = [f"| category | prompts | {' | '.join(names[1:])} |", "|---|--:|" + "--:|" * len(names[1:])]
    for category, each in means.items():
        cells = " | ".join(f"{each[name]:.2f}" for name in names[1:])
        lines.append(f"| {category} | {len(by_category[category])} | {cells} |")
    lines.append(
        f"| **geometric mean** | {len(results)} | {' | '.join(f'**{overall[name]:.2f}**' for name in names[1:])} |"
    )
    lines += [
        "",
        f"auto: slowest category {min(each[AUTO] for each in means.values()):.2f}x plain, slowest prompt {worst:.2f}x, "
        f"{slow} of {len(results)} prompts below 0.93x.",
        f"auto over the best fixed setting of each category: {overall[AUTO] / oracle:.2f}; over the best single one "
        f"({best}): {overall[AUTO] / overall[best]:.2f}.",
    ]
    return lines, {"categories": means, "overall": overall, "worst_prompt": worst, "num_prompts": len(results)}


def check(results: Sequence[BatchResult]) -> tuple[int, int]:
    """How many outputs were compared, and how many differed by a tie. Exits if one differs by more."""
    verdicts = [comparison.verdict for result in results for each in result.comparisons.values() for comparison in each]
    if Verdict.DIFFERENT in verdicts:
        sys.exit("an output differs from plain decoding by more than a numerical tie")
    return len(verdicts), verdicts.count(Verdict.TIE)


def main() -> None:
    args = parse_args()
    harness, results = build(args), []
    try:
        for result in harness.run(reporting_prompts(args.prompts, args.limit), on_call=lambda: None):
            results.append(result)
            each = ", ".join(f"{name} {speedup:.2f}" for name, speedup in speedups(result).items())
            print(f"{result.category}: {each}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    num_compared, num_ties = check(results)
    lines, document = report(results)
    command = "python -m bench.control " + " ".join(
        arg if arg.startswith("-") or "/" not in arg else arg.rsplit("/", 1)[-1] for arg in sys.argv[1:]
    )
    head = [f"    {command}", "", f"{num_compared} outputs compared with plain decoding's, {num_ties} ties.", ""]
    print("\n".join([*head, *lines]))
    if args.out:
        (RESULTS / f"{args.out}.md").write_text("\n".join([f"# {args.out}", "", *head, *lines, ""]), encoding="utf-8")
        (RESULTS / f"{args.out}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
