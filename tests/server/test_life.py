"""`specdec serve` from its start to its end: keys, full queues, clients that leave, time-outs, shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import httpx2
import openai

from specdec.cli.serve import served_name
from specdec.server.options import ServerOptions
from tests.support.commands import specdec_command
from tests.support.serving import EOS, NAME, Running, running, served_model, wait_until

ROOMY = served_model(max_position_embeddings=1 << 16)
LONG = {"max_tokens": 50_000, "temperature": 0, "logit_bias": {str(EOS): -100}}
"""Asks for a reply that does not stop by itself, and goes on for minutes."""
KEY = "key-for-the-tests"


def body(**options: object) -> dict[str, object]:
    return {"model": NAME, "messages": [{"role": "user", "content": "hello"}], **LONG, **options}


@contextlib.contextmanager
def roomy(**options: object) -> Iterator[Running]:
    with running(ROOMY, **{"max_new_tokens": 50_000, "grace": 0, **options}) as server:
        yield server


@contextlib.contextmanager
def stream(served: Running, **options: object) -> Iterator[Iterator[str]]:
    """The lines of a stream whose first tokens have come."""
    with (
        httpx2.Client(base_url=served.url, timeout=120) as http,
        http.stream("POST", "/v1/chat/completions", json=body(stream=True, **options)) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert any('"content":"' in line and '"content":""' not in line for line in lines)
        yield lines


def test_clients_that_leave_take_their_work_with_them():
    with roomy() as served:
        with contextlib.ExitStack() as stays:
            stays.enter_context(stream(served))
            with contextlib.ExitStack() as leave:
                for _ in range(3):
                    leave.enter_context(stream(served))
                assert served.engine.num_rows == 4
            wait_until(lambda: served.engine.num_rows == 1, "one request is left")
        wait_until(lambda: served.engine.num_rows == 0, "nothing is left")
        wait_until(lambda: "specdec_unfinished_total 4.0" in served.http.get("/metrics").text, "four have left")


def test_a_client_that_does_not_wait_for_a_whole_answer():
    with roomy() as served, httpx2.Client(base_url=served.url, timeout=0.5) as impatient:
        with pytest.raises(httpx2.ReadTimeout):
            impatient.post("/v1/chat/completions", json=body())
        wait_until(lambda: "specdec_unfinished_total 1.0" in served.http.get("/metrics").text, "the client has left")
        wait_until(lambda: served.engine.num_rows + served.engine.num_waiting == 0, "the request is cancelled")


def test_a_time_out_cancels():
    with roomy(timeout=0.4) as served:
        answer = served.chat(**LONG)
        assert answer.status_code == 504
        assert "not finished within 0.4 s" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        answer = served.http.post("/v1/chat/completions", json=body(stream=True))
        assert answer.status_code == 200
        assert json.loads(answer.text.split("data: ")[-1])["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        with pytest.raises(openai.APIError, match="not finished within"):
            list(client.chat.completions.create(**body(stream=True)))
        wait_until(lambda: served.engine.num_rows == 0, "everything is cancelled")


def test_a_full_queue():
    with roomy(engine_options={"max_rows": 1, "max_waiting": 1}) as served, stream(served):
        waiting = threading.Thread(target=lambda: served.chat(**LONG))
        waiting.start()
        wait_until(lambda: served.engine.num_waiting == 1, "one request waits")
        answer = served.http.post("/v1/chat/completions", json=body())
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        # two choices where there is room for none: nothing of them stays
        assert served.chat(n=2, **LONG).status_code == 429
        assert served.engine.num_waiting == 1
        served.stop()
        waiting.join(timeout=120)


def test_more_than_there_will_ever_be_room_for():
    with roomy(engine_options={"max_cached_tokens": 512}) as served:
        answer = served.chat(**LONG)
        assert answer.status_code == 400
        assert "can have 512 tokens here" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_what_is_under_way_may_finish():
    with roomy(grace=20) as served:
        with stream(served, max_tokens=400) as lines:
            served.stop()
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        served.thread.join(timeout=120)
        assert not served.thread.is_alive()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(served.url)


def test_what_does_not_finish_is_told_why():
    with roomy(grace=0.3) as served:
        with stream(served) as lines:
            served.stop()
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
        served.thread.join(timeout=120)
        assert served.engine.num_rows == 0


def test_a_key():
    with running(served_model(), api_key=KEY, host="127.0.0.1") as served:
        with httpx2.Client(base_url=served.url, timeout=120) as stranger:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                answer = stranger.get(path)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert stranger.get("/health").status_code == 200
            for wrong in (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", KEY):
                answer = stranger.get("/v1/models", headers={"authorization": wrong})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert served.http.get("/v1/models").status_code == 200
        assert served.http.get("/v1/models", headers={"host": "any.example"}).status_code == 200
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            client.models.list()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines, and there is no API key"),
        ({"host": "::"}, "no API key"),
        ({"host": "server.example"}, "no API key"),
        ({"api_key": "short"}, "at least 8"),
        ({"api_key": "with a space in it"}, "no space"),
        ({"timeout": 0}, "timeout is a positive number"),
        ({"timeout": float("nan")}, "timeout"),
        ({"grace": -1}, "grace"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options)


def test_options_that_do():
    for options in ({"host": "::1"}, {"host": "localhost"}, {"host": "0.0.0.0", "allows_no_key": True}):
        assert ServerOptions(**options).api_key is None
    assert ServerOptions(host="0.0.0.0", api_key=KEY, grace=0).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--host", "0.0.0.0"), "can be reached from other machines"),
        (("--api-key", KEY, "--no-api-key"), "give only one of them"),
        (("--drafter", "small-model"), "give it with --draft"),
        (("--timeout", "-1"), "timeout is a positive number"),
    ],
)
def test_the_command_refuses_before_it_loads(args: tuple[str, ...], message: str):
    result = specdec_command("serve", "nowhere/to/be/found", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_the_name_of_a_model(tmp_path: Path):
    assert served_name("demo", "smollm2-135m-instruct") == "demo"
    assert served_name("someone/model", "someone/model") == "someone/model"
    assert served_name(str(tmp_path), tmp_path.name) == tmp_path.name


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = specdec_command("serve", "nowhere/to/be/found")
    assert "serve needs fastapi, uvicorn, prometheus_client, llguidance: pip install" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, -signal.SIGTERM), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_the_command(tiny: str, sent: signal.Signals, code: int):
    command = [sys.executable, "-c", "from specdec.cli import main; main()", "serve", tiny, "--port", "0"]
    command += ["--name", "mine", "--threads", "1", "--drafter", "prompt-lookup"]
    environment = {**os.environ, "SPECDEC_API_KEY": KEY}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        announced = next(line for line in process.stderr if " at http" in line)
        url = re.search(r"mine at (http://127\.0\.0\.1:\d+/v1)", announced).group(1)
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        reply = client.chat.completions.create(model="mine", messages=body()["messages"], max_tokens=3, temperature=0)
        assert reply.usage.completion_tokens == 3
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        process.send_signal(sent)
        assert process.wait(timeout=120) == code
        assert "Traceback" not in process.stderr.read()
