"""From a request to its tokens and its grammar: nobody's is held up by another's, however long that one takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from specdec.server.errors import ApiError, invalid, queue_full
from specdec.server.grammar import ANY_OBJECT, GrammarError, GrammarSource, refusal
from specdec.server.planning import Planner
from specdec.server.protocol.requests import ChatRequest, CompletionRequest, ResponseFormat, Tool
from specdec.server.replies.grammar import ForcedTool, calls_grammar, document_grammar
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
    """What a request asks to be continued, and what holds the replies.

    Args:
        is_thinking: whether the prompt has opened the reasoning.
    """

    prompts: list[list[int]]
    matcher: LLMatcher | None
    is_thinking: bool


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
        if isinstance(body, ChatRequest):
            rendered = await self._render(body)
            texts: Sequence[str | list[int]] = [rendered]
            is_thinking = self._planner.facts.form.opens_reasoning(rendered)
        else:
            texts, is_thinking = body.prompts, False
        size = sum(map(len, texts))
        prompts = await self._in_thread(lambda: self._planner.encode(body, texts), is_slow=size > _LARGE)
        return Preprocessed(
            prompts=prompts, matcher=await self._matcher(body, is_thinking=is_thinking), is_thinking=is_thinking
        )

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
        tokenizer, variables = self._planner.facts.tokenizer, self._planner.variables(body)
        messages, tools = self._planner.conversation(body)
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # not a template of the model's, but code that the operator has installed
            try:
                return await self._in_thread(
                    lambda: render_chat(tokenizer, messages, tools=tools, **variables), is_slow=True
                )
            except ValueError as error:
                raise invalid(str(error), "messages") from error
        try:
            template = tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # there are several, and none is the default
            raise invalid(str(error), "messages") from error
        answer = await self._sandbox.render(
            template,
            messages,
            tools,
            {**tokenizer.special_tokens_map, **variables},
            max_characters=self._planner.max_characters,
        )
        if answer.kind == "done":
            return answer.text
        if answer.kind == "too long":
            raise self._planner.too_long(body, int(answer.text))
        raise _template_error(answer)

    async def _matcher(self, body: ChatRequest | CompletionRequest, *, is_thinking: bool) -> LLMatcher | None:
        source, param = self._grammar(body, is_thinking=is_thinking)
        if source is None:
            return None
        grammars = self._planner.grammars
        if grammars is None:
            raise invalid(
                f"{self._planner.facts.name} cannot be held to JSON: no token ends its replies, or its tokenizer is "
                "slow",
                param,
            )
        answer = await self._sandbox.compile(source)
        if answer.kind != "done":
            raise _grammar_error(answer, param)
        try:  # what the sandbox has compiled is known to be cheap
            return await self._in_thread(lambda: grammars.matcher(answer.text), is_slow=True)
        except GrammarError as error:
            raise invalid(str(error), param, "invalid_schema") from error

    def _grammar(self, body: ChatRequest | CompletionRequest, *, is_thinking: bool) -> tuple[GrammarSource | None, str]:
        """What the replies are held to, and the parameter that asks for it."""
        form = self._planner.facts.form
        if isinstance(body, ChatRequest):
            tools = [_forced(tool) for tool in body.callable_tools]
            if body.forces_call or any(tool.is_strict for tool in tools):
                if _asks_for_document(body.response_format):
                    raise invalid("a strict tool and a response_format do not go together: ask for one", "tools")
                grammar = calls_grammar(
                    form,
                    tools,
                    is_free=not body.forces_call,
                    is_parallel=body.parallel_tool_calls is not False and not body.names_tool,
                    is_thinking=is_thinking,
                )
                return GrammarSource("lark", grammar), "tools"
        wanted = body.response_format
        if wanted is None or not _asks_for_document(wanted):
            return None, "response_format"
        schema: Any = ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.schema_
        if isinstance(body, ChatRequest) and form.thoughts is not None:
            return GrammarSource("lark", document_grammar(form, schema, is_thinking=is_thinking)), "response_format"
        return GrammarSource.of_schema(schema), "response_format"


def _asks_for_document(wanted: ResponseFormat | None) -> bool:
    return wanted is not None and wanted.type != "text"


def _forced(tool: Tool) -> ForcedTool:
    function = tool.function
    return ForcedTool(name=function.name, parameters=function.parameters or {}, is_strict=bool(function.strict))


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


def _grammar_error(answer: Answer, param: str) -> ApiError:
    if answer.kind == "refused":
        return invalid(refusal(answer.text), param, "invalid_schema")
    if answer.kind == "exhausted":
        return invalid(
            f"compiling this JSON schema takes more than {BOUNDS}: several patterns for one text (allOf) multiply, so "
            "leave one of them; make repetitions and enumerations shorter",
            param,
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
