"""From what the engine says to the documents of the API: whole answers, and streams of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from specdec.server.errors import ApiError
from specdec.server.jobs import Job, Part
from specdec.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionDetails,
    Delta,
    FinishReason,
    PromptDetails,
    ReplyMessage,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

if TYPE_CHECKING:
    from specdec.engine import Generation, TokenLogprobs
    from specdec.server.grammar import Grammars

_END = b"data: [DONE]\n\n"


@dataclass
class WholeChoice:
    """A choice whose parts have been put together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def add(self, part: Part) -> None:
        self.text += part.text
        self.tokens += part.tokens
        self.offsets += part.offsets
        if part.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *part.logprobs]
        if part.finish_reason is not None:
            self.finish_reason = _reason(part.finish_reason)


class Form(Protocol):
    """How an answer is written."""

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> BaseModel:
        """The answer in one document."""

    def opening(self, num_choices: int) -> Sequence[BaseModel]:
        """What a stream starts with."""

    def chunk(self, part: Part) -> BaseModel:
        """One event of a stream."""

    def closing(self, usage: Usage) -> BaseModel:
        """The event that tells the usage."""


class TokenDecoder:
    """Tokens as text and as bytes.

    Args:
        grammars: know the bytes of every token; None takes those of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, grammars: Grammars | None):
        self._tokenizer = tokenizer
        self._grammars = grammars

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def bytes(self, token: int) -> list[int]:
        return list(self.text(token).encode() if self._grammars is None else self._grammars.bytes_of(token))


class _Form:
    def __init__(self, prefix: str, model: str, decoder: TokenDecoder):
        self._head: dict[str, Any] = {"id": f"{prefix}-{uuid4().hex}", "created": int(time()), "model": model}
        self._decoder = decoder


class ChatForm(_Form):
    """`/v1/chat/completions`."""

    def __init__(self, model: str, decoder: TokenDecoder):
        super().__init__("chatcmpl", model, decoder)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ChatCompletion:
        answers = [
            ChatChoice(
                index=index,
                message=ReplyMessage(content=choice.text),
                logprobs=self._logprobs(choice.tokens, choice.logprobs),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(**self._head, choices=answers, usage=usage)

    def opening(self, num_choices: int) -> list[ChatChunk]:
        return [self._event(index, Delta(role="assistant", content="")) for index in range(num_choices)]

    def chunk(self, part: Part) -> ChatChunk:
        delta = Delta(content=part.text) if part.text else Delta()
        return self._event(part.index, delta, self._logprobs(part.tokens, part.logprobs), part.finish_reason)

    def closing(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _event(
        self, index: int, delta: Delta, logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> ChatChunk:
        finish_reason = None if reason is None else _reason(reason)
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatChunk(**self._head, choices=[choice])

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._spelled(token, known.logprob),
                    top_logprobs=[
                        TopLogprob(**self._spelled(*top)) for top in zip(known.top_ids, known.top_logprobs, strict=True)
                    ],
                )
                for token, known in zip(tokens, logprobs, strict=True)
            ]
        )

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._decoder.text(token), "logprob": logprob, "bytes": self._decoder.bytes(token)}


class CompletionForm(_Form):
    """`/v1/completions`."""

    def __init__(self, model: str, decoder: TokenDecoder):
        super().__init__("cmpl", model, decoder)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> TextCompletion:
        answers = [
            TextChoice(
                index=index,
                text=choice.text,
                logprobs=self._logprobs(choice.tokens, choice.logprobs, choice.offsets),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return TextCompletion(**self._head, choices=answers, usage=usage)

    def opening(self, num_choices: int) -> list[TextCompletion]:
        return []

    def chunk(self, part: Part) -> TextCompletion:
        choice = TextChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs(part.tokens, part.logprobs, part.offsets),
            finish_reason=None if part.finish_reason is None else _reason(part.finish_reason),
        )
        return TextCompletion(**self._head, choices=[choice])

    def closing(self, usage: Usage) -> TextCompletion:
        return TextCompletion(**self._head, choices=[], usage=usage)

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, offsets: Sequence[int]
    ) -> TextLogprobs | None:
        if logprobs is None:
            return None
        spell = self._decoder.text
        return TextLogprobs(
            tokens=[spell(token) for token in tokens],
            token_logprobs=[known.logprob for known in logprobs],
            top_logprobs=[
                {spell(token): value for token, value in zip(known.top_ids, known.top_logprobs, strict=True)}
                for known in logprobs
            ],
            text_offset=list(offsets),
        )


async def whole_answer(job: Job, form: Form, num_choices: int) -> BaseModel:
    """Wait for everything. Raises `ApiError` as `Job.parts`."""
    choices = [WholeChoice() for _ in job.generations]
    async for part in job.parts():
        choices[part.index].add(part)
    return form.whole(choices, usage_of(job.generations, num_choices))


async def event_stream(job: Job, form: Form, num_choices: int, *, includes_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events, one for each part. An error becomes the last event: the status has been sent by then."""
    try:
        async with aclosing(job.parts()) as parts:
            for opening in form.opening(len(job.generations)):
                yield _event(opening)
            async for part in parts:
                yield _event(form.chunk(part))
        if includes_usage:
            yield _event(form.closing(usage_of(job.generations, num_choices)))
        yield _END
    except ApiError as error:
        yield _event(error.body)


def usage_of(generations: Sequence[Generation], num_choices: int) -> Usage:
    """Of all choices together, `num_choices` for each prompt; a prompt counts once."""
    stats = [generation.stats for generation in generations]
    prompts = stats[::num_choices]
    num_prompt_tokens = sum(each.num_prompt_tokens for each in prompts)
    num_tokens = sum(len(generation.tokens) for generation in generations)
    num_accepted = sum(each.accepted for each in stats)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=num_accepted,
            rejected_prediction_tokens=sum(each.drafted for each in stats) - num_accepted,
        ),
        prompt_tokens_details=PromptDetails(cached_tokens=sum(each.num_reused_tokens for each in prompts)),
    )


def _reason(reason: str) -> FinishReason:
    return "length" if reason == "length" else "stop"


def _event(document: BaseModel) -> bytes:
    return b"data: " + document.model_dump_json().encode() + b"\n\n"
