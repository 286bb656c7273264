"""Requests that are meant to hold up a server: what a soak test sends between ordinary ones.

Each is legal JSON within the default limit of a body. None may take a server down or keep others waiting; what they are
answered is an ordinary status below 500 (400 for most, 200 where the request is only large, 429 under load).
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_HELLO = [{"role": "user", "content": "hello"}]
_SIZE = 900_000
"""Characters: a large body, below the limit."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A request: `http.post(attack.path, json=attack.request(model))`."""

    name: str
    path: str
    body: dict[str, Any]

    def request(self, model: str) -> dict[str, Any]:
        return {"model": model, **self.body}


def wanting(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameter that asks for a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def schema_bomb(num_patterns: int = 40, salt: str = "") -> dict[str, Any]:
    """llguidance 1.9.1 takes time and memory that double with every pattern; other salts make other schemas."""
    return {"allOf": [{"type": "string", "pattern": f".*{salt}{index}.*"} for index in range(num_patterns)]}


def _chat(name: str, **body: Any) -> Attack:
    return Attack(name=name, path=CHAT, body={"messages": _HELLO, "max_tokens": 4, **body})


def _text(name: str, **body: Any) -> Attack:
    return Attack(name=name, path=TEXT, body={"prompt": "hello", "max_tokens": 4, **body})


def _schema(name: str, schema: dict[str, Any]) -> Attack:
    return _chat(name, **wanting(schema))


def _said(name: str, content: Any) -> Attack:
    return _chat(name, messages=[{"role": "user", "content": content}])


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _seen_again(letter: str, distance: int) -> str:
    """A pattern whose automaton doubles with the distance."""
    return f".*{letter}.{{{distance}}}"


def _tools() -> list[Attack]:
    def forced(name: str, *schemas: Any) -> Attack:
        functions = [{"name": f"f{index}", "parameters": schema} for index, schema in enumerate(schemas)]
        tools = [{"type": "function", "function": function} for function in functions]
        return _chat(name, tools=tools, tool_choice="required")

    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * _SIZE}}]
    return [
        forced("a tool whose patterns double", {"type": "object", "properties": {"a": schema_bomb()}}),
        forced("many tools", *({"type": "object", "properties": {"a": {}}} for _ in range(128))),
        forced("too many tools", *({} for _ in range(9999))),
        forced("a tool that breaks out", {"description": '"}\nstart: "owned"', "properties": {"a\n%json": {}}}),
        _chat("deep arguments", messages=[*_HELLO, {"role": "assistant", "tool_calls": calls}]),
        _chat("variables of the template", chat_template_kwargs={"messages": "x"}),
    ]


ATTACKS: tuple[Attack, ...] = (
    _schema("patterns that double", schema_bomb()),
    _schema("other patterns that double", schema_bomb(30, "x")),
    _schema("fewer patterns", schema_bomb(16)),
    _schema("a pattern and lengths", {"type": "string", "pattern": ".*a.*", "minLength": 100, "maxLength": 100_000}),
    _schema("a pattern with many states", {"type": "string", "pattern": _seen_again("a", 200)}),
    _schema("a pattern with more states", {"type": "string", "pattern": _seen_again("a", 1000)}),
    _schema(
        "many such patterns",
        {"anyOf": [{"type": "string", "pattern": _seen_again(letter, 30)} for letter in string.ascii_lowercase]},
    ),
    _schema("a large enumeration", {"enum": [f"value-{index}" for index in range(3000)]}),
    _schema("many properties", {"type": "object", "properties": {f"p{index}": {} for index in range(2000)}}),
    _schema("many required ones", {"type": "object", "required": [f"p{index}" for index in range(3000)]}),
    _schema("a deep schema", _nested(25)),
    _schema("long arrays", {"type": "array", "items": {"type": "array", "minItems": 10**6}, "minItems": 10**6}),
    _schema("a schema of itself", {"$ref": "#"}),
    *_tools(),
    _said("a long word", "a" * _SIZE),
    _said("spaces", " " * _SIZE),
    _said("digits", "1" * _SIZE),
    _said("emoji", "\N{GRINNING FACE}" * (_SIZE // 12)),
    _said("combining marks", "e\u0301" * (_SIZE // 7)),
    _said("words", "hello world " * (_SIZE // 12)),
    _said("many parts", [{"type": "text", "text": "a"}] * (_SIZE // 40)),
    _said("many empty parts", [{}] * (_SIZE // 4)),
    _chat("many messages", messages=_HELLO * (_SIZE // 40)),
    _chat("many empty messages", messages=[{}] * (_SIZE // 4)),
    _chat("many wrong stops", stop=[1] * (_SIZE // 3)),
    _chat("many stops", stop=["stop"] * (_SIZE // 8)),
    _chat("a long stop", stop="a" * _SIZE),
    _chat("many biases", logit_bias={str(index): 1 for index in range(_SIZE // 12)}),
    _chat("many wrong biases", logit_bias={f"x{index}": "x" for index in range(_SIZE // 16)}),
    _chat("much metadata", metadata={f"x{index}": "x" for index in range(_SIZE // 16)}),
    _chat("many parameters", **{f"x{index}": 1 for index in range(_SIZE // 12)}),
    _chat("a long name", **{"x" * _SIZE: 1}),
    _chat("many choices", n=128),
    _text("a mixed list", prompt=["a", 1] * (_SIZE // 8)),
    _text("wrong tokens", prompt=[-1] * (_SIZE // 4)),
    _text("many wrong prompts", prompt=[[-1]] * (_SIZE // 6)),
    _text("many prompts", prompt=["a"] * (_SIZE // 5)),
    _text("many tokens", prompt=[1] * (_SIZE // 3)),
    _text("a long text", prompt="a" * _SIZE),
)

HOSTILE_BODIES: list[dict[str, Any]] = [attack.body for attack in ATTACKS]
"""Without the model's name; those with a `prompt` are for /v1/completions, the others for /v1/chat/completions."""
