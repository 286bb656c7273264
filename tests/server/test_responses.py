"""`/v1/responses`, with the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import openai

from specdec.server.jobs import Part
from specdec.server.protocol.responses import ResponsesRequest
from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.styles import HERMES
from specdec.server.responses import ResponsesForm
from tests.support.serving import NAME, Running, chat_prompt, plain_ids, running, served_model, text_of

MODEL = served_model(max_position_embeddings=2048)
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "boolean"}}}}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(MODEL, max_new_tokens=400) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0)


def ask(client: openai.OpenAI, **options: Any):
    return client.responses.create(**{"model": NAME, "input": "hello", "temperature": 0, **options})


def test_a_text_is_that_of_transformers_whole_and_streamed(client: openai.OpenAI):
    expected = text_of(plain_ids(MODEL, chat_prompt("hello"), 24))
    whole = ask(client, max_output_tokens=24)
    assert (whole.output_text, whole.status) == (expected, "incomplete")
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 24
    events = list(ask(client, max_output_tokens=24, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == expected


def test_a_conversation_of_items(client: openai.OpenAI):
    first = ask(client, max_output_tokens=4, instructions="brief")
    turns = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "more"}]
    reply = ask(client, input=turns, max_output_tokens=6, instructions="brief")
    prompt = f"system: brief\n{chat_prompt('hello', first.output_text, 'more')}"
    assert reply.output_text == text_of(plain_ids(MODEL, prompt, 6))


def test_a_call_and_its_result(client: openai.OpenAI):
    options = {"tools": [LOOK], "temperature": 1, "max_output_tokens": 200, "extra_body": {"seed": 2}}
    reply = ask(client, tool_choice="required", parallel_tool_calls=False, **options)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "look", "completed")
    json.loads(call.arguments)
    events = list(ask(client, tool_choice="required", parallel_tool_calls=False, stream=True, **options))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    again = ask(client, input=[{"role": "user", "content": "hello"}, call, result], tools=[LOOK], max_output_tokens=4)
    assert again.output


def test_a_document(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"is": {"type": "boolean"}},
        "required": ["is"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    reply = ask(client, text=form, max_output_tokens=400, temperature=1, extra_body={"seed": 1})
    assert json.loads(reply.output_text)["is"] in (True, False)
    options = {"max_output_tokens": 400, "temperature": 1, "extra_body": {"seed": 1}}
    with client.responses.stream(model=NAME, input="hello", text=form, **options) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == reply.output_text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"extra_body": {"store": True}}, "store is not supported"),
        ({"input": []}, "input"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"model": "gpt-9"}, "there is no model"),
    ],
)
def test_what_is_not_done_is_refused(client: openai.OpenAI, options: dict[str, Any], reason: str):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=reason):
        ask(client, **options)


def test_reasoning_text_and_calls_are_items_of_their_own():
    text = '<think>hm</think>I look.<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    body = ResponsesRequest(model=NAME, input="hello")
    form = ResponsesForm(body, ReplyParser(HERMES, ["f"], ("<think>", "</think>")), lambda: "call_1")
    events = []
    for place, char in enumerate(text):
        reason = "stop" if place == len(text) - 1 else None
        part = Part(index=0, text=char, tokens=[], logprobs=None, offsets=[], finish_reason=reason)
        events += [json.loads(event.split(b"data: ")[1]) for event in form.chunk(part)]
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)
    assert items[0]["content"][0]["text"] == "hm"
    assert items[1]["content"][0]["text"] == "I look."
    assert (items[2]["name"], items[2]["arguments"], items[2]["call_id"]) == ("f", "{}", "call_1")
