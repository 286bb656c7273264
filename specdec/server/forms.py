"""Answers as documents of OpenAI's API: conversations and texts."""

from __future__ import annotations

from collections.abc import Sequence
from time import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from specdec.server.answers import Summary, WholeChoice
from specdec.server.errors import ApiError
from specdec.server.jobs import Part
from specdec.server.protocol.answers import (
    CalledFunctionPart,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    DraftedTree,
    FinishReason,
    ReplyMessage,
    SpeculationPart,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    ToolCallPart,
    TopLogprob,
)
from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.scanner import CallArguments, CallStart, Piece, Reasoning, Text

if TYPE_CHECKING:
    from collections.abc import Callable

    from specdec.engine import RoundReport, TokenLogprobs
    from specdec.server.grammar import Grammars

_END = b"data: [DONE]\n\n"


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
    """What answers have in common.

    Args:
        kind: of document.
        includes_usage: whether a stream ends with a chunk that tells it.
    """

    def __init__(self, kind: type[BaseModel], prefix: str, model: str, decoder: TokenDecoder, *, includes_usage: bool):
        self._kind = kind
        self._head: dict[str, Any] = {"id": f"{prefix}-{uuid4().hex}", "created": int(time()), "model": model}
        self._decoder = decoder
        self._includes_usage = includes_usage

    def closing(self, summary: Summary) -> list[bytes]:
        if not self._includes_usage:
            return [_END]
        last = self._kind(**self._head, choices=[], usage=summary.usage, speculation=summary.speculation)
        return [event(last), _END]

    def failure(self, error: ApiError) -> bytes:
        return event(error.body)

    def _origins(self, part: Part) -> SpeculationPart | None:
        if part.runs is None:
            return None
        return SpeculationPart(
            num_rounds=len(part.rounds),
            num_tokens=sum(each.num_tokens for each in part.rounds),
            num_draft_tokens=sum(len(each.tree) for each in part.rounds),
            num_accepted_tokens=sum(len(each.path) for each in part.rounds),
            runs=list(part.runs),
            tree=self._tree(part.rounds[-1]) if part.rounds else None,
        )

    def _tree(self, round_: RoundReport) -> DraftedTree | None:
        if not len(round_.tree):
            return None
        kept = set(round_.path)
        return DraftedTree(
            parents=list(round_.tree.parents),
            texts=[self._decoder.text(token) for token in round_.tree.tokens],
            accepted=[node in kept for node in range(len(round_.tree))],
        )


class ChatForm(_Form):
    """`/v1/chat/completions`.

    Args:
        make_parser: a new one, for a choice.
        make_id: of a call.
    """

    def __init__(
        self,
        model: str,
        decoder: TokenDecoder,
        *,
        make_parser: Callable[[], ReplyParser],
        make_id: Callable[[], str],
        includes_usage: bool,
    ):
        super().__init__(ChatChunk, "chatcmpl", model, decoder, includes_usage=includes_usage)
        self._make_parser = make_parser
        self._make_id = make_id
        self._parsers: list[ReplyParser] = []

    def whole(self, choices: Sequence[WholeChoice], summary: Summary) -> ChatCompletion:
        answers = []
        self._parsers = [self._make_parser() for _ in choices]
        for index, (choice, parser) in enumerate(zip(choices, self._parsers, strict=True)):
            message = self._message([*parser.add(choice.text, choice.offsets), *parser.finish()])
            answers.append(
                ChatChoice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(choice.tokens, choice.logprobs),
                    finish_reason=_reason(choice.reason, parser),
                )
            )
        usage = summary.with_reasoning(self._parsers).usage
        return ChatCompletion(**self._head, choices=answers, usage=usage, speculation=summary.speculation)

    def closing(self, summary: Summary) -> list[bytes]:
        return super().closing(summary.with_reasoning(self._parsers))

    def opening(self, num_choices: int) -> list[bytes]:
        self._parsers = [self._make_parser() for _ in range(num_choices)]
        return [self._event(index, Delta(role="assistant", content="")) for index in range(num_choices)]

    def chunk(self, part: Part) -> list[bytes]:
        parser = self._parsers[part.index]
        num_calls = parser.num_calls
        pieces = parser.add(part.text, part.offsets)
        if part.finish_reason is not None:
            pieces += parser.finish()
        events = []
        if pieces or part.logprobs or part.runs is not None:
            delta = self._delta(pieces, num_calls)
            logprobs = self._logprobs(part.tokens, part.logprobs)
            events.append(self._event(part.index, delta, logprobs, speculation=self._origins(part)))
        if part.finish_reason is not None:
            reason = _reason(part.finish_reason, parser)
            events.append(self._event(part.index, Delta(), finish_reason=reason))
        return events

    def _event(
        self,
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
        speculation: SpeculationPart | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return event(ChatChunk(**self._head, choices=[choice], speculation=speculation))

    def _message(self, pieces: Sequence[Piece]) -> ReplyMessage:
        calls: list[ToolCallPart] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                function = CalledFunctionPart(name=piece.name, arguments="")
                calls.append(ToolCallPart(id=self._make_id(), type="function", function=function))
            elif isinstance(piece, CallArguments):
                function = calls[-1].function
                function.arguments = (function.arguments or "") + piece.text
        text = _text_of(pieces, Text)
        return ReplyMessage(
            content=None if calls and not text else text,
            reasoning_content=_text_of(pieces, Reasoning) or None,
            tool_calls=calls or None,
        )

    def _delta(self, pieces: Sequence[Piece], num_calls: int) -> Delta:
        """What is new, after so many calls."""
        calls: list[ToolCallPart] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                function = CalledFunctionPart(name=piece.name, arguments="")
                calls.append(ToolCallPart(index=num_calls, id=self._make_id(), type="function", function=function))
                num_calls += 1
            elif isinstance(piece, CallArguments):
                if not calls:
                    calls.append(ToolCallPart(index=num_calls - 1, function=CalledFunctionPart(arguments="")))
                calls[-1].function.arguments = (calls[-1].function.arguments or "") + piece.text
        return Delta(
            content=_text_of(pieces, Text) or None,
            reasoning_content=_text_of(pieces, Reasoning) or None,
            tool_calls=calls or None,
        )

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

    def __init__(self, model: str, decoder: TokenDecoder, *, includes_usage: bool):
        super().__init__(TextCompletion, "cmpl", model, decoder, includes_usage=includes_usage)

    def whole(self, choices: Sequence[WholeChoice], summary: Summary) -> TextCompletion:
        answers = [
            TextChoice(
                index=index,
                text=choice.text,
                logprobs=self._logprobs(choice.tokens, choice.logprobs, choice.offsets),
                finish_reason=_reason(choice.reason),
            )
            for index, choice in enumerate(choices)
        ]
        return TextCompletion(**self._head, choices=answers, usage=summary.usage, speculation=summary.speculation)

    def opening(self, num_choices: int) -> list[bytes]:
        return []

    def chunk(self, part: Part) -> list[bytes]:
        choice = TextChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs(part.tokens, part.logprobs, part.offsets),
            finish_reason=None if part.finish_reason is None else _reason(part.finish_reason),
        )
        return [event(TextCompletion(**self._head, choices=[choice], speculation=self._origins(part)))]

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


def event(document: BaseModel) -> bytes:
    """A server-sent event."""
    return f"data: {document.model_dump_json()}\n\n".encode()


def _text_of(pieces: Sequence[Piece], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))


def _reason(reason: str, parser: ReplyParser | None = None) -> FinishReason:
    if reason == "length":
        return "length"
    return "tool_calls" if parser is not None and parser.num_calls else "stop"
