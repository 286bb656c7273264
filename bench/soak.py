"""`specdec serve` for a while among hostile clients: are the honest ones served as if they were alone?

    python -m bench.soak --model demo --weights int8 --clients 64 --seconds 60 --hostile 0.05

Starts the server, or takes the one at --url. Every question is asked alone first, greedily; then --clients stream the
same questions for --seconds, and a share of them (--hostile) does what is in `bench.hostile` instead. It fails, with
exit code 1, if

    an answer is lost (none came, or an error), mixed up (that to another question), truncated (the beginning of the
    right one) or different from the one that was given alone
    a hostile request gets another answer than the right one, or a traceback is in the server's log
    requests are left over: `specdec_rows` and `specdec_queue_length` of /metrics
    the server keeps more than --memory-share of memory beyond what it had after a warm-up of the same load

`--json` prints one document instead of the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from time import monotonic, perf_counter
from typing import Any

import httpx2

from bench._script import WEIGHTS, command, log, parser_of, percentiles, pipe_table
from bench.hostile import CHAT, KINDS, Target, attack
from bench.served import Served, server

SUBJECTS = (
    *("rain", "bread", "the moon", "chess", "iron", "a violin", "salt", "the sea", "a bridge", "honey", "winter"),
    *("a horse", "coffee", "the wind", "paper", "gold", "a garden", "fire", "a clock", "silk", "the desert", "rice"),
    *("a mirror", "thunder", "cheese", "a lighthouse", "coal", "the piano", "wool", "a volcano", "tea", "ice", "a map"),
    *("sand", "a compass", "olive oil", "the violet", "copper", "a ladder", "snow", "an owl", "harvest", "a candle"),
)
REQUESTS = ("Write one sentence about {}.", "What is {} used for?")
BAD = ("lost", "mixed up", "truncated", "different")
QUESTIONS = tuple(request.format(subject) for request in REQUESTS for subject in SUBJECTS)
IDLE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client got; times in seconds.

    Args:
        text: None if the answer is lost.
        reason: why it is.
        first: until the first token.
    """

    question: str
    text: str | None
    reason: str = ""
    num_tokens: int = 0
    num_accepted: int = 0
    num_drafted: int = 0
    first: float | None = None
    total: float = 0.0


# honest clients


async def ask(target: Target, question: str, num_tokens: int, *, as_stream: bool = True) -> Answer:
    """One answer, streamed or whole."""
    started, body = perf_counter(), target.body(question, max_tokens=num_tokens)
    try:
        text, usage, first_at = await (_streamed if as_stream else _whole)(target, body)
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        return Answer(question=question, text=None, reason=repr(error))
    details = usage.get("completion_tokens_details") or {}
    accepted = details.get("accepted_prediction_tokens", 0)
    return Answer(
        question=question,
        text=text,
        num_tokens=usage.get("completion_tokens", 0),
        num_accepted=accepted,
        num_drafted=accepted + details.get("rejected_prediction_tokens", 0),
        first=first_at and first_at - started,
        total=perf_counter() - started,
    )


async def _whole(target: Target, body: dict[str, Any]) -> tuple[str, dict[str, Any], None]:
    response = (await target.http.post(CHAT, json=body)).raise_for_status()
    document = response.json()
    return document["choices"][0]["message"]["content"], document["usage"], None


async def _streamed(target: Target, body: dict[str, Any]) -> tuple[str, dict[str, Any], float | None]:
    """The text, the usage, and when the first token came."""
    first_at, text, usage, is_complete = None, "", dict[str, Any](), False
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with target.http.stream("POST", CHAT, json=body | options) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_complete = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                first_at = first_at or (perf_counter() if text else None)
    if not is_complete:
        raise ValueError("the stream has no end")
    return text, usage, first_at


async def ask_alone(target: Target, questions: Sequence[str], num_tokens: int) -> dict[str, str]:
    """The answers to each question, one at a time."""
    alone = {}
    for question in questions:
        answer = await ask(target, question, num_tokens)
        if answer.text is None:
            raise RuntimeError(f"no answer to a single request: {answer.reason}")
        alone[question] = answer.text
    return alone


async def honest(
    target: Target, number: int, questions: Sequence[str], end: float, num_tokens: int, *, every_stream: int = 1
) -> list[Answer]:
    """One question after the other; one of `every_stream` answers is streamed."""
    answers = []
    for turn in count(7 * number):
        if perf_counter() >= end:
            break
        as_stream = turn % every_stream == 0
        answers.append(await ask(target, questions[turn % len(questions)], num_tokens, as_stream=as_stream))
    return answers


def judge(answer: Answer, alone: dict[str, str]) -> str:
    if answer.text is None:
        return "lost"
    expected = alone[answer.question]
    if answer.text == expected:
        return "identical"
    if answer.text in alone.values():
        return "mixed up"
    return "truncated" if expected.startswith(answer.text) else "different"


# load


async def hostile(target: Target, number: int, kinds: Sequence[str], end: float) -> list[tuple[str, str]]:
    """Kinds in turn, and what came of each."""
    outcomes = []
    for turn in count(number):
        if perf_counter() >= end:
            break
        kind = kinds[turn % len(kinds)]
        outcomes.append((kind, await attack(target, kind)))
        await asyncio.sleep(0.05)
    return outcomes


async def probe(target: Target, end: float) -> list[float]:
    """How long `/health` takes, once a second."""
    times = []
    while perf_counter() < end:
        started = perf_counter()
        (await target.http.get("/health")).raise_for_status()
        times.append(perf_counter() - started)
        await asyncio.sleep(1)
    return times


async def load(target: Target, questions: Sequence[str], seconds: float, arguments: argparse.Namespace) -> Load:
    started = perf_counter()
    end = started + seconds
    num_hostile = _num_hostile(arguments)
    running = [
        asyncio.gather(*(hostile(target, number, arguments.kinds, end) for number in range(num_hostile))),
        asyncio.gather(probe(target, end)),
    ]
    numbers = range(arguments.clients - num_hostile)
    answers = await asyncio.gather(
        *(honest(target, number, questions, end, arguments.max_new_tokens) for number in numbers)
    )
    seconds = perf_counter() - started
    outcomes, (health,) = await running[0], await running[1]
    return Load(
        answers=[answer for some in answers for answer in some],
        outcomes=Counter(outcome for some in outcomes for outcome in some),
        health=health,
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of a load; `outcomes` counts (kind, outcome) of the hostile, `health` has seconds."""

    answers: list[Answer]
    outcomes: Counter[tuple[str, str]]
    health: list[float]
    seconds: float


def _num_hostile(arguments: argparse.Namespace) -> int:
    if not arguments.kinds or not arguments.hostile:
        return 0
    return min(max(1, round(arguments.clients * arguments.hostile)), arguments.clients - 1)


async def gauges(target: Target) -> dict[str, float]:
    text = (await target.http.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    names = {"rows": "specdec_rows", "queue": "specdec_queue_length", "cached tokens": "specdec_cached_tokens"}
    return {name: float(values[key]) for name, key in names.items()}


async def until_idle(target: Target) -> dict[str, float]:
    """The gauges, once nothing is under way or the time for that is up."""
    deadline = monotonic() + IDLE_SECONDS
    while True:
        now = await gauges(target)
        if not now["rows"] + now["queue"] or monotonic() > deadline:
            return now
        await asyncio.sleep(0.2)


# the report


@asynccontextmanager
async def clients_of(url: str, num_clients: int, patience: float = 0.0) -> AsyncIterator[Target]:
    limits = httpx2.Limits(max_connections=2 * num_clients + 8)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        yield Target(url=url, model=model, http=http, patience=patience)


async def soak(served: Served, arguments: argparse.Namespace) -> dict[str, Any]:
    questions = QUESTIONS[: arguments.questions]
    async with clients_of(served.url, arguments.clients, arguments.patience) as target:
        log(f"asking {len(questions)} questions alone")
        alone = await ask_alone(target, questions, arguments.max_new_tokens)
        log("warming up")
        await load(target, questions, arguments.warm_up, arguments)
        await until_idle(target)
        before = served.memory_mib()
        log(f"soaking for {arguments.seconds:g} s")
        result = await load(target, questions, arguments.seconds, arguments)
        left = await until_idle(target)
        after = served.memory_mib()
        again = await ask_alone(target, questions[:4], arguments.max_new_tokens)
    document = describe(result, alone, arguments) | {
        "left_over": left,
        "same_afterwards": all(alone[question] == text for question, text in again.items()),
        "memory_mib": {"before": before, "after": after},
        "tracebacks": served.num_tracebacks(),
    }
    return document | {"failures": failures(document, arguments.memory_share)}


def describe(result: Load, alone: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    verdicts = [judge(answer, alone) for answer in result.answers]
    for answer, verdict in zip(result.answers, verdicts, strict=True):
        if verdict != "identical":
            log(f"{verdict}: {answer.question!r} {answer.reason}")
            log(f"  alone       {alone[answer.question]!r}\n  in the soak {answer.text!r}")
    outcomes = {kind: dict[str, int]() for kind in arguments.kinds}
    for (kind, outcome), number in sorted(result.outcomes.items()):
        outcomes[kind][outcome] = number
    return {
        "command": command("soak"),
        "model": arguments.model,
        "weights": arguments.weights,
        "clients": arguments.clients,
        "hostile_clients": _num_hostile(arguments),
        "seconds": result.seconds,
        "different_answers": len(set(alone.values())),
        "answers": len(verdicts),
        "verdicts": dict(Counter(verdicts)),
        "tokens_per_second": sum(answer.num_tokens for answer in result.answers) / result.seconds,
        "first_token_s": percentiles([answer.first for answer in result.answers if answer.first is not None]),
        "total_s": percentiles([answer.total for answer in result.answers if answer.text is not None]),
        "hostile": outcomes,
        "health_s": percentiles(result.health),
    }


def failures(document: dict[str, Any], memory_share: float) -> list[str]:
    """What must not be."""
    found = [f"{number} answers are {name}" for name in BAD if (number := document["verdicts"].get(name))]
    if not document["answers"]:
        found.append("there are no answers")
    for kind, outcomes in document["hostile"].items():
        wrong = {outcome: number for outcome, number in outcomes.items() if outcome not in KINDS[kind].allowed}
        if wrong:
            found.append(f"{kind}: {wrong}, but right are {sorted(KINDS[kind].allowed)}")
    found += [
        f"{document['left_over'][name]:g} left in {name}" for name in ("rows", "queue") if document["left_over"][name]
    ]
    if not document["same_afterwards"]:
        found.append("a question asked again alone has another answer")
    before, after = document["memory_mib"].values()
    if before is not None and after > before * (1 + memory_share):
        found.append(f"memory has grown from {before:.0f} to {after:.0f} MiB")
    if document["tracebacks"]:
        found.append(f"{document['tracebacks']} tracebacks in the server's log")
    return found


def report(document: dict[str, Any]) -> str:
    memory = document["memory_mib"]
    lines = [
        ("clients", f"{document['clients']}, {document['hostile_clients']} of them hostile"),
        (
            "answers",
            f"{document['answers']} in {document['seconds']:.1f} s, {document['tokens_per_second']:.1f} tokens/s",
        ),
        *((name, document["verdicts"].get(name, 0)) for name in ("identical", *BAD)),
        ("time to first token", told(document["first_token_s"])),
        ("time of an answer", told(document["total_s"])),
        *((f"hostile: {kind}", counted(outcomes)) for kind, outcomes in document["hostile"].items()),
        ("time of /health", told(document["health_s"])),
        ("left over", ", ".join(f"{name} {value:g}" for name, value in document["left_over"].items())),
        ("memory of the server, MiB", ", ".join(f"{key} {value:.0f}" for key, value in memory.items() if value)),
        ("tracebacks", document["tracebacks"]),
        ("failures", "; ".join(document["failures"]) or "none"),
    ]
    return f"    {document['command']}\n\n{pipe_table(('', ''), lines)}"


def told(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in shares.items())


def counted(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{outcome} x{number}" for outcome, number in outcomes.items()) or "not done"


def parse_arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", choices=WEIGHTS, default="stock")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--max-cached-tokens", type=int, default=32_768, help="bounds the server's memory")
    parser.add_argument("--url", help="of a server that runs already; the options above then say nothing")
    parser.add_argument("--pid", type=int, help="of that server, to look at its memory")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of the clients")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), help=f"of {','.join(KINDS)}; all if absent")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds, of a hostile client")
    parser.add_argument("--seconds", type=float, default=60.0, help="then no new question is asked")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds of the same load before")
    parser.add_argument("--questions", type=int, default=32, help=f"at most {len(QUESTIONS)}")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--memory-share", type=float, default=0.1, help="that the server may grow by")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(instructions=None)
    return parser.parse_args(args)


def _kinds(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - KINDS.keys():
        raise argparse.ArgumentTypeError(f"no kind {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    return names


def main(args: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(args)
    with server(arguments) as served:
        document = asyncio.run(soak(served, arguments))
    print(json.dumps(document, indent=2) if arguments.json else report(document))
    if document["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
