"""From a request to its tokens and its grammar: nobody's is held up by another's, however long that one takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from specdec.server.errors import ApiError, invalid, queue_full
from specdec.server.grammar import ANY_OBJECT, OVERRIDES, GrammarError, as_document, refusal
from specdec.server.planning import Planner
from specdec.server.protocol import ChatRequest, CompletionRequest, ResponseFormat
from specdec.server.sandbox import BOUNDS, Answer, Sandbox
from specdec.text.prompting import render_chat, template_failure, template_refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher

_T = TypeVar("_T")
_NUM_THREADS = 4
_NUM_SLOW_THREADS = 2
_LARGE = 1 << 16
"""Characters of a text whose tokenizing takes a tenth of a second."""


@dataclass(frozen=True, kw_only=True)
class Preprocessed:
    """What a request asks to be continued, and what holds the replies."""

    prompts: list[list[int]]
    matcher: LLMatcher | None


class Preprocessor:
    """Renders, tokenizes and compiles: in processes what may never end, in threads what is known to.

    Args:
        seconds: for a chat template or a grammar, on the clock.
        max_waiting: requests; half as many may wait for a grammar, so that those without one are not refused for it.
    """

    def __init__(self, planner: Planner, *, seconds: float, max_waiting: int):
        self._planner = planner
        grammars = planner.grammars
        self._sandbox = Sandbox(
            None if grammars is None else grammars.tokenizer_json,
            () if grammars is None else grammars.eos_ids,
            seconds=seconds,
            max_waiting=max(1, max_waiting // 2),
        )
        self._quick = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="specdec-planner")
        self._slow = ThreadPoolExecutor(_NUM_SLOW_THREADS, thread_name_prefix="specdec-slow-planner")

    async def warm_up(self) -> None:
        """Wait for the first process: what it takes to load is no part of anybody's time."""
        await self._sandbox.warm_up()

    async def prepare(self, body: ChatRequest | CompletionRequest) -> Preprocessed:
        """What the planner needs of a request. Raises `ApiError` for what cannot be done."""
        self._planner.check(body)
        texts = [await self._render(body)] if isinstance(body, ChatRequest) else body.prompts
        size = sum(map(len, texts))
        prompts = await self._in_thread(lambda: self._planner.encode(body, texts), is_slow=size > _LARGE)
        return Preprocessed(prompts=prompts, matcher=await self._matcher(body.response_format))

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Have something done that takes milliseconds."""
        return self._quick.submit(work)

    async def close(self) -> None:
        """Take nothing more; what has not begun never will."""
        await self._sandbox.close()
        for threads in (self._quick, self._slow):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], _T], *, is_slow: bool) -> _T:
        threads: Executor = self._slow if is_slow else self._quick
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def _render(self, body: ChatRequest) -> str:
        tokenizer, messages = self._planner.facts.tokenizer, self._planner.messages(body)
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # not a template of the model's, but code that the operator has installed
            try:
                return await self._in_thread(lambda: render_chat(tokenizer, messages), is_slow=True)
            except ValueError as error:
                raise invalid(str(error), "messages") from error
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:  # there are several, and none is the default
            raise invalid(str(error), "messages") from error
        answer = await self._sandbox.render(
            template, messages, tokenizer.special_tokens_map, max_characters=self._planner.max_characters
        )
        if answer.kind == "done":
            return answer.text
        if answer.kind == "too long":
            raise self._planner.too_long(body, int(answer.text))
        raise _template_error(answer)

    async def _matcher(self, wanted: ResponseFormat | None) -> LLMatcher | None:
        if wanted is None or wanted.type == "text":
            return None
        grammars = self._planner.grammars
        if grammars is None:
            raise invalid(
                f"{self._planner.facts.name} cannot be held to JSON: no token ends its replies, or its tokenizer is "
                "slow",
                "response_format",
            )
        schema: Any = ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.schema_
        answer = await self._sandbox.compile(as_document(schema), OVERRIDES)
        if answer.kind != "done":
            raise _grammar_error(answer)
        try:  # what the sandbox has compiled is known to be cheap
            return await self._in_thread(lambda: grammars.matcher(answer.text), is_slow=True)
        except GrammarError as error:
            raise invalid(str(error), "response_format", "invalid_schema") from error


def _template_error(answer: Answer) -> ApiError:
    if answer.kind == "refused":
        return invalid(template_refusal(answer.text), "messages")
    if answer.kind == "failed":
        return ApiError(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            template_failure(answer.text[:500]),
            param="messages",
            code="template_failed",
            headers={"x-should-retry": "false"},
        )
    if answer.kind == "exhausted":
        return invalid(
            f"the model's chat template takes more than {BOUNDS} for this conversation: send a shorter one; if it "
            "takes that for every conversation, the template has an error",
            "messages",
            "template_failed",
        )
    return _overload(answer, "the chat template")


def _grammar_error(answer: Answer) -> ApiError:
    if answer.kind == "refused":
        return invalid(refusal(answer.text), "response_format", "invalid_schema")
    if answer.kind == "exhausted":
        return invalid(
            f"compiling this JSON schema takes more than {BOUNDS}: several patterns for one text (allOf) multiply, so "
            "leave one of them; make repetitions and enumerations shorter",
            "response_format",
            "invalid_schema",
        )
    return _overload(answer, "a JSON schema")


def _overload(answer: Answer, what: str) -> ApiError:
    """What is not the request's own fault."""
    if answer.kind == "busy":
        return queue_full(f"too many requests wait for {what} to be compiled: try again later")
    if answer.kind == "late":
        return ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"{what} was not done within {answer.text}: the server is overloaded, try again later",
            code="overloaded",
            headers={"Retry-After": "1"},
        )
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{what} cannot be processed; the server's log says why")
