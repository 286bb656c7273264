"""From what the engine says to answers: whole ones, and streams of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

from specdec.server.errors import ApiError
from specdec.server.jobs import Job, Part
from specdec.server.protocol.answers import CompletionDetails, PromptDetails, SpeculationStats, Usage
from specdec.server.replies.parser import ReplyParser

if TYPE_CHECKING:
    from specdec.engine import Generation, TokenLogprobs


@dataclass
class WholeChoice:
    """A choice whose parts have been put together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    reason: str = "stop"

    def add(self, part: Part) -> None:
        self.text += part.text
        self.tokens += part.tokens
        self.offsets += part.offsets
        if part.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *part.logprobs]
        if part.finish_reason is not None:
            self.reason = part.finish_reason


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is told at the end of an answer."""

    usage: Usage
    speculation: SpeculationStats

    def with_reasoning(self, parsers: Sequence[ReplyParser]) -> Summary:
        """What the parsers have counted is told too."""
        num_tokens = sum(parser.num_reasoning_tokens for parser in parsers)
        details = self.usage.completion_tokens_details.model_copy(update={"reasoning_tokens": num_tokens})
        return replace(self, usage=self.usage.model_copy(update={"completion_tokens_details": details}))


class Form(Protocol):
    """How one answer is written."""

    def whole(self, choices: Sequence[WholeChoice], summary: Summary) -> BaseModel:
        """The answer in one document."""

    def opening(self, num_choices: int) -> Sequence[bytes]:
        """The events that a stream starts with."""

    def chunk(self, part: Part) -> Sequence[bytes]:
        """The events of a part."""

    def closing(self, summary: Summary) -> Sequence[bytes]:
        """The events at the end."""

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream early."""


async def whole_answer(job: Job, form: Form, num_choices: int) -> BaseModel:
    """Wait for everything. Raises `ApiError` as `Job.parts`."""
    choices = [WholeChoice() for _ in job.generations]
    async for part in job.parts():
        choices[part.index].add(part)
    return form.whole(choices, summary_of(job.generations, num_choices))


async def event_stream(job: Job, form: Form, num_choices: int) -> AsyncIterator[bytes]:
    """Server-sent events, one part at a time. An error becomes the last one: the status has been sent by then."""
    try:
        async with aclosing(job.parts()) as parts:
            for event in form.opening(len(job.generations)):
                yield event
            async for part in parts:
                for event in form.chunk(part):
                    yield event
        for event in form.closing(summary_of(job.generations, num_choices)):
            yield event
    except ApiError as error:
        yield form.failure(error)


def summary_of(generations: Sequence[Generation], num_choices: int) -> Summary:
    """Of all choices together, `num_choices` for each prompt; a prompt counts once."""
    stats = [generation.stats for generation in generations]
    prompts = stats[::num_choices]
    num_prompt_tokens = sum(each.num_prompt_tokens for each in prompts)
    num_tokens = sum(len(generation.tokens) for generation in generations)
    speculation = speculation_of(generations)
    usage = Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=speculation.num_accepted_tokens,
            rejected_prediction_tokens=speculation.num_draft_tokens - speculation.num_accepted_tokens,
        ),
        prompt_tokens_details=PromptDetails(cached_tokens=sum(each.num_reused_tokens for each in prompts)),
    )
    return Summary(usage=usage, speculation=speculation)


def speculation_of(generations: Sequence[Generation]) -> SpeculationStats:
    """Of all choices together."""
    stats = [generation.stats for generation in generations]
    num_rounds, num_drafted = sum(each.rounds for each in stats), sum(each.drafted for each in stats)
    num_accepted = sum(each.accepted for each in stats)
    num_tokens = sum(len(generation.tokens) for generation in generations)
    histogram = [0] * max((len(each.accepted_histogram) for each in stats), default=0)
    for each in stats:
        for count, times in enumerate(each.accepted_histogram):
            histogram[count] += times
    return SpeculationStats(
        num_rounds=num_rounds,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        mean_acceptance_length=num_tokens / num_rounds if num_rounds else None,
        draft_acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        acceptance_histogram=histogram,
    )
