"""What a model's replies can hold besides text, as its chat template and its tokenizer tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.styles import HERMES, Tags, ToolStyle, knows_tools, style_of

_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Of Qwen 3, DeepSeek R1 and their relatives; of Magistral."""
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReplyFormat:
    """How a model writes.

    Args:
        template: its chat template, of several all of them.
        style: how it writes calls of tools; None if that is not known here.
        thoughts: the tags around its reasoning; None if it has none.
        tags: which of all these tags are tokens.
        shown: of these, the special ones, which are no part of the text otherwise.
    """

    template: str
    style: ToolStyle | None
    thoughts: tuple[str, str] | None
    tags: Tags
    shown: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ReplyFormat:
        known = getattr(tokenizer, "chat_template", None) or ""
        template = known if isinstance(known, str) else "\n".join(map(str, known.values()))
        added = tokenizer.get_added_vocab()
        style = style_of(template)
        thoughts = next((pair for pair in _THOUGHTS if pair[0] in template or pair[0] in added), None)
        names = ["<|python_tag|>", *(() if style is None else style.tags), *(thoughts or ())]
        ids = {name: added[name] for name in names if name in added}
        special = set(tokenizer.all_special_ids)
        return cls(
            template=template,
            style=style,
            thoughts=thoughts,
            tags=Tags(ids),
            shown={token: name for name, token in ids.items() if token in special or _is_special(tokenizer, token)},
        )

    def parser(self, names: Collection[str], *, has_tools: bool, is_thinking: bool) -> ReplyParser:
        """What takes a reply apart.

        Args:
            names: of the tools.
            is_thinking: whether the prompt has opened the reasoning.
        """
        style = self.style if has_tools else None
        return ReplyParser(style, names, self.thoughts, is_thinking=is_thinking and self.thoughts is not None)

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether the reply to a rendered conversation goes on with reasoning."""
        return self.thoughts is not None and prompt.rstrip().endswith(self.thoughts[0])

    def taught(self, messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
        """A conversation and the tools for the template; one that knows no tools is told of them in its words."""
        if knows_tools(self.template) or not (tools or any(_is_of_tools(message) for message in messages)):
            return messages, tools
        return _spelled_out(messages, tools), None


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    known = tokenizer.added_tokens_decoder.get(token)
    return known is not None and known.special


def _is_of_tools(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _spelled_out(messages: list[Message], tools: list[Any] | None) -> list[Message]:
    """Tools, calls and results as texts, in the way of Hermes, for a template that has no words for them."""
    import json

    spelled: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if spelled and spelled[-1].get("is_result"):
                spelled[-1]["content"] += f"\n{result}"
            else:
                spelled.append({"role": "user", "content": result, "is_result": True})
            continue
        calls = [call["function"] for call in message.get("tool_calls", ())]
        written = [json.dumps({"name": call["name"], "arguments": call["arguments"]}) for call in calls]
        parts = [message["content"], *(f"{HERMES.opening}\n{call}\n{HERMES.closing}" for call in written)]
        spelled.append({"role": message["role"], "content": "\n".join(part for part in parts if part)})
    said = [{"role": message["role"], "content": message["content"]} for message in spelled]
    if not tools:
        return said
    is_first = said[0]["role"] == "system"
    system = _TOOLS.format(tools="\n".join(map(json.dumps, tools)), example=_EXAMPLE)
    content = f"{said[0]['content']}\n\n{system}" if is_first else system
    return [{"role": "system", "content": content}, *said[is_first:]]


_EXAMPLE = '<tool_call>\n{"name": FUNCTION, "arguments": OBJECT}\n</tool_call>'
_TOOLS = (
    "You can call these functions; each line describes one, with a JSON schema of its arguments:\n<tools>\n{tools}\n"
    "</tools>\nTo call one, write this and nothing after it:\n{example}\nWhat it returns comes back between "
    "<tool_response> and </tool_response>."
)
