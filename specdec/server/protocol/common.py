"""What all requests have in common: what is refused, what asks for nothing, how large a thing may be."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

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
        *("web_search_options", "annotations", "refusal", "include_obfuscation"),
        *("background", "conversation", "include", "max_tool_calls", "previous_response_id", "truncation"),
        *("summary", "encrypted_content", "phase"),
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
    "truncation": ("disabled",),
    "summary": ("auto",),
    "phase": ("commentary", "final_answer"),
    "verbosity": ("medium",),
}
"""Values of these that ask for nothing either: what is done anyway, and what matters only where there are tools."""

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_SCHEMA_BYTES = 1 << 16
MAX_TOOLS = 128
MAX_PARAMETERS = 256
MAX_BIASES = 1024
MAX_WHOLE = 2**31 - 1


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
Length = Annotated[int, Field(ge=1, le=MAX_WHOLE)]
Biases = Annotated[dict[TokenKey, Bias], _check_size(MAX_BIASES)]
Metadata = Annotated[
    dict[Annotated[Text, StringConstraints(max_length=64)], Annotated[Text, StringConstraints(max_length=512)]],
    _check_size(16),
]
TemplateOptions = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,63}$")], bool | int | float | Text | None],
    _check_size(16),
]
Effectless = Field(None, description="Has no effect.")
Beyond = "Beyond OpenAI's API: "


class Asked(BaseModel):
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


class TextPart(Asked):
    type: Literal["text"]
    text: Text


def check_schemas(*schemas: Any) -> None:
    """Raise `ValueError` if there is too much to compile."""
    size = sum(len(json.dumps(schema)) for schema in schemas)
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema has {size} bytes of JSON, at most {MAX_SCHEMA_BYTES} are allowed")
