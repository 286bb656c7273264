"""`/v1/responses`: what may be asked, as the conversation that it stands for. Nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from specdec.server.protocol.common import (
    MAX_TOOLS,
    MAX_WHOLE,
    Asked,
    Beyond,
    Effectless,
    Length,
    Metadata,
    TemplateOptions,
    Text,
)
from specdec.server.protocol.requests import (
    ChatRequest,
    Function,
    FunctionName,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    SpeculationOptions,
    Tool,
)


class ContentPart(Asked):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = Effectless
    logprobs: list[Any] | None = Effectless


class InputMessage(Asked):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True)]
    id: Text | None = Effectless
    status: Text | None = Effectless

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class FunctionCall(Asked):
    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text
    id: Text | None = Effectless
    status: Text | None = Effectless


class FunctionCallOutput(Asked):
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Annotated[list[ContentPart], Field(fail_fast=True)]
    id: Text | None = Effectless
    status: Text | None = Effectless

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ReasoningText(Asked):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Asked):
    """What the model has thought: it goes to the template with the message after it."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    id: Text | None = Effectless
    summary: list[Any] | None = Effectless
    status: Text | None = Effectless


AsOfChat = Field(None, description=f"{Beyond}as of a conversation.")
Item = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


class ResponseTool(Function):
    type: Literal["function"]


class NamedResponseTool(Asked):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @property
    def as_response_format(self) -> ResponseFormat:
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        schema = JsonSchema(name=self.name or "", schema=self.schema_ or {}, strict=self.strict)
        return ResponseFormat(type="json_schema", json_schema=schema)

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError('the type "json_schema" needs a name and a schema')
        return self


class TextOptions(Asked):
    format: TextFormat | None = None


class ReasoningOptions(Asked):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(Asked):
    model: Text
    input: Text | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: TemplateOptions | None = Field(None, description=f"{Beyond}variables of the chat template.")
    instructions: Text | None = None
    max_output_tokens: Length | None = None
    metadata: Metadata | None = Effectless
    min_p: Annotated[float, Field(ge=0, le=1)] | None = AsOfChat
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Text | None = AsOfChat
    reasoning: ReasoningOptions | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = AsOfChat
    safety_identifier: Text | None = Effectless
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = AsOfChat
    speculation: bool | SpeculationOptions | None = AsOfChat
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_WHOLE)] | None = AsOfChat
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Text | None = Effectless

    def as_chat(self) -> ChatRequest:
        """The conversation that is asked for. Raises `ValidationError` where parameters do not go together."""
        shared = (
            "chat_template_kwargs",
            "min_p",
            "parallel_tool_calls",
            "prompt_cache_key",
            "repetition_penalty",
            "seed",
            "speculation",
            "stream",
            "temperature",
            "top_k",
            "top_p",
        )
        choice: Any = self.tool_choice
        if isinstance(choice, NamedResponseTool):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        return ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            response_format=None
            if self.text is None or self.text.format is None
            else self.text.format.as_response_format,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            tool_choice=choice,
            tools=[Tool(type="function", function=_function(tool)) for tool in self.tools or ()],
            **{name: getattr(self, name) for name in shared},
        )

    def _messages(self) -> list[Any]:
        """Neighbouring items of the assistant are one message, as templates want it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        reasoning: str | None = None
        for item in self.input:
            if isinstance(item, ReasoningItem):
                reasoning = "".join(part.text for part in item.content or ()) or None
            elif isinstance(item, FunctionCallOutput):
                messages.append({"role": "tool", "content": item.text, "tool_call_id": item.call_id})
            elif isinstance(item, FunctionCall):
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None, "reasoning_content": reasoning})
                    reasoning = None
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": item.role, "content": item.text})
                if item.role == "assistant":
                    messages[-1]["reasoning_content"] = reasoning
                    reasoning = None
        return messages or [{"role": "user", "content": ""}]


def _function(tool: ResponseTool) -> Function:
    return Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
