"""A target that does not fit into memory, DySpec's own regime, beside plain decoding.

    python -m bench.offload TARGET DRAFT --prompts spec_bench.jsonl --output bench/results/offload --cold

TARGET, a folder of safetensors, stays on the disk (accelerate's offload): every forward reads all of its weights. DRAFT
becomes an int8 model in memory. Plain decoding and DySpec at every budget take turns on the questions, greedily. They
must say the same, up to numerical ties: exit code 1 if they do not. `decoding` is the time after the target's prefill,
`total` includes it.

What was read lately is still in the system's page cache if there is room for it, and offloading then costs copies but
no reading. --cold drops the weights from it before every forward of the target, as a lack of memory would. The report
says what was really read (Linux only).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import specdec
from bench._script import command, log, pair_parser, pipe_table
from bench.trees import Question, load_questions, write
from specdec import kernels
from specdec.drafters import Drafter, Plain, SmallModel
from specdec.models import load
from specdec.specs import PLAIN
from specdec.testing.equality import Verdict, compare
from specdec.text.prompting import encode_prompts
from trees import DySpec, GrowthPolicy

OPTIONS = {"do_sample": False, "repetition_penalty": 1.0}
COUNTS = ("total_seconds", "prefill_seconds", "draft_seconds", "verify_seconds")
COUNTS += ("target_forwards", "draft_forwards", "num_rounds", "num_committed")
HEADINGS = (
    *("method", "tokens per target forward", "s per target forward", "GB read for it", "s per draft forward"),
    *("s drafting a round", "s per token", "speed-up, decoding", "speed-up, total", "same as plain"),
)


def load_on_disk(folder: str, staging: str) -> PreTrainedModel:
    """In float32: bfloat16's rounding depends on the number of rows, and outputs would not be comparable."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "disk"}, offload_folder=staging
    ).eval()


def drop_from_page_cache(folders: Sequence[str]) -> None:
    for folder in folders:
        for path in Path(folder).iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """From the disk, by this process so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def decode(
    target: PreTrainedModel, ids: torch.Tensor, num_new: int, drafter: Drafter, tree: GrowthPolicy | None
) -> tuple[list[int], dict[str, float]]:
    """New tokens, and what they cost."""
    options = OPTIONS | {"max_new_tokens": num_new, "return_dict_in_generate": True}
    before = bytes_read()
    out = specdec.generate(target, ids, attention_mask=torch.ones_like(ids), drafter=drafter, tree=tree, **options)
    cost = {name: getattr(out.stats, name) for name in COUNTS} | {"bytes_read": bytes_read() - before}
    return out.sequences[0, ids.shape[1] :].tolist(), cost


def measure(
    target: PreTrainedModel, drafter: Drafter, tokenizer: Any, questions: list[Question], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """What every method cost on every question, and whether its output is that of plain decoding."""
    methods: dict[str, tuple[Drafter, GrowthPolicy | None]] = {PLAIN: (Plain(), None)}
    methods |= {f"DySpec {budget}": (drafter, DySpec(budget)) for budget in arguments.budgets}
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for question in questions:
        ids = encode_prompts(tokenizer, [question.prompt.text])["input_ids"]
        outputs: dict[str, list[int]] = {}
        for name, method in methods.items():
            log(f"{question.prompt.category} {question.id}: {name}")
            outputs[name], cost = decode(target, ids, arguments.max_new_tokens, *method)
            verdict = compare(target, ids[0], outputs[PLAIN], outputs[name], OPTIONS).verdict
            costs[name].append(cost | {"verdict": verdict.name})
    return costs


def summarise(costs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for every method, over all questions."""
    counts = (*COUNTS, "bytes_read")
    totals = {name: {count: sum(cost[count] for cost in many) for count in counts} for name, many in costs.items()}
    plain = totals[PLAIN]
    return [
        {
            "method": name,
            "tokens_per_forward": one["num_committed"] / one["num_rounds"],
            "target_forward_s": one["verify_seconds"] / one["num_rounds"],
            "gigabytes_read": one["bytes_read"] / one["target_forwards"] / 1e9,
            "draft_forward_s": one["draft_seconds"] / one["draft_forwards"] if one["draft_forwards"] else None,
            "drafting_s": one["draft_seconds"] / one["num_rounds"],
            "token_s": seconds_per_token(one),
            "decoding_speedup": seconds_per_token(plain) / seconds_per_token(one),
            "total_speedup": plain["total_seconds"] / one["total_seconds"],
            "verdicts": [cost["verdict"] for cost in costs[name]],
        }
        for name, one in totals.items()
    ]


def seconds_per_token(total: dict[str, float]) -> float:
    """After the target's prefill."""
    return (total["total_seconds"] - total["prefill_seconds"]) / total["num_committed"]


def to_line(row: dict[str, Any]) -> list[str]:
    method, *numbers, verdicts = row.values()
    same = f"{sum(verdict != Verdict.DIFFERENT.name for verdict in verdicts)}/{len(verdicts)}"
    return [method, *("-" if number is None else f"{number:.2f}" for number in numbers), same]


def parse_arguments() -> argparse.Namespace:
    parser = pair_parser(__doc__, limit=1, max_new_tokens=48)
    parser.add_argument("--tasks", nargs="+", default=["mt-bench", "qa", "math_reasoning"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--cold", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    questions = load_questions(arguments.prompts, reported=True, limit=arguments.limit)
    questions = [question for question in questions if question.prompt.category in arguments.tasks]
    draft, tokenizer, _ = load(arguments.draft, dtype="float32", device="cpu", threads=arguments.threads)
    drafter = SmallModel(specdec.prepare(draft, weights="int8"))
    with tempfile.TemporaryDirectory() as staging:
        target = load_on_disk(arguments.target, staging)
        if arguments.cold:
            folders = (arguments.target, staging)
            target.register_forward_pre_hook(lambda *_: drop_from_page_cache(folders))
        costs = measure(target, drafter, tokenizer, questions, arguments)
    rows = summarise(costs)
    document = {
        "target": Path(arguments.target).name,
        "draft": Path(arguments.draft).name,
        "command": command("offload"),
        "kernels": f"target float32 on disk, draft int8, {kernels.describe()}, {arguments.threads} threads",
        "versions": {module.__name__: module.__version__ for module in (specdec, torch, transformers)},
        "questions": [question.id for question in questions],
        "rows": rows,
        "costs": costs,
    }
    write(document, arguments.output, pipe_table(HEADINGS, [to_line(row) for row in rows]))
    sys.exit(1 if any(Verdict.DIFFERENT.name in row["verdicts"] for row in rows) else 0)


if __name__ == "__main__":
    main()
