"""`specdec chat --url`: the same REPL, with the model behind a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from typer.testing import Result

from specdec.cli.chat import remote
from specdec.cli.chat.remote import RemoteDialogue, RemoteSpeaker, ServerError, connect
from tests.support.commands import error_of, specdec_command

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,remote]")

from openai import OpenAI

from tests.support.serving import NAME, Running, chat_prompt, plain_ids, running, served_model, text_of

MODEL = served_model(max_position_embeddings=128)
KEY = "key-for-the-tests"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(MODEL, api_key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_API_KEY", KEY)


def chat(served: Running, *lines: str, options: tuple[str, ...] = ("-n", "8")) -> Result:
    return specdec_command("chat", "--url", served.url, *options, stdin="".join(f"{line}\n" for line in lines))


def said(*messages: str, num_tokens: int = 8) -> str:
    return text_of(plain_ids(MODEL, chat_prompt(*messages), num_tokens))


def test_the_history_is_kept(served: Running):
    first = said("hello")
    result = chat(served, "hello", "again", "/regen", "/stats")
    assert result.exit_code == 0, result.output
    again = said("hello", first, "again")
    assert result.stdout == f"{first}\n{again}\n{again}\n"
    assert result.stderr.count("tokens per round") == 4  # three notes, and /stats
    assert "tokens read, " in result.stderr
    assert "4 messages; the server decides what is kept" in result.stderr
    assert f"{NAME}, drafter the server's" in result.stderr


def test_one_reply(served: Running):
    result = chat(served, options=("-n", "8", "--prompt", "hello", "--system", "brief", "--model", NAME))
    expected = text_of(plain_ids(MODEL, f"system: brief\n{chat_prompt('hello')}", 8))
    assert (result.exit_code, result.stdout) == (0, f"{expected}\n")


def test_a_seeded_chat_says_the_same_again(served: Running):
    options = ("-n", "8", "--sample", "--seed", "3", "--top-k", "20", "--temperature", "1.5")
    first, second = (chat(served, "hello", "/regen", options=options).stdout for _ in range(2))
    assert first == second
    one, other = first[: len(first) // 2], first[len(first) // 2 :]
    assert one != other, "the second reply has a seed of its own"


def test_the_oldest_is_forgotten_when_the_context_is_full(served: Running):
    result = chat(served, "x" * 40, "y" * 40, "z" * 40)
    assert result.exit_code == 0, result.output
    assert "the context is full: forgot the oldest 2 messages" in result.stderr
    first = said("x" * 40)
    assert result.stdout.startswith(f"{first}\n{said('y' * 40)}\n"), "the second turn has no room for the first"


def test_what_the_server_decides(served: Running):
    result = chat(served, "/model", "/model other", "/draft", "/draft plain", "/show", "hello")
    for message in (
        f"model {NAME}, drafter the server's",
        "has no model other; it has: tiny",
        "what drafts is decided where the server is started",
        "the server does not say which tokens were drafted",
    ):
        assert message in result.stderr
    assert result.stdout == f"{said('hello')}\n"


def test_a_wrong_value_is_told_in_the_server_s_words(served: Running):
    result = chat(served, "/set sample on", "/set temperature 3", "hello", "/set sample off", "hello")
    assert "error: temperature: input should be less than or equal to 2, got 3.0" in result.stderr
    assert result.stdout == f"{said('hello')}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--url", "localhost:8000"), "starts with http:// or https://"),
        (("--url", "http://127.0.0.1:9"), "is `specdec serve` running there?"),
        (("--url", "http://127.0.0.1:9", "--draft", "x"), "--draft is decided where the model is"),
        (("--url", "http://127.0.0.1:9", "--weights", "int8"), "--weights is decided where the model is"),
        (("--api-key", "k"), "--api-key is for a server"),
    ],
)
def test_options_that_do_not_go_together(args: tuple[str, ...], message: str):
    assert message in error_of(specdec_command("chat", *args, stdin=""))


def test_the_wrong_key(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPECDEC_API_KEY")
    assert "the API key is wrong" in error_of(chat(served, "hello"))
    assert "the API key is wrong" in error_of(chat(served, "hello", options=("--api-key", "wrong")))


# servers that misbehave


def client(answer: Callable[[httpx2.Request], httpx2.Response]) -> OpenAI:
    return connect("http://server.example").with_options(
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    )


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx2.Response(500), "the server answers: Error code: 500"),
        (httpx2.Response(200, text="<html>"), "does not answer as OpenAI's API does"),
        (httpx2.Response(200, json={"models": []}), "it has: none"),
        (httpx2.Response(200, json={"data": []}), "it has: none"),
        (httpx2.Response(400, json={"error": {"message": "no"}}), "no"),
    ],
)
def test_a_server_that_is_none(response: httpx2.Response, message: str):
    with pytest.raises(ServerError, match=message):
        RemoteSpeaker.of(client(lambda request: response), None)


def events(*documents: Any) -> httpx2.Response:
    lines = [f"data: {json.dumps(document)}\n\n" for document in documents]
    text = "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"])
    return httpx2.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


def test_a_reply_that_breaks_off_is_not_kept():
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        if len(asked) == 1:
            return events(delta("half"), {"error": {"message": "the generation failed", "code": None}})
        return events(delta("who"), delta("le"))

    dialogue = RemoteDialogue(client(answer), "model")
    shown: list[str] = []
    options = {
        "max_new_tokens": 5,
        "generation_kwargs": {"do_sample": False},
        "show": lambda pieces: shown.extend(piece.text for piece in pieces),
    }
    with pytest.raises(ServerError, match="the generation failed"):
        dialogue.say("hello", **options)
    assert dialogue.messages == []
    reply = dialogue.say("hello", **options)
    assert (reply.text, reply.stats) == ("whole", None)
    assert shown == ["half", "who", "le"]
    assert dialogue.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "whole"}]
    assert asked[1]["temperature"] == 0
    assert asked[1]["max_tokens"] == 5


def test_a_reply_is_stopped_on_request():
    dialogue = RemoteDialogue(client(lambda request: events(*map(delta, "012345678"))), "model")
    shown: list[str] = []
    reply = dialogue.say(
        "count",
        max_new_tokens=9,
        generation_kwargs={"do_sample": False},
        show=lambda pieces: shown.extend(piece.text for piece in pieces),
        stop=lambda: len(shown) == 3,
    )
    assert (reply.text, reply.stopped) == ("012", True)
    assert dialogue.messages[-1]["content"] == "012"


def test_without_the_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--url needs the openai client: pip install 'specdec-runtime\[remote\]'"):
        connect("http://server.example")
