"""Lets a draft and its target write the steps that a router is trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from routers import Reward, Steps
from routers.collecting import Collection, Collector
from specdec.drafters import SmallModel
from specdec.generation import generate
from specdec.text.prompting import encode_chats, encode_texts, has_chat_template, user_turn

INSTRUCTION = (
    "Solve the problem step by step. Put a blank line between steps, and end with the final answer as \\boxed{answer}."
)
"""Asks for steps, and for an answer that can be found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question, and its answer if the file has one."""

    question: str
    answer: str | None = None


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSON-lines file: `question`, `prompt` or the first of `turns`, and perhaps `answer`.

    Raises:
        ValueError: names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problems.append(_problem(line, f"{path}, line {number}"))
    if not problems:
        raise ValueError(f"{path} holds no problem: one JSON object a line, with a `question`")
    return problems


def _problem(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    fields = record if isinstance(record, dict) else {}
    turns = fields.get("turns") or [None]
    question = fields.get("question") or fields.get("prompt") or turns[0]
    if not isinstance(question, str):
        raise ValueError(f"{where} has no `question`, `prompt` or `turns`")
    answer = fields.get("answer")
    return Problem(question=question, answer=None if answer is None else str(answer))


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], instruction: str = INSTRUCTION
) -> BatchEncoding:
    """`input_ids` and `attention_mask`, [B, P], left-padded."""
    if has_chat_template(tokenizer):
        return encode_chats(tokenizer, [user_turn(problem.question, instruction) for problem in problems])
    return encode_texts(tokenizer, [f"{instruction}\n\n{problem.question}\n\n" for problem in problems])


def final_answer(text: str) -> str | None:
    """The last number of a text: in a box, after `####`, or at the end; without separators and units."""
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    marked = boxed or re.findall(r"####(.*)", text)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked[-1] if marked else text)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "").rstrip(".")
    return str(float(number)).removesuffix(".0")


def collect(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    reward: Reward,
    collection: Collection,
    *,
    batch_size: int,
    max_new_tokens: int,
    keeps_hidden: bool = False,
    steps: Steps | None = None,
    instruction: str = INSTRUCTION,
) -> Iterator[int]:
    """Fill a collection; what is there already is not written again. Yields the number of problems done."""
    for part, first in enumerate(range(0, len(problems), batch_size)):
        batch = problems[first : first + batch_size]
        if not collection.has(part):
            router = Collector(reward, range(first, first + len(batch)), keeps_hidden=keeps_hidden, steps=steps)
            generate(
                target,
                **encode_problems(tokenizer, batch, instruction),
                drafter=SmallModel(draft, num_tokens=4),
                router=router,
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            collection.write(part, router.tuples)
        yield first + len(batch)
