"""`specdec serve` refuses what is wrong: always a 4xx with a reason, never a 5xx, never a hang."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "schemathesis"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

from tests.support.serving import NAME, Running, running, served_model

MODEL = served_model(max_position_embeddings=256)
MAX_BODY = 20_000
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(MODEL, max_new_tokens=32, max_choices=4, max_body_bytes=MAX_BODY, body_timeout=1.5) as server:
        yield server


def chat(**body: Any) -> bytes:
    return json.dumps({"model": NAME, "messages": HELLO, **body}).encode()


def text(**body: Any) -> bytes:
    return json.dumps({"model": NAME, "prompt": "hello", **body}).encode()


def schema(**value: Any) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MALFORMED: dict[str, tuple[str, bytes, int, str]] = {
    "nothing": (CHAT, b"", 400, "empty"),
    "no JSON": (CHAT, b"{'model': 1}", 400, "no JSON"),
    "half of it": (CHAT, chat()[:-3], 400, "no JSON"),
    "a list": (CHAT, b"[]", 400, "no JSON object"),
    "a number": (CHAT, b"17", 400, "no JSON object"),
    "invalid UTF-8": (CHAT, chat().replace(b"hello", b"\xff\xfe"), 400, "UTF-8"),
    "half of a character": (CHAT, chat().replace(b"hello", rb"\ud800"), 400, "messages"),
    "deep nesting": (CHAT, b'{"model":' + b"[" * 9000 + b"]" * 9000 + b"}", 400, "nested"),
    "a deep schema": (CHAT, schema(**json.loads('{"items":' * 200 + "{}" + "}" * 200)), 400, "schema"),
    "a long number": (CHAT, chat().replace(b'"tiny"', b"9" * 6000), 400, "digits"),
    "NaN": (CHAT, chat(temperature=float("nan")), 400, "finite"),
    "infinity": (CHAT, chat(temperature=float("inf")), 400, "temperature"),
    "a large exponent": (CHAT, chat().replace(b"}]", b'}], "temperature": 1e999'), 400, "temperature"),
    "no model": (CHAT, json.dumps({"messages": HELLO}).encode(), 400, "model"),
    "another model": (CHAT, chat(model="gpt-9"), 404, "no model 'gpt-9'"),
    "a model that is a list": (CHAT, chat(model=["tiny"]), 400, "model"),
    "no messages": (CHAT, chat(messages=[]), 400, "messages"),
    "messages that are none": (CHAT, chat(messages="hello"), 400, "messages"),
    "an unknown role": (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "role"),
    "an image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content",
    ),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    "audio": (CHAT, chat(audio={"voice": "x"}), 400, "audio is not supported"),
    "a tool's answer": (
        CHAT,
        chat(messages=[{"role": "user", "content": "", "tool_call_id": "1"}]),
        400,
        "tool_call_id",
    ),
    "a misspelt parameter": (CHAT, chat(temprature=1), 400, "temprature is no parameter"),
    "a text for a number": (CHAT, chat(temperature="1"), 400, "temperature"),
    "a bool for a number": (CHAT, chat(max_tokens=True), 400, "max_tokens"),
    "too hot": (CHAT, chat(temperature=2.5), 400, "temperature: input should be less than or equal to 2, got 2.5"),
    "nearly 0": (CHAT, chat(temperature=1e-30), 400, "temperature is 0"),
    "top_p": (CHAT, chat(top_p=1.5), 400, "top_p"),
    "no tokens": (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    "many tokens": (CHAT, chat(max_tokens=100), 400, "limit is 32"),
    "more than the context": (CHAT, chat(max_tokens=2**31 - 1), 400, "can have 256 tokens"),
    "more than an integer": (CHAT, chat(max_tokens=2**80), 400, "max_tokens"),
    "two limits": (CHAT, chat(max_tokens=3, max_completion_tokens=4), 400, "max_tokens and max_completion_tokens are"),
    "a long prompt": (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]), 400, "can have 256 tokens"),
    "five stops": (CHAT, chat(stop=list("abcde")), 400, "stop"),
    "an empty stop": (CHAT, chat(stop=""), 400, "stop"),
    "many choices": (CHAT, chat(n=5), 400, "at most 4"),
    "no choices": (CHAT, chat(n=0), 400, "n:"),
    "a large seed": (CHAT, chat(seed=2**63), 400, "seed"),
    "a penalty": (CHAT, chat(presence_penalty=-3), 400, "presence_penalty"),
    "a bias that is no token": (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias"),
    "a bias past the vocabulary": (CHAT, chat(logit_bias={"259": 1}), 400, "no token 259"),
    "a bias too large": (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=3), 400, "needs logprobs"),
    "many logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "stream options": (CHAT, chat(stream_options={"include_usage": True}), 400, "stream"),
    "an unknown format": (CHAT, chat(response_format={"type": "xml"}), 400, "response_format"),
    "no schema": (CHAT, chat(response_format={"type": "json_schema"}), 400, "json_schema"),
    "a wrong schema": (CHAT, schema(type="objekt"), 400, "Invalid type"),
    "a schema from elsewhere": (CHAT, schema(**{"$ref": "http://127.0.0.1:1/"}), 400, "does not fetch"),
    "a wrong pattern": (CHAT, schema(type="string", pattern="("), 400, "unclosed"),
    "a pattern that looks ahead": (CHAT, schema(type="string", pattern="(?=a)b"), 400, "look-around"),
    "a name that is no text": (CHAT, chat().replace(b'"model"', rb'"\ud800": 1, "model"'), 400, "unicode"),
    "a large body": (CHAT, chat(user="x" * MAX_BODY), 413, f"at most {MAX_BODY} bytes"),
    "no prompt": (TEXT, json.dumps({"model": NAME}).encode(), 400, "prompt"),
    "an empty prompt": (TEXT, text(prompt=""), 400, "no tokens"),
    "an empty list": (TEXT, text(prompt=[]), 400, "empty list"),
    "a mixed list": (TEXT, text(prompt=["a", 1]), 400, "prompt"),
    "a token past the vocabulary": (TEXT, text(prompt=[1, 259]), 400, "no token 259"),
    "a token below it": (TEXT, text(prompt=[-1]), 400, "prompt"),
    "many prompts": (TEXT, text(prompt=["a", "b", "c"], n=2), 400, "6 choices"),
    "a suffix": (TEXT, text(suffix="x"), 400, "suffix is not supported"),
    "best of": (TEXT, text(best_of=2), 400, "best_of is not supported"),
    "an echo": (TEXT, text(echo=True), 400, "echo is not supported"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request(served: Running, name: str):
    path, body, status, reason = MALFORMED[name]
    answer = served.http.post(path, content=body, headers={"content-type": "application/json"})
    assert_refused(answer.status_code, answer.json(), status, reason)


def assert_refused(actual: int, document: Any, status: int, reason: str) -> None:
    assert actual == status, document
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert reason in error["message"]
    assert len(error["message"]) < 2000
    assert error["type"].endswith("_error")


def test_unsupported_parameters_that_ask_for_nothing(served: Running):
    idle = {"tools": [], "store": False, "metadata": None, "tool_choice": None, "audio": None}
    answer = served.chat(max_tokens=2, temperature=0, **idle)
    assert answer.status_code == 200
    reply = answer.json()["choices"][0]["message"]
    again = served.http.post(CHAT, content=chat(messages=[*HELLO, reply, *HELLO], max_tokens=2))
    assert again.status_code == 400  # no content type
    headers = {"content-type": "application/json"}
    again = served.http.post(CHAT, content=chat(messages=[*HELLO, reply, *HELLO], max_tokens=2), headers=headers)
    assert again.status_code == 200, "what the server has said can be sent back"


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", CHAT, 405, "this path takes POST, not GET"),
        ("DELETE", "/v1/models", 405, "not DELETE"),
        ("BREW", CHAT, 405, "not BREW"),
        ("GET", "/v1/embeddings", 404, "nothing at this path"),
        ("GET", "/v1/models/%ff%00", 404, "no model"),
        ("GET", "/../../etc/passwd", 404, "nothing at this path"),
    ],
)
def test_a_wrong_path_or_method(served: Running, method: str, path: str, status: int, reason: str):
    answer = served.http.request(method, path)
    assert_refused(answer.status_code, answer.json(), status, reason)


def test_a_body_that_is_not_said_to_be_json(served: Running):
    """What a web page can send without asking: it must not be taken."""
    answer = served.http.post(CHAT, content=chat(), headers={"content-type": "text/plain"})
    assert_refused(answer.status_code, answer.json(), 400, "application/json")


def raw(served: Running, request: bytes) -> bytes:
    """The beginning of the answer to bytes."""
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer or answer.endswith(b"\r\n\r\n"):
            part = connection.recv(1 << 16)
            if not part:
                break
            answer += part
        return answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Host: 127.0.0.1\r\nContent-Length: 10\r\nContent-Length: 12\r\n", 400),
        (b"Host: 127.0.0.1\r\nContent-Length: -5\r\n", 400),
        (b"Host: 127.0.0.1\r\nContent-Length: many\r\n", 400),
        (b"Host: 127.0.0.1\r\nTransfer-Encoding: gzip\r\n", 400),
        (b"Host: 127.0.0.1\r\nno colon here\r\n", 400),
        (b"Host: 127.0.0.1\r\nX: " + b"y" * 100_000 + b"\r\n", 400),
        (b"Host: 127.0.0.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(9000)), 400),
        (b"X: y\r\n", 400),
        (b"Host: evil.example\r\nConnection: close\r\nContent-Length: 0\r\n", 403),
        (b"Host: 127.0.0.1\r\nHost: localhost\r\nConnection: close\r\n", 400),
        (b"Host: 127.0.0.1\r\nConnection: close\r\nContent-Length: 999999999999999999999\r\n", 400),
        (b"Host: 127.0.0.1\r\nContent-Type: application/json; \xff\xfe\r\nContent-Length: 0\r\n", 400),
    ],
)
def test_abused_headers(served: Running, headers: bytes, status: int):
    answer = raw(served, b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + headers + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert served.http.get("/health").status_code == 200


def test_a_body_that_does_not_come(served: Running):
    head = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    answer = raw(served, b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + head + b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1.5 s" in answer


# the whole document


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_any_request_of_the_document(served: Running, mode: GenerationMode):
    """Each answer has the status, the type and the form that the document promises; wrong ones are refused."""
    document = schemathesis.openapi.from_dict(served.http.get("/openapi.json").json())
    operations = [result.ok() for result in document.get_all_operations()]
    assert {operation.path for operation in operations} >= {CHAT, TEXT, "/v1/models", "/health", "/metrics"}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing to get wrong

        @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body["model"] = NAME  # others are refused at once: that would be all we see
            answer = case.call(base_url=served.url)
            if answer.status_code == 413:  # the document cannot say how many bytes a body may have
                return
            # nor the length of a context, and what goes together: such requests may be refused
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        ask()
