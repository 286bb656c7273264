"""`specdec serve` under load: is every answer whole, and its own?

    python -m bench.serve demo --weights int8 --output bench/results/serve-demo

Starts the server, and as many clients as --concurrency says; each sends one short question after the other until
--seconds have passed, every second one as a stream. Every answer is compared with what the model says to that question
alone, greedily, without speculation, computed beforehand in this process. An answer is

    lost        no answer came, or an error
    mixed up    it is the answer to another question
    truncated   it is the beginning of the right one
    different   anything else, unless the first difference is a numerical tie (`specdec.testing.equality`), which is
    told

Exit code 1 if there are any. Questions differ in a name, so that answers do too; how many do is told.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import specdec
from bench import soak
from bench._script import WEIGHTS, command, log, parser_of, percentiles, pipe_table, write_report
from bench.served import server
from bench.soak import BAD, QUESTIONS, Answer, clients_of, gauges, honest, told
from specdec import kernels
from specdec.drafters import Plain
from specdec.model_options import ModelOptions
from specdec.models import LoadedModel
from specdec.models.pair import load_target
from specdec.testing.equality import Verdict, compare
from specdec.text.prompting import encode_chats, user_turn

GREEDY = {"do_sample": False}
SHARES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What the model says to a question that is the only one."""

    prompt_ids: torch.Tensor
    answer_ids: list[int]
    answer: str


def ask_alone(loaded: LoadedModel, num_tokens: int) -> dict[str, Alone]:
    """By question."""
    model, tokenizer, _ = loaded
    alone = {}
    for text in QUESTIONS:
        inputs = encode_chats(tokenizer, [user_turn(text)])
        out = specdec.generate(model, **inputs, **GREEDY, max_new_tokens=num_tokens, drafter=Plain())
        assert isinstance(out, torch.Tensor)
        prompt_ids = inputs["input_ids"][0]
        answer_ids = out[0, len(prompt_ids) :].tolist()
        answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
        alone[text] = Alone(prompt_ids=prompt_ids, answer_ids=answer_ids, answer=answer)
    return alone


async def load(
    url: str, num_clients: int, seconds: float, num_tokens: int
) -> tuple[list[Answer], float, dict[str, float]]:
    """All answers, how long they took, and what the server said of itself meanwhile and afterwards."""
    async with clients_of(url, num_clients) as target:
        started = perf_counter()
        end = started + seconds
        clients = (honest(target, one, QUESTIONS, end, num_tokens, every_stream=2) for one in range(num_clients))
        running = asyncio.gather(*clients)
        await asyncio.sleep(seconds / 2)
        told_by_server = {f"{name} in the middle": value for name, value in (await gauges(target)).items()}
        answers = [answer for some in await running for answer in some]
        seconds = perf_counter() - started
        told_by_server |= {f"{name} at the end": value for name, value in (await gauges(target)).items()}
        return answers, seconds, told_by_server


def judge(answer: Answer, alone: dict[str, Alone], loaded: LoadedModel) -> str:
    """As in a soak, but a numerical tie is no difference."""
    verdict = soak.judge(answer, {question: one.answer for question, one in alone.items()})
    if verdict != "different":
        return verdict
    expected = alone[answer.question]
    ids = loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    if compare(loaded.model, expected.prompt_ids, expected.answer_ids, ids, GREEDY).verdict is Verdict.TIE:
        return "tie"
    log(f"different: {answer.question!r}\n  alone      {expected.answer!r}\n  under load {answer.text!r}")
    return verdict


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    options = ModelOptions(device="cpu", threads=arguments.threads, weights=arguments.weights)
    loaded = load_target(arguments.model, options)
    log("asking alone")
    alone = ask_alone(loaded, arguments.max_new_tokens)
    with server(arguments) as served:
        asyncio.run(load(served.url, 4, 1, arguments.max_new_tokens))
        before = served.memory_mib()
        log("load")
        answers, seconds, told_by_server = asyncio.run(
            load(served.url, arguments.clients, arguments.seconds, arguments.max_new_tokens)
        )
        memory = {"before": before, "after": served.memory_mib(), "peak": served.peak_memory_mib()}
    verdicts = Counter(judge(answer, alone, loaded) for answer in answers)
    return {
        "command": command("serve"),
        "model": arguments.model,
        "weights": arguments.weights,
        "drafter": arguments.drafter,
        "threads": arguments.threads,
        "kernels": kernels.describe(),
        "concurrency": arguments.clients,
        "questions": len(alone),
        "different_answers": len({one.answer for one in alone.values()}),
        "answers": len(answers),
        "verdicts": dict(verdicts),
        "seconds": seconds,
        "tokens_per_second": sum(answer.num_tokens for answer in answers) / seconds,
        "accepted": sum(answer.num_accepted for answer in answers),
        "drafted": sum(answer.num_drafted for answer in answers),
        "first_token_s": percentiles([answer.first for answer in answers if answer.first is not None], SHARES),
        "total_s": percentiles([answer.total for answer in answers], SHARES),
        "memory_mib": memory,
        "gauges": told_by_server,
    }


def report(document: dict[str, Any]) -> tuple[str, ...]:
    verdicts, memory = document["verdicts"], document["memory_mib"]
    lines = [
        ("answers", f"{document['answers']} in {document['seconds']:.1f} s"),
        *((name, verdicts.get(name, 0)) for name in ("identical", "tie", *BAD)),
        ("tokens per second", f"{document['tokens_per_second']:.1f}"),
        ("drafted tokens accepted", f"{document['accepted']} of {document['drafted']}"),
        ("time to first token (streams)", told(document["first_token_s"])),
        ("time of an answer", told(document["total_s"])),
        ("memory of the server, MiB", ", ".join(f"{name} {value:.0f}" for name, value in memory.items())),
        ("requests of the server", ", ".join(f"{name} {value:.0f}" for name, value in document["gauges"].items())),
    ]
    title = f"# {document['concurrency']} clients of specdec serve, {document['model']}, {document['weights']}"
    how = (
        f"{document['questions']} questions with {document['different_answers']} different answers; "
        f"drafter {document['drafter']}, {document['kernels']}, threads: {document['threads']}"
    )
    return title, f"    {document['command']}", how, pipe_table(("", ""), lines)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=WEIGHTS, default="stock")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--concurrency", dest="clients", metavar="CLIENTS", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30, help="then no new question is asked")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--output", type=Path, required=True, help="of the reports, without a suffix")
    parser.set_defaults(url=None, max_cached_tokens=None, instructions=None)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    document = measure(arguments)
    parts = report(document)
    write_report(arguments.output, document, *parts)
    print("\n\n".join(parts))
    if any(document["verdicts"].get(name) for name in BAD):
        sys.exit(1)


if __name__ == "__main__":
    main()
