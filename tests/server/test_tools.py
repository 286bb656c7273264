"""Calls of tools: forced ones by grammar, those that a model writes parsed, whole and streamed, in three styles."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import jsonschema
import openai
from llguidance import LLMatcher, LLTokenizer

from specdec.server.grammar import serialized
from specdec.server.replies.format import ReplyFormat
from specdec.server.replies.grammar import ForcedTool, calls_grammar, document_grammar
from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.scanner import CallArguments, CallStart, Piece, Reasoning, Text
from specdec.server.replies.styles import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, Tags, ToolStyle, style_of
from specdec.testing import ByteTokenizer
from tests.support.serving import NAME, Running, running, served_model

THOUGHTS = ("<think>", "</think>")
PARIS = '{"city": "Paris \\"{[\\" é"}'
ARGUMENTS = {"city": 'Paris "{[" é'}
ONE = {
    "hermes": f'<tool_call>\n{{"name": "look", "arguments": {PARIS}}}\n</tool_call>',
    "llama": f'{{"name": "look", "parameters": {PARIS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "look", "arguments": {PARIS}}}]',
    "named": f"[TOOL_CALLS]look[ARGS]{PARIS}",
}
TWO = {
    "hermes": f"{ONE['hermes']}\n{ONE['hermes']}",
    "llama": f"{ONE['llama']}; {ONE['llama']}",
    "mistral": f"{ONE['mistral'][:-1]}, {ONE['mistral'][14:]}",
    "named": ONE["named"] * 2,
}
STYLES: dict[str, ToolStyle] = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "named": MISTRAL_NAMED}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look at a city.", "parameters": CITY}}
OTHER = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "is_new": {"type": "boolean"}},
            "required": ["a", "is_new"],
            "additionalProperties": False,
        },
    },
}
ASKED = [{"role": "user", "content": "hello"}]


def parsed(parser: ReplyParser, parts: list[str]) -> list[Piece]:
    pieces = [piece for part in parts for piece in parser.add(part)] + parser.finish()
    joined: list[Piece] = []
    for piece in pieces:
        if joined and type(piece) is type(joined[-1]) and not isinstance(piece, CallStart):
            joined[-1] = type(piece)(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def cuts(text: str) -> list[list[str]]:
    """A text in one part, in characters, and in parts of three."""
    return [[text], list(text), [text[place : place + 3] for place in range(0, len(text), 3)]]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("is_thinking", [False, True])
def test_a_reply_is_taken_apart_however_it_comes(name: str, is_thinking: bool):
    call = [CallStart("look"), CallArguments(PARIS)]
    cases = {
        ONE[name]: call,
        TWO[name]: call * 2,
        f"{TWO[name]}\n": call * 2,
        "no { call < at [ all\n": [Text("no { call < at [ all\n")],
    }
    if name != "llama":
        cases[f"I look.\n{ONE[name]}"] = [Text("I look."), *call]
    for reply, expected in cases.items():
        thought = "hm <\n</think>\n\n"
        text = f"{thought}{reply}" if is_thinking else f"<think>\n{thought}{reply}"
        for parts in cuts(text):
            parser = ReplyParser(STYLES[name], ["look"], THOUGHTS, is_thinking=is_thinking)
            assert parsed(parser, parts) == [Reasoning("hm <"), *expected], parts
        for parts in cuts(reply):
            assert parsed(ReplyParser(STYLES[name], ["look"], None), parts) == expected, parts


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        (HERMES, '<tool_call>\n{"name": 1}\n</tool_call>', [Text('<tool_call>\n{"name": 1}')]),
        (HERMES, "<tool_call> none", [Text("<tool_call> none")]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}', [CallStart("f"), CallArguments('{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [CallStart("f"), CallArguments('{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [CallStart("f"), CallArguments("{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}', [CallStart("f"), CallArguments("{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a', [CallStart("f"), CallArguments('{"a')]),
        (HERMES, "<tool_ca", [Text("<tool_ca")]),
        (LLAMA, '{"answer": 42}', [Text('{"answer": 42}')]),
        (LLAMA, '{"name": "Ada", "parameters": {}}', [Text('{"name": "Ada", "parameters": {}}')]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', [CallStart("f"), CallArguments("{}")]),
        (MISTRAL, "[TOOL_CALLS] none", [Text("[TOOL_CALLS] none")]),
        (MISTRAL_NAMED, "[TOOL_CALLS]f[CALL_ID]x[ARGS]{}", [CallStart("f"), CallArguments("{}")]),
        (None, "<think>a</think>b", [Text("<think>a</think>b")]),
    ],
)
def test_what_looks_like_a_call(style: ToolStyle | None, text: str, expected: list[Piece]):
    for parts in cuts(text):
        assert parsed(ReplyParser(style, ["f"]), parts) == expected, parts


def test_reasoning_that_is_cut_off():
    for text, expected in (("<think>hm", [Reasoning("hm")]), ("<thi", [Text("<thi")]), ("<think>", [])):
        for parts in cuts(text):
            assert parsed(ReplyParser(None, (), THOUGHTS), parts) == expected


@pytest.mark.parametrize("is_thinking", [False, True])
def test_tokens_of_reasoning_are_counted_with_their_tags(is_thinking: bool):
    thought = "hm <" if is_thinking else " <think>hm <"
    for text, num_tokens in (
        (f"{thought}</think> yes", len(f"{thought}</think>")),
        (f"{thought}</think>", len(f"{thought}</think>")),
        (f"{thought}</th", len(f"{thought}</th")),
        ("" if is_thinking else "no <think>", 0),
    ):
        for parts in cuts(text):
            parser = ReplyParser(None, (), THOUGHTS, is_thinking=is_thinking)
            offsets = iter(range(len(text)))
            for part in parts:
                parser.add(part, [next(offsets) for _ in part])
            parser.finish()
            assert parser.num_reasoning_tokens == num_tokens, parts


def special_tokenizer() -> ByteTokenizer:
    """With the tags as tokens, some special, as models have them."""
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]})
    return tokenizer


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), special_tokenizer()], ids=["spelled", "tokens"])
@pytest.mark.parametrize("name", STYLES)
def test_grammars_allow_what_the_style_writes(tokenizer: ByteTokenizer, name: str):
    ids = {tag: token for tag, token in tokenizer.get_added_vocab().items() if tag[0] in "<["}
    plain = replace(ReplyFormat.of(tokenizer), style=STYLES[name], tags=Tags(ids), thoughts=None)
    tools = [ForcedTool(name=tool, parameters=CITY, is_strict=True) for tool in ("other", "look")]
    llguidance_tokenizer = LLTokenizer(serialized(tokenizer), eos_token=[tokenizer.eos_token_id])

    def accepts(form: ReplyFormat, text: str, **options: bool) -> bool:
        grammar = calls_grammar(form, tools, **{"is_free": False, "is_parallel": True, "is_thinking": False, **options})
        matcher = LLMatcher(llguidance_tokenizer, LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert accepts(plain, ONE[name])
    assert accepts(plain, TWO[name]) == (name != "llama")
    assert not accepts(plain, TWO[name], is_parallel=False)
    assert not accepts(plain, "hello")
    assert not accepts(plain, ONE[name].replace("look", "loot"))
    assert not accepts(plain, ONE[name].replace("city", "town"), is_free=True) or name == "llama"
    for text in ("hello", ONE[name]) if name == "llama" else ("hello", ONE[name], f"hello {ONE[name]}"):
        assert accepts(plain, text, is_free=True)
    thoughtful = replace(plain, thoughts=THOUGHTS)
    assert accepts(thoughtful, f"<think>\nhm\n</think>\n\n{ONE[name]}")
    assert accepts(thoughtful, ONE[name])
    assert accepts(thoughtful, f"hm\n</think>\n{ONE[name]}", is_thinking=True)
    assert not accepts(thoughtful, f"<think>hm{ONE[name]}")
    document = document_grammar(thoughtful, CITY, is_thinking=True)
    matcher = LLMatcher(llguidance_tokenizer, LLMatcher.grammar_from_lark(document))
    tokens = tokenizer.encode(f"hm</think>{PARIS}", add_special_tokens=False)
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()


def test_styles_are_told_from_templates():
    assert style_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert style_of("{% if tools %}<|python_tag|>{% endif %}") is LLAMA
    assert style_of("{% if tools %}[TOOL_CALLS]{% endif %}") is MISTRAL
    assert style_of("{% if tools %}[TOOL_CALLS]x[ARGS]{% endif %}") is MISTRAL_NAMED
    assert style_of("{{ messages }}") is HERMES, "told of the tools in the system message"
    assert style_of("{% if tools %}<tool_call><function=x>{% endif %}") is None
    assert style_of("{% if tools %}<|channel|>commentary{% endif %}") is None


TEMPLATES = {
    "untaught": None,
    "hermes": "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call>\n{% endif %}",
    "llama": "{% if tools %}{{ tools | tojson }}<|python_tag|>\n{% endif %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS]\n{% endif %}",
    "named": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[TOOL_CALLS][ARGS]\n{% endif %}",
}
MESSAGES = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '\n' }}{% endfor %}assistant: """


@pytest.fixture(scope="module", params=TEMPLATES)
def served(request: pytest.FixtureRequest):
    tokenizer = special_tokenizer() if request.param == "mistral" else ByteTokenizer()
    if TEMPLATES[request.param] is not None:
        tokenizer.chat_template = TEMPLATES[request.param] + MESSAGES
    model = served_model(max_position_embeddings=4096, vocab_size=len(tokenizer))
    with running(model, tokenizer=tokenizer, max_new_tokens=400) as server:
        yield server


@pytest.fixture
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0)


def call_of(client: openai.OpenAI, **options: Any):
    arguments = {"tools": [TOOL, OTHER], "messages": ASKED, "seed": 3, "temperature": 1.0, "max_tokens": 400}
    return client.chat.completions.create(**{"model": NAME, **arguments, **options})


def test_a_forced_call_follows_its_schema(client: openai.OpenAI):
    chosen = {"type": "function", "function": {"name": "add"}}
    (choice,) = call_of(client, tool_choice=chosen).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name == "add"
    jsonschema.validate(json.loads(call.function.arguments), OTHER["function"]["parameters"])
    parts = list(call_of(client, tool_choice=chosen, stream=True))
    deltas = [part.choices[0].delta for part in parts]
    streamed = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (streamed[0].function.name, streamed[0].index) == ("add", 0)
    assert len(streamed) > 2
    assert all(part.id is None and part.index == 0 for part in streamed[1:])
    assert "".join(part.function.arguments for part in streamed) == call.function.arguments
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert not any(delta.content for delta in deltas)


def test_what_was_called_goes_back_into_the_conversation(client: openai.OpenAI):
    first = call_of(client, tool_choice="required", parallel_tool_calls=False, tools=[OTHER]).choices[0].message
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42"}
    messages = [*ASKED, first.model_dump(exclude_none=True), answer]
    again = call_of(client, messages=messages, tool_choice="none", max_tokens=8)
    assert again.choices[0].message.content
    assert not again.choices[0].message.tool_calls
    call_of(client, messages=messages, max_tokens=8)


def test_what_cannot_be_called_is_refused(client: openai.OpenAI):
    for options, reason in (
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "none of the tools"),
        ({"tools": [TOOL, TOOL]}, "one name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "ask for one"),
        ({"messages": [{"role": "tool", "content": "42"}]}, "tool_call_id"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            call_of(client, **options)


def test_a_reply_that_goes_on_thinking_is_reasoning_token_by_token():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}<think>\n"
    with (
        running(served_model(), tokenizer=tokenizer) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "hello"}]
        options: dict[str, Any] = {"model": NAME, "messages": messages, "max_tokens": 9, "temperature": 0, "n": 2}
        reply = client.chat.completions.create(**options)
        *_, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        for usage in (reply.usage, last.usage):
            assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens == 18
        response = client.responses.create(model=NAME, input="hello", max_output_tokens=9, temperature=0)
        assert response.usage.output_tokens_details.reasoning_tokens == 9
        text = client.completions.create(model=NAME, prompt="hello", max_tokens=9, temperature=0)
        assert text.usage.completion_tokens_details.reasoning_tokens == 0
