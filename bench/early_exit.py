"""A model that drafts for itself, beside plain decoding and transformers' own early exit.

    python -m bench.early_exit MODEL [--weights float|int8] [--exits FILE] [--threads 2] [--limit 2] [--out NAME]

All sides run on one prepared model, interleaved in one process, greedy, on the built-in suite; times include the
prefill, and are medians. transformers (`assistant_early_exit`) runs at each of `--layers`; its best one counts. The
outputs of specdec's sides must equal plain decoding's but for numerical ties, or the run fails. A table goes to stdout;
`--out NAME` also writes `bench/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.bench.equality import Verdict, compare
from specdec.bench.suite import Prompt, load_suite
from specdec.drafters import Drafter, EarlyExit, Plain
from specdec.models import load
from specdec.prompting import encode_prompts

RESULTS = Path(__file__).parent / "results"
PLAIN = "plain"
OURS = "early exit"


@dataclass
class Side:
    """One way to generate: category -> for each prompt the median seconds; for ours also tokens per round."""

    name: str
    generate: Callable[[dict[str, Tensor]], tuple[Tensor, specdec.DecodingStats | None]]
    is_checked: bool
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens_per_round: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    control_share: list[float] = field(default_factory=list)


def sides(model: PreTrainedModel, args: argparse.Namespace) -> list[Side]:
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    def ours(drafter: Drafter) -> Callable[[dict[str, Tensor]], Any]:
        def generate(prompt: dict[str, Tensor]) -> Any:
            out = specdec.generate(model, **prompt, drafter=drafter, return_dict_in_generate=True, **settings)
            return out.sequences, out.stats

        return generate

    def theirs(layer: int) -> Callable[[dict[str, Tensor]], Any]:
        return lambda prompt: (model.generate(**prompt, assistant_early_exit=layer, **settings), None)

    exits = {} if args.exits is None else {"exits": None if args.exits == "none" else args.exits}
    return [
        Side(PLAIN, ours(Plain()), is_checked=True),
        Side(OURS, ours(EarlyExit(**exits)), is_checked=True),
        *(Side(f"transformers, exit {layer}", theirs(layer), is_checked=False) for layer in args.layers),
    ]


def measure(model: PreTrainedModel, competitors: list[Side], prompt: Prompt, inputs: Any, repetitions: int) -> None:
    """Time all sides on one prompt, and compare their outputs."""
    seconds: dict[str, list[float]] = defaultdict(list)
    outputs: dict[str, Tensor] = {}
    for _ in range(repetitions):
        for side in competitors:
            started = perf_counter()
            outputs[side.name], stats = side.generate(inputs)
            seconds[side.name].append(perf_counter() - started)
            if stats is not None:
                side.tokens_per_round[prompt.category].append(stats.tokens_per_round)
                side.control_share.append(stats.control_seconds / stats.total_seconds)
    num_prompt = inputs["input_ids"].shape[1]
    reference = outputs[PLAIN][0, num_prompt:].tolist()
    for side in competitors:
        side.seconds[prompt.category].append(median(seconds[side.name]))
        output = outputs[side.name][0, num_prompt:].tolist()
        if side.is_checked:
            comparison = compare(model, inputs["input_ids"][0], reference, output, {"do_sample": False})
            assert comparison.verdict is not Verdict.DIFFERENT, f"{side.name} on {prompt.text[:50]!r}: {comparison}"


def summarise(competitors: list[Side]) -> dict[str, Any]:
    """Speed-ups over plain decoding by category, their geometric mean, and what the bars of the issue ask for."""
    plain, ours, *theirs = competitors
    rows = {side.name: {category: _ratio(plain, side, category) for category in plain.seconds} for side in competitors}
    means = {name: geometric_mean(row.values()) for name, row in rows.items()}
    best = max(theirs, key=lambda side: means[side.name], default=None)
    return {
        "speed_up": {name: {**row, "geometric mean": means[name]} for name, row in rows.items()},
        "tokens_per_round": {category: mean(values) for category, values in ours.tokens_per_round.items()},
        "control_share": mean(ours.control_share),
        "over_transformers": None if best is None else means[OURS] / means[best.name],
        "best_of_transformers": None if best is None else best.name,
    }


def _ratio(plain: Side, side: Side, category: str) -> float:
    pairs = zip(plain.seconds[category], side.seconds[category], strict=True)
    return geometric_mean(reference / seconds for reference, seconds in pairs)


def print_table(summary: dict[str, Any]) -> None:
    columns = list(summary["speed_up"][PLAIN])
    print(f"{'speed-up over plain':<24}" + "".join(f"{name:>15}" for name in columns))
    for name, row in summary["speed_up"].items():
        print(f"{name:<24}" + "".join(f"{row[column]:>15.2f}" for column in columns))
    tokens = summary["tokens_per_round"]
    print(f"{'tokens per round':<24}" + "".join(f"{tokens[name]:>15.2f}" if name in tokens else "" for name in columns))
    print(f"time spent on comparing exits: {summary['control_share']:.1%}")
    if summary["best_of_transformers"]:
        print(f"over {summary['best_of_transformers']}: {summary['over_transformers']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=("float", "int8"), default="float")
    parser.add_argument("--exits", help="file of trained exits; 'none' for the model's own head; default: shipped ones")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 12, 20], help="exits of transformers' side")
    parser.add_argument("--limit", type=int, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="name of a file in bench/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype="float32")
    model = specdec.prepare(loaded.model, None if args.weights == "float" else args.weights)
    competitors = sides(model, args)
    prompts = load_suite(None).select(limit=args.limit).prompts
    for side in competitors:
        side.generate(encode_prompts(loaded.tokenizer, [prompts[0].text]))
    for prompt in prompts:
        measure(model, competitors, prompt, encode_prompts(loaded.tokenizer, [prompt.text]), args.repetitions)
    summary = summarise(competitors)
    print_table(summary)
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        document = {"settings": settings | {"model": Path(args.model).name}, "torch": torch.__version__, **summary}
        (RESULTS / f"{args.out}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
