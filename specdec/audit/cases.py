"""What is asked: texts on which speculating engines have been seen to say something else.

Drafts come from the text itself, from a smaller model or from a head; all of them draft long copies well, so copies are
what is asked for most. What a case is about is its `group`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

COPIES, DEPTHS, LIMITS, PROSE = "copies", "depths", "limits", "prose"
STOPS, PENALTIES, STRUCTURE, BOUNDARY = "stop strings", "penalties", "structured output", "context boundary"

GROUPS = {
    COPIES: "long copies of identifiers, which drafts get right for many tokens at a time",
    DEPTHS: "copies with a change after so many words, so that drafts are accepted to every depth",
    LIMITS: "answers of 1 to 9 tokens, so that drafts are cut where the answer ends",
    PROSE: "text that nobody can draft well, so that drafts are refused",
    STOPS: "stop strings within text that is drafted",
    PENALTIES: "frequency and presence penalties, which depend on each drafted token's own prefix",
    STRUCTURE: "JSON by a schema, which allows some drafted tokens and forbids others",
    BOUNDARY: "answers up to the last token of the context, and ordinary ones afterwards",
}
"""What the cases of each group are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request.

    Args:
        prompt: of a text, or, of a conversation, its only message.
        options: of OpenAI's API: penalties, stop strings, the form of the answer.
        twin: the case that asks the same without the options.
    """

    name: str
    group: str
    prompt: str
    max_tokens: int
    is_chat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self) -> dict[str, Any]:
        """What is sent, but for the model's name."""
        said = {"messages": [{"role": "user", "content": self.prompt}]} if self.is_chat else {"prompt": self.prompt}
        return {**said, "max_tokens": self.max_tokens, "temperature": 0, **self.options}


_NAMES = (
    "kimi_k3_router_bias",
    "fetchUserProfileById",
    "MAX_RETRY_BACKOFF_MS",
    "x86_64-unknown-linux-gnu",
    "0x7ffdf3a91c48",
    "session.is_authenticated",
    "sha256:9f86d081884c7d65",
    "ParseOrderLineItemXml",
    "tcp://10.42.0.17:6379",
    "build-2026.10.11549-rc3",
)
_WORDS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty")
_CODE = """def load_accounts(path, encoding="utf-8"):
    with open(path, encoding=encoding) as handle:
        return [parse_account(line) for line in handle if line.strip()]

def load_invoices(path, encoding="utf-8"):
"""
_OPENINGS = {
    "an essay": "The lighthouse keeper put down his pen, looked at the sea and thought about",
    "a dialogue": '"You said that the bridge was closed," she began. "Then how did you',
    "an argument": "There are three reasons why cities should plant more trees. First,",
}


def make_cases(*, num_tokens: int = 96, quick: bool = False) -> list[Case]:
    """All of them but those at the boundary of the context.

    Args:
        num_tokens: of a long answer.
        quick: about half of them, with answers half as long.
    """
    length = num_tokens // 2 if quick else num_tokens
    copies = _copies(length)
    first = copies[0]
    depths = [_depth(depth, length) for depth in range(1, 9)]
    limits = [
        replace(first, name=f"at most {limit} tokens", group=LIMITS, max_tokens=limit)
        for limit in ((1, 2, 5, 8) if quick else range(1, 10))
    ]
    prose = [Case(name=name, group=PROSE, prompt=text, max_tokens=length) for name, text in _OPENINGS.items()]
    others = [*_stops(first), *_penalties(copies), *_structured(length)]
    return [*(copies[:2] if quick else copies), *depths, *limits, *(prose[:1] if quick else prose), *others]


def boundary_case(name: str, num_lines: int, max_tokens: int) -> Case:
    """A prompt of so many lines."""
    lines = "".join(f"{index % 10} {' '.join(_WORDS[:6])}\n" for index in range(num_lines))
    return Case(name=name, group=BOUNDARY, prompt=lines, max_tokens=max_tokens)


def _copies(length: int) -> list[Case]:
    listed = "\n".join(f"- {name}" for name in _NAMES)
    table = "\n".join(f"{name} = {index}" for index, name in enumerate(_NAMES))
    prompts = {
        "a list": f"Names:\n{listed}\n\nThe same names again:\n{listed}\n\nThe same names again:\n- {_NAMES[0]}\n-",
        "assignments": f"# settings\n{table}\n\n# settings, copied\n{table}\n\n# settings, copied\n{_NAMES[0]} = 0\n",
        "code": _CODE,
        "backwards": f"{' '.join(_WORDS)}\n{' '.join(reversed(_WORDS))}\n" * 3 + f"{_WORDS[0]}",
    }
    return [Case(name=name, group=COPIES, prompt=prompt, max_tokens=length) for name, prompt in prompts.items()]


def _depth(depth: int, length: int) -> Case:
    """Lines that agree in so many words after the name, and then differ."""
    shared = " ".join(_WORDS[:depth])
    lines = [f"{shared} {_WORDS[-1 - index % 3]}{index}" for index in range(6)]
    return Case(name=f"{depth} words agree", group=DEPTHS, prompt="\n".join(lines) + "\n", max_tokens=length)


def _stops(copy: Case) -> list[Case]:
    inside = replace(copy, name="within a name", group=STOPS, options={"stop": ["BACKOFF"]}, twin=copy.name)
    return [inside, replace(inside, name="across tokens", options={"stop": ["gnu\n- 0x"]})]


def _penalties(copies: list[Case]) -> list[Case]:
    penalties = {"frequency 0.7": {"frequency_penalty": 0.7}, "presence 1.5": {"presence_penalty": 1.5}}
    return [
        replace(copy, name=f"{name}, {copy.name}", group=PENALTIES, options=options, twin=copy.name)
        for copy in copies[:2]
        for name, options in penalties.items()
    ]


def _structured(length: int) -> list[Case]:
    names = {"type": "string", "enum": list(_NAMES)}
    shapes = {
        "identifiers": {"type": "array", "items": names, "minItems": 3, "maxItems": 5},
        "an object": {
            "type": "object",
            "properties": {"name": names, "size": {"type": "integer"}, "is_open": {"type": "boolean"}},
            "required": ["name", "size", "is_open"],
            "additionalProperties": False,
        },
    }
    listed = "\n".join(_NAMES)
    return [
        Case(
            name=name,
            group=STRUCTURE,
            prompt=f"Answer in JSON, by this schema: {json.dumps(schema)}\nUse these names:\n{listed}",
            max_tokens=2 * length,
            is_chat=True,
            options={"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}},
        )
        for name, schema in shapes.items()
    ]
