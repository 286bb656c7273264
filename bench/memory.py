"""What a model takes in memory on a CPU, by the format of its weights: while it is loaded, then, and while it decodes.

    python -m bench.memory demo
    python -m bench.memory MODEL --weights float,int8 --drafter prompt-lookup --output bench/results/memory

Each format has a process of its own. MiB of resident memory, as Linux counts it, with Python and torch themselves
(the column `imports`); a file that is mapped (safetensors) counts as far as it has been read.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from typing import Any

import psutil
import torch

from bench._script import command, log, parser_of, pipe_table, write_report
from specdec.bench.memory import PeakMemory

PROMPT = "def area(width, height):\n    return width * height\n\ndef perimeter("
NUM_TOKENS = 48
COLUMNS = ("weights", "imports", "most while loading", "loaded", "most while decoding")


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", metavar="FORMATS", default="stock,float,int8,int4", help="%(default)s")
    parser.add_argument("--drafter", default="auto", help="a name, as after --drafter of the commands; %(default)s")
    parser.add_argument("--output", type=Path, help="of the reports, without a suffix")
    return parser.parse_args()


def measure(model: str, weights: str, drafter: str) -> dict[str, Any]:
    """In MiB, in this process."""
    import specdec
    from specdec.model_options import ModelOptions
    from specdec.models.pair import load_pair

    process, peak = psutil.Process(), PeakMemory(torch.device("cpu"))

    def resident() -> float:
        return process.memory_info().rss / 2**20

    before = resident()
    peak.reset()
    loaded = load_pair(model, None, ModelOptions(weights=weights, threads=1, device="cpu")).target
    loading, after = peak.mib(), resident()
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    peak.reset()
    specdec.generate(loaded.model, **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, drafter=drafter)
    return dict(zip(COLUMNS, (weights, *map(round, (before, loading or 0.0, after, peak.mib() or 0.0))), strict=True))


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for weights in arguments.weights.split(","):
        log(f"{weights} ...")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (arguments.model, weights, arguments.drafter)))
    table = pipe_table(COLUMNS, [tuple(row.values()) for row in rows])
    print(table)
    if arguments.output is not None:
        write_report(arguments.output, {"command": command("memory"), "rows": rows}, f"    {command('memory')}", table)


if __name__ == "__main__":
    main()
