"""`specdec serve` under load: is every answer whole, and its own?

    python -m bench.serve demo --weights int8 --output bench/results/serve-demo

Starts the server, and as many clients as --concurrency says; each sends one short question after the other until
--seconds have passed, every second one as a stream. Every answer is compared with what the model says to that question
alone, greedily, without speculation, computed beforehand in this process. An answer is

    lost        no answer came, or an error
    mixed up    it is the answer to another question
    truncated   it is the beginning of the right one
    different   anything else, unless the first difference is a numerical tie (`specdec.bench.equality`), which is told

Exit code 1 if there are any. Questions differ in a name, so that answers do too; how many do is told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2
import numpy as np
import psutil
import torch

import specdec
from bench.trees import log, pipe_table
from specdec import kernels
from specdec.bench.equality import Verdict, compare
from specdec.drafters import Plain
from specdec.loading import load_target
from specdec.model_options import ModelOptions
from specdec.models import LoadedModel
from specdec.prompting import encode_chats, user_turn

SUBJECTS = (
    *("rain", "bread", "the moon", "chess", "iron", "a violin", "salt", "the sea", "a bridge", "honey", "winter"),
    *("a horse", "coffee", "the wind", "paper", "gold", "a garden", "fire", "a clock", "silk", "the desert", "rice"),
    *("a mirror", "thunder", "cheese", "a lighthouse", "coal", "the piano", "wool", "a volcano", "tea", "ice", "a map"),
    *("sand", "a compass", "olive oil", "the violet", "copper", "a ladder", "snow", "an owl", "harvest", "a candle"),
)
REQUESTS = ("Write one sentence about {}.", "What is {} used for?")
GREEDY = {"do_sample": False}
BAD = ("lost", "mixed up", "truncated", "different")


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    prompt_ids: torch.Tensor
    answer_ids: list[int]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client got; times in seconds."""

    question: int
    text: str | None
    num_tokens: int
    num_accepted: int
    num_drafted: int
    first: float | None
    total: float


def ask_alone(loaded: LoadedModel, num_tokens: int) -> list[Question]:
    """The questions, and the answers to each of them alone."""
    model, tokenizer, _ = loaded
    questions = []
    for text in (request.format(subject) for subject in SUBJECTS for request in REQUESTS):
        inputs = encode_chats(tokenizer, [user_turn(text)])
        out = specdec.generate(model, **inputs, **GREEDY, max_new_tokens=num_tokens, drafter=Plain())
        assert isinstance(out, torch.Tensor)
        prompt_ids = inputs["input_ids"][0]
        answer_ids = out[0, len(prompt_ids) :].tolist()
        answer = tokenizer.decode(answer_ids, skip_special_tokens=True)
        questions.append(Question(text=text, prompt_ids=prompt_ids, answer_ids=answer_ids, answer=answer))
    return questions


# load


async def client(
    http: httpx2.AsyncClient, number: int, questions: Sequence[Question], end: float, num_tokens: int
) -> list[Answer]:
    """One client's answers."""
    answers = []
    place = number * 7
    while perf_counter() < end:
        index = place % len(questions)
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": questions[index].text}],
            "temperature": 0,
            "max_tokens": num_tokens,
        }
        answers.append(await (streamed if place % 2 else whole)(http, index, body))
        place += 1
    return answers


async def whole(http: httpx2.AsyncClient, question: int, body: dict[str, Any]) -> Answer:
    started = perf_counter()
    try:
        response = await http.post("/chat/completions", json=body)
        response.raise_for_status()
        document = response.json()
        text, usage = document["choices"][0]["message"]["content"], document["usage"]
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        log(f"lost: {error!r}")
        text, usage = None, {}
    return as_answer(question, text, usage, None, perf_counter() - started)


async def streamed(http: httpx2.AsyncClient, question: int, body: dict[str, Any]) -> Answer:
    started, first, text, usage = perf_counter(), None, "", {}
    is_complete = False
    try:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", "/chat/completions", json=body | options) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_complete = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    usage = event["usage"] or usage
                    for choice in event["choices"]:
                        if choice["delta"]["content"]:
                            first = first or perf_counter() - started
                            text += choice["delta"]["content"]
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        log(f"lost: {error!r}")
    return as_answer(question, text if is_complete else None, usage, first, perf_counter() - started)


def as_answer(question: int, text: str | None, usage: dict[str, Any], first: float | None, total: float) -> Answer:
    details = usage.get("completion_tokens_details", {})
    accepted = details.get("accepted_prediction_tokens", 0)
    return Answer(
        question=question,
        text=text,
        num_tokens=usage.get("completion_tokens", 0),
        num_accepted=accepted,
        num_drafted=accepted + details.get("rejected_prediction_tokens", 0),
        first=first,
        total=total,
    )


async def load(
    url: str, questions: Sequence[Question], arguments: argparse.Namespace
) -> tuple[list[Answer], float, dict[str, float]]:
    """All answers, how long they took, and what the server said of itself meanwhile and afterwards."""
    limits = httpx2.Limits(max_connections=arguments.concurrency + 1)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        started = perf_counter()
        end = started + arguments.seconds
        numbers = range(arguments.concurrency)
        running = asyncio.gather(*(client(http, one, questions, end, arguments.max_new_tokens) for one in numbers))
        await asyncio.sleep(arguments.seconds / 2)
        gauges = {f"{name} in the middle": value for name, value in (await read_gauges(http, url)).items()}
        answers = [answer for some in await running for answer in some]
        seconds = perf_counter() - started
        gauges |= {f"{name} at the end": value for name, value in (await read_gauges(http, url)).items()}
        return answers, seconds, gauges


async def read_gauges(http: httpx2.AsyncClient, url: str) -> dict[str, float]:
    text = (await http.get(url.removesuffix("/v1") + "/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {"decoded": float(values["specdec_rows"]), "waiting": float(values["specdec_queue_length"])}


# verdicts


def judge(answer: Answer, questions: Sequence[Question], loaded: LoadedModel) -> str:
    expected = questions[answer.question]
    if answer.text is None:
        return "lost"
    if answer.text == expected.answer:
        return "identical"
    if any(answer.text == other.answer for other in questions):
        return "mixed up"
    if expected.answer.startswith(answer.text):
        return "truncated"
    ids = loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    verdict = compare(loaded.model, expected.prompt_ids, expected.answer_ids, ids, GREEDY).verdict
    if verdict is Verdict.TIE:
        return "tie"
    log(f"different: {expected.text!r}\n  alone      {expected.answer!r}\n  under load {answer.text!r}")
    return "different"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)}


def memory_mib(process: psutil.Process) -> dict[str, float]:
    """Resident now, and at most so far (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"now": process.memory_info().rss / 2**20, "peak": peak / 2**10}


def start_server(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", "from specdec.cli import main; main()", "serve", arguments.model]
    command += ["--name", "model", "--port", "0", "--weights", arguments.weights, "--drafter", arguments.drafter]
    command += ["--threads", str(arguments.threads), "--max-waiting", str(max(256, arguments.concurrency))]
    command += ["--max-rows", str(arguments.max_rows)]
    environment = {name: value for name, value in os.environ.items() if name != "SPECDEC_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if " at http" in line:
            return process, line.rpartition(" at ")[2].strip()
    raise RuntimeError("the server has not started")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    options = ModelOptions(device="cpu", threads=arguments.threads, weights=arguments.weights)
    loaded = load_target(arguments.model, options)
    log("asking alone")
    questions = ask_alone(loaded, arguments.max_new_tokens)
    process, url = start_server(arguments)
    try:
        watched = psutil.Process(process.pid)
        asyncio.run(load(url, questions, argparse.Namespace(**vars(arguments) | {"seconds": 1, "concurrency": 4})))
        before = memory_mib(watched)
        log("load")
        answers, seconds, gauges = asyncio.run(load(url, questions, arguments))
        after = memory_mib(watched)
    finally:
        process.terminate()
        process.wait()
    verdicts = Counter(judge(answer, questions, loaded) for answer in answers)
    return {
        "command": shlex.join(["python", "-m", "bench.serve", *sys.argv[1:]]),
        "model": arguments.model,
        "weights": arguments.weights,
        "drafter": arguments.drafter,
        "threads": arguments.threads,
        "kernels": kernels.describe(),
        "concurrency": arguments.concurrency,
        "questions": len(questions),
        "different_answers": len({question.answer for question in questions}),
        "answers": len(answers),
        "verdicts": dict(verdicts),
        "seconds": seconds,
        "tokens_per_second": sum(answer.num_tokens for answer in answers) / seconds,
        "accepted": sum(answer.num_accepted for answer in answers),
        "drafted": sum(answer.num_drafted for answer in answers),
        "first_token_s": percentiles([answer.first for answer in answers if answer.first is not None]),
        "total_s": percentiles([answer.total for answer in answers]),
        "memory_mib": {"before": before["now"], "after": after["now"], "peak": after["peak"]},
        "gauges": gauges,
    }


def report(document: dict[str, Any]) -> str:
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
    return "\n\n".join([title, f"    {document['command']}", how, pipe_table(("", ""), lines)]) + "\n"


def told(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in shares.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=["stock", "float", "int8"], default="stock")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30, help="then no new question is asked")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--output", type=Path, required=True, help="of the reports, without a suffix")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    document = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{arguments.output}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    text = report(document)
    Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")
    print(text)
    if any(document["verdicts"].get(name) for name in BAD):
        sys.exit(1)


if __name__ == "__main__":
    main()
