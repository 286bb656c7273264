"""What `specdec batch` gains from drafts and from rows: tokens per second of one job, and whether answers are the same.

    python -m bench.batch_jobs [MODEL] [--weights int8] [--lines 16] [--max-new-tokens 48] [--rows 1,8]
        [--repetitions 3] [--threads 1] [--instructions avx2] [--output bench/results/batch-jobs-demo]

The job is a file of the built-in suite's prompts, of its categories in turn, greedy. It is done by `run_batch` with a
worker for each number of rows, with `auto` and without drafts, interleaved; the model is loaded once, and its loading
and a first job of two lines are not counted. A rate is the job's tokens over the median of its seconds, prompts
included. Answers must be those of the first number of rows without drafts, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench._script import (
    WEIGHTS,
    add_instructions,
    command,
    log,
    parser_of,
    pipe_table,
    select_instructions,
    write_report,
)
from bench.throughput import in_turn
from specdec import kernels
from specdec.batch import Settings, Worker, run_batch
from specdec.drafters import Auto, Plain
from specdec.model_options import ModelOptions
from specdec.models import LoadedModel
from specdec.models.pair import load_target
from specdec.suites import load_suite

DRAFTERS = {"auto": Auto, "plain": Plain}


def do_job(loaded: LoadedModel, prompts: list[str], drafter: str, rows: int, max_new_tokens: int) -> dict[str, Any]:
    """Seconds, tokens and answers of one job."""
    with TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        worker = Worker(loaded.model, loaded.tokenizer, drafter=DRAFTERS[drafter](), max_rows=rows)
        done = run_batch(source, output, lambda: worker, Settings(max_new_tokens=max_new_tokens, do_sample=False))
        if done.num_errors:
            raise RuntimeError(f"{done.num_errors} lines were not answered")
        texts = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    return {"seconds": done.seconds, "tokens": done.num_tokens, "rounds": done.num_rounds, "texts": texts}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    options = ModelOptions(device="cpu", threads=arguments.threads, weights=arguments.weights)
    loaded = load_target(arguments.model, options)
    prompts = in_turn(load_suite(arguments.prompts), arguments.lines)
    cases = list(product(DRAFTERS, map(int, arguments.rows.split(","))))
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for drafter, rows in cases:
        do_job(loaded, prompts[:2], drafter, rows, 4)  # what happens once is not counted
    for turn in range(arguments.repetitions):
        shift = turn % len(cases)
        for drafter, rows in cases[shift:] + cases[:shift]:
            runs[drafter, rows].append(do_job(loaded, prompts, drafter, rows, arguments.max_new_tokens))
            log(f"{drafter}, {rows} rows: {runs[drafter, rows][-1]['seconds']:.1f} s")
    reference = runs["plain", cases[0][1]][0]["texts"]
    found = []
    for (drafter, rows), jobs in runs.items():
        differing = {line for job in jobs for line, text in enumerate(job["texts"]) if text != reference[line]}
        found.append(
            {
                "drafter": drafter,
                "rows": rows,
                "tokens_per_second": jobs[0]["tokens"] / median(job["seconds"] for job in jobs),
                "tokens_per_round": jobs[0]["tokens"] / jobs[0]["rounds"],
                "lines_that_differ": len(differing),
            }
        )
    return {
        "command": command("batch_jobs"),
        "machine": f"{arguments.threads} thread(s), {kernels.describe()}",
        "lines": arguments.lines,
        "jobs": found,
    }


def report(document: dict[str, Any]) -> tuple[str, ...]:
    columns = ("drafter", "rows", "tokens_per_second", "tokens_per_round", "lines_that_differ")
    lines = [
        [f"{job[name]:.2f}" if isinstance(job[name], float) else job[name] for name in columns]
        for job in document["jobs"]
    ]
    title = f"# A job of {document['lines']} lines"
    headings = [name.replace("_", " ") for name in columns]
    return title, f"    {document['command']}", document["machine"], pipe_table(headings, lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--lines", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="of the reports, without a suffix")
    add_instructions(parser)
    arguments = parser.parse_args()
    select_instructions(arguments.instructions)
    document = measure(arguments)
    parts = report(document)
    if arguments.output:
        write_report(arguments.output, document, *parts)
    print("\n\n".join(parts))
    if any(job["lines_that_differ"] for job in document["jobs"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
