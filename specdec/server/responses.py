"""Answers as `/v1/responses` writes them: a list of items, and a stream of named events about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from time import time
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel

from specdec.server.answers import Summary, WholeChoice
from specdec.server.errors import ApiError
from specdec.server.jobs import Part
from specdec.server.protocol.answers import SpeculationStats
from specdec.server.protocol.responses import ResponsesRequest
from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.scanner import CallArguments, CallStart, Piece, Reasoning, Text

_Item = dict[str, Any]
_DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class Response(BaseModel):
    """A response; what it was asked for is told again."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    error: None = None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None = None
    speculation: SpeculationStats | None
    status: Literal["in_progress", "completed", "incomplete"]
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: dict[str, Any] | None


class ResponsesForm:
    """`/v1/responses`.

    Args:
        body: what is asked.
        parser: takes the reply apart.
        make_id: of a call.
    """

    def __init__(self, body: ResponsesRequest, parser: ReplyParser, make_id: Callable[[], str]):
        self._body, self._parser, self._make_id = body, parser, make_id
        self._id, self._created = f"resp_{uuid4().hex}", int(time())
        self._items: list[_Item] = []
        self._is_open = False
        self._reason = "stop"
        self._num_events = 0

    def whole(self, choices: Sequence[WholeChoice], summary: Summary) -> Response:
        (choice,) = choices
        self._take([*self._parser.add(choice.text, choice.offsets), *self._parser.finish()])
        self._reason = choice.reason
        self._close()
        return self._response(summary)

    def opening(self, num_choices: int) -> list[bytes]:
        begun = self._response(None).model_dump()
        return [self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")]

    def chunk(self, part: Part) -> list[bytes]:
        events = self._take(self._parser.add(part.text, part.offsets))
        if part.finish_reason is not None:
            self._reason = part.finish_reason
            events += self._take(self._parser.finish())
            events += self._close()
        return events

    def closing(self, summary: Summary) -> list[bytes]:
        response = self._response(summary)
        return [self._event(f"response.{response.status}", response=response.model_dump())]

    def failure(self, error: ApiError) -> bytes:
        detail = error.body.error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _take(self, pieces: Sequence[Piece]) -> list[bytes]:
        events: list[bytes] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                events += self._open("function_call", name=piece.name, call_id=self._make_id(), arguments="")
            elif isinstance(piece, CallArguments):
                events.append(self._add(piece.text))
            else:
                kind = "message" if isinstance(piece, Text) else "reasoning"
                if not self._is_open or self._items[-1]["type"] != kind:
                    events += self._open(kind, **_BEGINNINGS[type(piece)])
                events.append(self._add(piece.text))
        return events

    def _open(self, kind: str, **fields: Any) -> list[bytes]:
        """A new item; the one before it is complete."""
        events = self._close()
        item = {"id": f"{_PREFIXES[kind]}_{uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._is_open = True
        events.append(self._event("response.output_item.added", output_index=self._index, item=item))
        if kind != "function_call":
            item["content"] = [{"type": _PARTS[kind], "text": ""}]
            if kind == "message":
                item["content"][0] |= {"annotations": [], "logprobs": []}
                events.append(self._part_event("response.content_part.added"))
        return events

    def _add(self, text: str) -> bytes:
        item = self._items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            return self._item_event(f"{_DELTAS['function_call']}.delta", delta=text)
        item["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        return self._item_event(f"{_DELTAS[item['type']]}.delta", delta=text, content_index=0, **extra)

    def _close(self) -> list[bytes]:
        """The item under way is complete."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        done = f"{_DELTAS[item['type']]}.done"
        if item["type"] == "function_call":
            events = [self._item_event(done, arguments=item["arguments"], name=item["name"])]
        else:
            text = item["content"][0]["text"]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events = [self._item_event(done, text=text, content_index=0, **extra)]
            if item["type"] == "message":
                events.append(self._part_event("response.content_part.done"))
        return [*events, self._event("response.output_item.done", output_index=self._index, item=item)]

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _part_event(self, kind: str) -> bytes:
        return self._item_event(kind, content_index=0, part=self._items[-1]["content"][0])

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        document = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(document)}\n\n".encode()

    def _response(self, summary: Summary | None) -> Response:
        """As it stands; without a summary it has just begun."""
        body, is_cut = self._body, self._reason == "length"
        format_ = None if body.text is None or body.text.format is None else body.text.format
        told = {"type": "text"} if format_ is None else format_.model_dump(exclude_none=True, by_alias=True)
        return Response(
            id=self._id,
            created_at=self._created,
            model=body.model,
            status="in_progress" if summary is None else "incomplete" if is_cut else "completed",
            output=self._items,
            incomplete_details={"reason": "max_output_tokens"} if is_cut and summary is not None else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=body.temperature,
            text={"format": told},
            tool_choice=_told_choice(body),
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            top_p=body.top_p,
            usage=None if summary is None else _usage(summary.with_reasoning([self._parser])),
            speculation=None if summary is None else summary.speculation,
        )


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_BEGINNINGS: dict[type, dict[str, Any]] = {
    Text: {"role": "assistant", "content": []},
    Reasoning: {"summary": [], "content": []},
}


def _told_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    return choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto"


def _usage(summary: Summary) -> dict[str, Any]:
    usage = summary.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
