"""Routers that decide by a script, and a replay of who wrote what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from routers import Decision, DraftedStep, Router, Steps, TargetView
from specdec.testing import assert_same_tokens, random_prompts

NUM_NEW = 40
PROMPTS = random_prompts([5, 12, 9, 18])
STEPS = Steps(separators=("a", "q", "z", "1", "\x80"), max_tokens=11)


class Scripted(Router):
    """Escalates what a function of (row, index) says, before or after the draft has written."""

    def __init__(self, escalates, peek: int | None = None, steps: Steps = STEPS):
        self.escalates, self.peek, self.steps = escalates, peek, steps
        self.seen: list[DraftedStep] = []

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        self.seen.extend(steps)
        return [Decision(escalate=bool(self.escalates(step.row, step.index))) for step in steps]

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        return [Decision(escalate=True) if self.escalates(step.row, step.index) else None for step in steps]


def alternating(row: int, index: int) -> bool:
    return (row + index) % 2 == 0


def check_writers(model: PreTrainedModel, draft: PreTrainedModel, out, prompts: dict = PROMPTS, **options) -> None:
    """Replay: every step is its writer's greedy continuation of the text before it."""
    width = prompts["input_ids"].shape[1]
    for row, ids in enumerate(out.sequences):
        place = width
        text = ids[int((prompts["attention_mask"][row] == 0).sum()) :]
        skipped = len(ids) - len(text)
        for step in (step for step in out.stats.steps if step.row == row):
            writer = model if step.writer == "target" else draft
            before = text[: place - skipped].unsqueeze(0)
            expected = writer.generate(before, max_new_tokens=step.num_tokens, do_sample=False, **options)
            assert_same_tokens(writer, expected, text[: place - skipped + step.num_tokens].unsqueeze(0))
            place += step.num_tokens
        assert torch.equal(ids[place:], ids.new_zeros(len(ids) - place)), "padding follows the last step"
