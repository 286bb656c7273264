"""What people plug into a server: scripted, on a tiny model whose calls are forced; skipped if not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import jsonschema
import openai

from specdec.drafters import SmallModel
from tests.support.references import with_noise
from tests.support.serving import NAME, Running, chat_prompt, plain_ids, running, served_model, text_of

MODEL = served_model(max_position_embeddings=8192)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": SCHEMA}}
    for name in ("buy", "sell")
]


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """Drafts are mostly right, and sometimes wrong."""
    drafter = SmallModel(with_noise(MODEL), num_tokens=3)
    with running(MODEL, max_new_tokens=400, engine_options={"drafter": drafter, "max_rows": 4}) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0)


def test_an_agent_of_ten_turns(client: openai.OpenAI):
    """Calls, results, and the whole conversation sent back each time."""
    messages: list[Any] = [{"role": "user", "content": "trade"}]
    for turn in range(10):
        reply = client.chat.completions.create(
            model=NAME, messages=messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=turn
        )
        (choice,) = reply.choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name in ("buy", "sell")
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": f"done {turn}"}]
    assert len(messages) == 21
    assert reply.usage.prompt_tokens_details.cached_tokens > 0


def test_documents_and_forced_calls_stay_valid_under_load(client: openai.OpenAI):
    """Beside plain answers, which stay what they are alone; all with drafts."""
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    chosen = {"type": "function", "function": {"name": "sell"}}
    expected = text_of(plain_ids(MODEL, chat_prompt("hello"), 40))

    def ask(number: int) -> int:
        options: dict[str, Any] = [
            {"response_format": form, "seed": number},
            {"tools": TOOLS, "tool_choice": chosen, "seed": number},
            {"max_tokens": 40, "temperature": 0},
        ][number % 3]
        messages: Any = [{"role": "user", "content": "hello"}]
        reply = client.chat.completions.create(model=NAME, messages=messages, **options)
        message = reply.choices[0].message
        if number % 3 == 2:
            assert message.content == expected
        else:
            text = message.content if number % 3 == 0 else message.tool_calls[0].function.arguments
            jsonschema.validate(json.loads(text), SCHEMA)
        return reply.usage.completion_tokens_details.accepted_prediction_tokens

    with ThreadPoolExecutor(12) as threads:
        accepted = list(threads.map(ask, range(24)))
    assert all(accepted)


def test_langchain(served: Running):
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    model = langchain.ChatOpenAI(model=NAME, base_url=f"{served.url}/v1", api_key="none", temperature=0, max_tokens=40)
    expected = text_of(plain_ids(MODEL, chat_prompt("hello"), 40))
    assert model.invoke("hello").content == expected
    assert "".join(part.content for part in model.stream("hello")) == expected
    bound = model.bind_tools(TOOLS, tool_choice="required").bind(max_tokens=400, temperature=1, seed=3)
    reply = bound.invoke("hello")
    jsonschema.validate(reply.tool_calls[0]["args"], SCHEMA)
    free = langchain.ChatOpenAI(model=NAME, base_url=f"{served.url}/v1", api_key="none", max_tokens=400, seed=4)
    structured = free.with_structured_output(SCHEMA | {"title": "Animal"}, method="json_schema")
    jsonschema.validate(structured.invoke("hello"), SCHEMA)


def test_a_langchain_agent_with_two_tools(served: Running):
    """LangChain's own loop: it calls the tools, sends results back, and ends where a tool's result is the answer."""
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    agents = pytest.importorskip("langchain.agents", reason="pip install langchain")
    from langchain.agents.middleware import wrap_model_call
    from langchain_core.tools import tool

    done: list[str] = []

    @tool
    def look(animal: Literal["cat", "dog"]) -> str:
        """Look at one."""
        done.append(f"look {animal}")
        return f"a {animal}"

    @tool(return_direct=True)
    def take(animal: Literal["cat", "dog"], number: Literal[1, 2]) -> str:
        """Take some, and go."""
        done.append(f"take {number} {animal}")
        return "taken"

    @wrap_model_call
    def has_to_call(request: Any, handler: Any) -> Any:
        """The tiny model would not by itself."""
        return handler(request.override(tool_choice="required", model_settings={"parallel_tool_calls": False}))

    model = langchain.ChatOpenAI(model=NAME, base_url=f"{served.url}/v1", api_key="none", max_tokens=400, seed=1)
    agent = agents.create_agent(model, [look, take], middleware=[has_to_call])
    state = agent.invoke({"messages": [("user", "which one?")]}, {"recursion_limit": 100})
    messages = state["messages"]
    results = [message for message in messages if message.type == "tool"]
    assert len(done) == len(results) == (len(messages) - 1) / 2
    assert all(message.status == "success" for message in results)
    assert {text.split()[0] for text in done} == {"look", "take"}
    assert results[-1].content == "taken"


def test_litellm(served: Running):
    litellm = pytest.importorskip("litellm", reason="pip install litellm")
    options = {"model": f"openai/{NAME}", "api_base": f"{served.url}/v1", "api_key": "none", "max_tokens": 40}
    messages = [{"role": "user", "content": "hello"}]
    expected = text_of(plain_ids(MODEL, chat_prompt("hello"), 40))
    reply = litellm.completion(messages=messages, temperature=0, **options)
    assert reply.choices[0].message.content == expected
    parts = litellm.completion(messages=messages, temperature=0, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


def test_llm(served: Running):
    llm = pytest.importorskip("llm", reason="pip install llm")
    from llm.default_plugins.openai_models import Chat

    model = Chat(model_id=NAME, model_name=NAME, api_base=f"{served.url}/v1")
    reply = model.prompt("hello", stream=True, temperature=0, max_tokens=40, key="none")
    assert reply.text() == text_of(plain_ids(MODEL, chat_prompt("hello"), 40))
    assert llm.__name__ == "llm"
