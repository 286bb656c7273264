"""`/v1/chat/completions` and `/v1/completions`: what may be asked."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from specdec.server.protocol.common import (
    MAX_STOPS,
    MAX_TOOLS,
    MAX_WHOLE,
    Asked,
    Beyond,
    Biases,
    Effectless,
    Length,
    Metadata,
    Penalty,
    Stop,
    TemplateOptions,
    Text,
    TextPart,
    check_schemas,
)

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class CalledFunction(Asked):
    name: Text
    arguments: Text

    @property
    def as_object(self) -> Any:
        """Arguments as templates know them; a text that is no JSON object stays what it is."""
        try:
            parsed = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments
        return parsed if isinstance(parsed, dict) else self.arguments


class ToolCall(Asked):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Effectless


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Text | None = Effectless
    reasoning_content: Text | None = Field(None, description=f"{Beyond}of the assistant, what it thought.")
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("tool_calls and reasoning_content are the assistant's")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError('tool_call_id goes with the role "tool", and only with it')
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has content, unless it has tool_calls")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(Asked):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        check_schemas(self.schema_)
        return self


class ResponseFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with the type "json_schema", and only with it')
        return self


class Function(Asked):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Holds calls of it to the schema, also where none is forced.")


class Tool(Asked):
    type: Literal["function"]
    function: Function


class NamedFunction(Asked):
    name: FunctionName


class NamedTool(Asked):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class SpeculationOptions(Asked):
    num_speculative_tokens: Annotated[int, Field(ge=0, le=MAX_WHOLE)] = Field(
        description="At most so many are drafted one after the other."
    )


class StreamOptions(Asked):
    include_usage: bool | None = None
    include_speculation: bool | None = Field(
        None,
        description=f"{Beyond}with each part, which of its characters were drafted, and its last tree.",
    )


class Sampling(Asked):
    """What both kinds of request have in common."""

    model: Text
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    max_tokens: Length | None = None
    metadata: Metadata | None = Effectless
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description=f"{Beyond}draw from tokens at least so likely, as a share of the likeliest one's probability."
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    prompt_cache_key: Text | None = Field(
        None,
        description="Of a client's requests with one key, drafts are also copied from earlier replies; what is said "
        "stays the same.",
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(
        None, description=f"{Beyond}divides the scores of tokens of prompt and reply (negative ones are multiplied)."
    )
    response_format: ResponseFormat | None = None
    safety_identifier: Text | None = Effectless
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    speculation: bool | SpeculationOptions | None = Field(
        None, description=f"{Beyond}false drafts nothing; what is said does not depend on it."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_WHOLE)] | None = Field(
        None, description=f"{Beyond}draw from so many of the likeliest tokens; 0 and -1: from all."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Text | None = Effectless

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if (self.includes_usage or self.includes_speculation) and not self.stream:
            raise ValueError("stream_options are for streams: set stream to true, or leave them out")
        return self

    @property
    def num_likeliest(self) -> int | None:
        """Of `top_k`, as transformers has it: 0 is all."""
        return None if self.top_k is None else max(self.top_k, 0)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_speculation(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_speculation)

    @property
    def max_drafted(self) -> int | None:
        """Tokens that a round may draft one after the other; None if nothing is said about it."""
        if isinstance(self.speculation, SpeculationOptions):
            return self.speculation.num_speculative_tokens
        return 0 if self.speculation is False else None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: TemplateOptions | None = Field(
        None, description=f"{Beyond}variables of the chat template, enable_thinking for example."
    )
    logprobs: bool | None = None
    max_completion_tokens: Length | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tool_choice: ToolChoice | None = None
    tools: Tools | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit: give only one")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = self.tool_names
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have one name")
        if (self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)) and not names:
            raise ValueError("tool_choice asks for a call, and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.forces_call and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tool_choice and response_format: a reply is a call or a document, ask for one of them")
        check_schemas(*(tool.function.parameters for tool in self.tools or ()))
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives asked for at each token; None if no log probability is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_call(self) -> bool:
        return self.may_call and self.tool_choice not in (None, "auto")

    @property
    def names_tool(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the reply may call."""
        if isinstance(self.tool_choice, NamedTool):
            chosen = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == chosen]
        return list(self.tools or ()) if self.may_call else []


Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MAX_WHOLE)]], Field(fail_fast=True)]


class CompletionRequest(Sampling):
    prompt: Text | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | Literal[False] | None = None

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text, or tokens."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if is_one else prompt
