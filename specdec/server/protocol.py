"""What is asked and answered, in the words of OpenAI's API: one class for each object.

A parameter that is not here is refused. JSON null stands for a parameter that was left out.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

UNSUPPORTED = frozenset(
    (
        *("audio", "best_of", "echo", "function_call", "functions", "modalities", "moderation"),
        *("parallel_tool_calls", "prediction", "prompt_cache_retention", "reasoning_effort"),
        *("service_tier", "store", "suffix", "tool_choice", "tools", "verbosity"),
        *("web_search_options", "annotations", "name", "refusal", "tool_calls", "tool_call_id"),
        "include_obfuscation",
    )
)
"""Parameters of OpenAI's API that are not supported: refused unless they ask for nothing (null, false, empty)."""

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
}
"""Values of these that ask for nothing either: what is done anyway, and what matters only where there are tools."""

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_SCHEMA_BYTES = 1 << 16
MAX_PARAMETERS = 256
MAX_BIASES = 1024
_MAX_WHOLE = 2**31 - 1


def _is_text(value: str) -> str:
    """JSON can also spell halves of characters, which have no UTF-8 form."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a half of a surrogate pair is no character") from None
    return value


def _check_size(most: int) -> BeforeValidator:
    """Refuse a large object before anything is said about each of its members."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"it has {len(value)} members, at most {most} are allowed")
        return value

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_is_text)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Length = Annotated[int, Field(ge=1, le=_MAX_WHOLE)]
Biases = Annotated[dict[TokenKey, Bias], _check_size(MAX_BIASES)]
Metadata = Annotated[
    dict[Annotated[Text, StringConstraints(max_length=64)], Annotated[Text, StringConstraints(max_length=512)]],
    _check_size(16),
]
Effectless = Field(None, description="Has no effect.")
Beyond = "Beyond OpenAI's API: "


class _Asked(BaseModel):
    """Strict: a number is no text, and what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_PARAMETERS:
            raise ValueError(f"an object has {len(values)} members: there are not that many parameters")
        known = cls.model_fields.keys()
        return {name: value for name, value in values.items() if name in known or not _asks_for_nothing(name, value)}


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name not in UNSUPPORTED:
        return False
    return not value or any(type(value) is type(idle) and value == idle for idle in NO_EFFECT.get(name, ()))


class TextPart(_Asked):
    type: Literal["text"]
    text: Text


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(_Asked):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        size = len(json.dumps(self.schema_))
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(f"the schema has {size} bytes of JSON, at most {MAX_SCHEMA_BYTES} are allowed")
        return self


class ResponseFormat(_Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with the type "json_schema", and only with it')
        return self


class StreamOptions(_Asked):
    include_usage: bool | None = None


class _Sampling(_Asked):
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
    prompt_cache_key: Text | None = Effectless
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(
        None, description=f"{Beyond}divides the scores of tokens of prompt and reply (negative ones are multiplied)."
    )
    response_format: ResponseFormat | None = None
    safety_identifier: Text | None = Effectless
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_WHOLE)] | None = Field(
        None, description=f"{Beyond}draw from so many of the likeliest tokens; 0 and -1: from all."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Text | None = Effectless

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.includes_usage and not self.stream:
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


class ChatRequest(_Sampling):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    max_completion_tokens: Length | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit: give only one")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives asked for at each token; None if no log probability is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_WHOLE)]], Field(fail_fast=True)]


class CompletionRequest(_Sampling):
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


# answers

FinishReason = Literal["stop", "length"]


class CompletionDetails(BaseModel):
    """Of drafted tokens, how many were kept and how many refused. Both were verified; only the kept ones count."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class PromptDetails(BaseModel):
    """Tokens of the prompt whose states were there already."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Of the old API: lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """An answer, and each part of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specdec"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "closing"]
    model: str
