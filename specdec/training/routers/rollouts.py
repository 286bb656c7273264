"""Labels by roll-out: from each version of a step the text is written to its end, some times: which one ends better?

The reward of a step is the share of its roll-outs whose final answer is right, or, where the problem has no answer, is
the one that most roll-outs of the problem agree on (self-consistency: Wang et al. 2023). It needs no reward model, and
says of a step what a step is for; it costs a whole text for every look.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from routers.collecting import Collection, StepTuple
from specdec.drafters import Auto, PromptLookup
from specdec.generation import generate
from specdec.text.prompting import encode_rendered
from specdec.training.routers.collect import Problem, final_answer

_TEMPERATURE = 0.7
_MARKS = ("\\boxed", "####")
_TRIAL_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """How steps are rolled out.

    Args:
        count: roll-outs of each version; a single one is greedy, several are drawn at temperature 0.7.
        max_new_tokens: of each.
        batch_size: roll-outs that are written at once.
        seed: of what is drawn.

    Raises:
        ValueError: one of the counts is not positive.
    """

    count: int
    max_new_tokens: int
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Rollouts({name}={getattr(self, name)!r}): it is positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What is still to be written.

    Args:
        num_steps: both versions of a step count as one.
        num_starts: different texts to go on from; those that have ended need nothing.
        num_rollouts: from all of them.
        max_tokens: of all roll-outs together, if none ends early.
    """

    num_steps: int
    num_starts: int
    num_rollouts: int
    max_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_steps:,} steps, {self.num_starts:,} texts to go on from, {self.num_rollouts:,} roll-outs: "
            f"at most {self.max_tokens:,} tokens"
        )


def cost(tuples: Sequence[StepTuple], labelled: Collection, rollouts: Rollouts, end_text: str | None) -> Cost:
    """Of labelling what is not labelled yet.

    Args:
        end_text: what the end of a text spells; None if nothing does.
    """
    left = {problem: group for problem, group in _by_problem(tuples).items() if not labelled.has(problem)}
    num_starts = sum(len(_starts(group, end_text)) for group in left.values())
    num_rollouts = num_starts * rollouts.count
    return Cost(
        num_steps=sum(map(len, left.values())),
        num_starts=num_starts,
        num_rollouts=num_rollouts,
        max_tokens=num_rollouts * rollouts.max_new_tokens,
    )


def tokens_per_second(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tuples: Sequence[StepTuple], rollouts: Rollouts
) -> float:
    """Measured on one small batch of roll-outs; the first such batch only warms up."""
    short = replace(rollouts, max_new_tokens=min(_TRIAL_TOKENS, rollouts.max_new_tokens))
    texts = [_before(item) + item.drafted for item in tuples[: rollouts.batch_size]]
    started = seconds = 0.0
    for _ in range(2):
        started = perf_counter()
        _write(model, tokenizer, texts, short, torch.Generator(model.device))
        seconds = perf_counter() - started
    return len(texts) * short.max_new_tokens / seconds


def label(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tuples: Sequence[StepTuple],
    problems: Sequence[Problem],
    labelled: Collection,
    rollouts: Rollouts,
) -> Iterator[int]:
    """Fill a collection with the same steps and rewards by roll-out; what is there already is not written again.

    Args:
        model: writes the roll-outs.
        tuples: as collected, whatever their rewards.
        problems: of the collection, in its order.
        labelled: one part for each problem.

    Yields:
        The number of problems done.
    """
    for done, (problem, group) in enumerate(_by_problem(tuples).items(), start=1):
        if not labelled.has(problem):
            answers = _answers(model, tokenizer, group, rollouts, seed=rollouts.seed + problem)
            labelled.write(problem, rewarded(group, answers, problems[problem].answer))
        yield done


def rewarded(
    tuples: Sequence[StepTuple], answers: Mapping[str, Sequence[str | None]], answer: str | None
) -> list[StepTuple]:
    """The steps of a problem with the shares of right answers as rewards; NaN where nothing says what is right.

    Args:
        answers: the solution up to and including a version of a step -> the final answers of its roll-outs.
        answer: of the problem; None takes the one that most roll-outs agree on.
    """
    right = None if answer is None else final_answer(answer)
    if right is None:
        given = Counter(one for group in answers.values() for one in group if one is not None)
        right = given.most_common(1)[0][0] if given else None

    def reward(solution: str) -> float:
        ends = answers[solution]
        return math.nan if right is None else sum(end == right for end in ends) / len(ends)

    return [
        replace(
            item,
            draft_reward=reward(_solution(item, item.drafted)),
            target_reward=reward(_solution(item, item.written)),
        )
        for item in tuples
    ]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tuples: Sequence[StepTuple],
    rollouts: Rollouts,
    *,
    seed: int,
) -> dict[str, list[str | None]]:
    """Of every version of the steps of a problem."""
    end_text, generator = tokenizer.eos_token, torch.Generator(model.device).manual_seed(seed)
    answers: dict[str, list[str | None]] = {
        solution: [final_answer(solution)]
        for item in tuples
        for solution in (_solution(item, item.drafted), _solution(item, item.written))
    }
    starts = _starts(tuples, end_text)
    wanted = [solution for solution in starts for _ in range(rollouts.count)]
    for solution in starts:
        answers[solution] = []
    for first in range(0, len(wanted), rollouts.batch_size):
        batch = wanted[first : first + rollouts.batch_size]
        texts = _write(model, tokenizer, [tuples[0].prompt + solution for solution in batch], rollouts, generator)
        for solution, text in zip(batch, texts, strict=True):
            answers[solution].append(_answer(solution + text, end_text))
    return answers


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rollouts: Rollouts,
    generator: torch.Generator,
) -> list[str]:
    """A continuation of each text."""
    inputs = encode_rendered(tokenizer, list(texts)).to(model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if rollouts.count > 1:
        choice = {"do_sample": True, "temperature": _TEMPERATURE, "generator": generator}
    ids = generate(
        model,
        **inputs,
        drafter=Auto(PromptLookup()),
        max_new_tokens=rollouts.max_new_tokens,
        **choice,
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in new]


def _answer(solution: str, end_text: str | None) -> str | None:
    """What a roll-out comes to; nothing if it was cut off before it marked an answer."""
    has_ended = end_text is not None and end_text in solution
    return final_answer(solution) if has_ended or any(mark in solution for mark in _MARKS) else None


def _by_problem(tuples: Sequence[StepTuple]) -> dict[int, list[StepTuple]]:
    ordered = sorted(tuples, key=lambda item: (item.problem, item.index))
    return {problem: list(group) for problem, group in groupby(ordered, key=lambda item: item.problem)}


def _starts(tuples: Sequence[StepTuple], end_text: str | None) -> list[str]:
    """Solutions to go on with, each once: a step that both wrote alike has one, and one that has ended none."""
    solutions = dict.fromkeys(_solution(item, step) for item in tuples for step in (item.drafted, item.written))
    return [solution for solution in solutions if end_text is None or not solution.endswith(end_text)]


def _before(item: StepTuple) -> str:
    return item.prompt + "".join(item.previous)


def _solution(item: StepTuple, step: str) -> str:
    return "".join(item.previous) + step
