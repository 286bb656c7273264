"""Replies that are held to calls of tools or to a document, as Lark grammars of llguidance.

A model that reasons may do so first. Tags that are tokens stand in a grammar as tokens: llguidance does not spell them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.server.grammar import OVERRIDES
from specdec.server.replies.format import ReplyFormat

_ANYTHING = r"/(.|\n)*/"
_SPACE = r"/[ \n]{0,4}/"


@dataclass(frozen=True, kw_only=True)
class ForcedTool:
    """A tool that a reply may call.

    Args:
        parameters: the JSON schema of its arguments.
        is_strict: whether the schema must be followed to the letter; otherwise keywords that llguidance does not know
            are passed over.
    """

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool


def calls_grammar(
    form: ReplyFormat, tools: Sequence[ForcedTool], *, is_free: bool, is_parallel: bool, is_thinking: bool
) -> str:
    """Lark: a reply that calls tools.

    Args:
        is_free: whether it may also say something, and call nothing.
        is_parallel: whether it may call more than once.
        is_thinking: whether the prompt has opened the reasoning.
    """
    assert form.style is not None
    names = [tool.name for tool in tools]
    rules = form.style.rules(names, form.tags, is_free=is_free, is_parallel=is_parallel)
    schemas = [f"arguments_{index}: %json {_schema(tool)}\n" for index, tool in enumerate(tools)]
    return _thoughtful(form, f"{rules}{''.join(schemas)}", is_thinking=is_thinking)


def document_grammar(form: ReplyFormat, schema: Any, *, is_thinking: bool) -> str:
    """Lark: a document that follows a JSON schema, behind the reasoning."""
    held = {**schema, "x-guidance": OVERRIDES} if isinstance(schema, dict) else schema
    return _thoughtful(form, f"reply: %json {json.dumps(held)}\n", is_thinking=is_thinking)


def _thoughtful(form: ReplyFormat, reply: str, *, is_thinking: bool) -> str:
    """Lark: a reply behind the reasoning, which has begun, or may."""
    if form.thoughts is None:
        return f"start: reply\n{reply}"
    opening, closing = form.thoughts
    if closing in form.tags.ids:
        thoughts = f"thoughts: {_ANYTHING} {form.tags(closing)} {_SPACE}\n"
    else:
        thoughts = f"thoughts: thought {_SPACE}\nthought[suffix={json.dumps(closing)}]: {_ANYTHING}\n"
    start = "start: thoughts reply" if is_thinking else f"start: ({form.tags(opening)} thoughts)? reply"
    return f"{start}\n{thoughts}{reply}"


def _schema(tool: ForcedTool) -> str:
    schema = {"type": "object", **tool.parameters}
    return json.dumps({**schema, "x-guidance": {**OVERRIDES, "lenient": not tool.is_strict}})
