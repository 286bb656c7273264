"""One client's request must not stop the others while it is planned: rendered, tokenized, its grammar compiled.

Once a response_format of 1.7 KB stopped a server for everybody: llguidance went on compiling it in the only thread that
planned, without an end, without a limit on memory, and long after its client had left.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import httpx2
import torch
from pydantic import ValidationError

from specdec.server import preprocessing
from specdec.server.grammar import Grammars, GrammarSource
from specdec.server.protocol.requests import ChatRequest, CompletionRequest
from specdec.testing import ByteTokenizer
from specdec.text.prompting import render_chat
from tests.support.attacks import ATTACKS, CHAT, Attack, schema_bomb, wanting
from tests.support.serving import (
    EOS,
    NAME,
    TOKENIZER,
    Running,
    chat_prompt,
    plain_ids,
    running,
    served_model,
    text_of,
    wait_until,
)

MODEL = served_model(max_position_embeddings=512)
SHORT = {"max_tokens": 4, "temperature": 0}
EXPECTED = text_of(plain_ids(MODEL, chat_prompt("hello"), 4))
STEERED = """{%- for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor -%}
{%- set said = messages[-1].content %}
{%- if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}
{%- if said == 'grow' %}{{ 'a' * 99999999999 }}{% endif %}
{%- if said == 'double' %}{% set all = namespace(text='a') %}
{%- for i in range(60) %}{% set all.text = all.text + all.text %}{% endfor %}{% endif %}
{%- if said == 'long' %}{{ 'a' * 10000000 }}{% endif %}
{%- if said == 'recurse' %}{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}{% endif %}
{%- if said == 'add' %}{{ 1 + said }}{% endif %}
{%- if said == 'include' %}{% include 'elsewhere' %}{% endif %}
{%- if said == 'undefined' %}{{ nothing.at.all }}{% endif %}
{%- if said == 'refuse' %}{{ raise_exception('not that') }}{% endif %}assistant: """
"""The template of the tests, and what a conversation can make of it."""


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = STEERED
    with running(MODEL, tokenizer=tokenizer, max_new_tokens=256, planning_timeout=100) as server:
        assert is_answered(server)  # the processes have been started
        yield server


def is_answered(served: Running) -> bool:
    answer = served.chat(**SHORT)
    return answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == EXPECTED


def said(served: Running, text: str) -> httpx2.Response:
    return served.chat(**SHORT, messages=[{"role": "user", "content": text}])


def metric(served: Running, name: str) -> float:
    lines = served.http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def worker_seconds() -> float:
    """Computing time of the sandbox's processes that are alive, those of this test process's servers."""
    return sum(used for _, used in workers())


def workers() -> list[tuple[int, float]]:
    """Number and computing time of the descendants of this process that are sandboxes."""
    psutil = pytest.importorskip("psutil")
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("sandbox_worker" in part for part in child.cmdline()):
                found.append((child.pid, sum(child.cpu_times()[:2])))
    return found


# grammars


def test_a_schema_that_never_ends_is_refused_while_others_are_answered(served: Running):
    with ThreadPoolExecutor(1) as threads:
        refused = threads.submit(served.chat, **SHORT, **wanting(schema_bomb(40, "first")))
        wait_until(lambda: metric(served, "specdec_planning") == 1 or refused.done(), "the bomb is being planned")
        num_answered = 0
        while not refused.done():
            assert is_answered(served)
            num_answered += 1
            time.sleep(0.05)  # whoever is not idle takes the computing time that the bomb is to use up
    assert num_answered > 0, "others were answered before it was refused"
    error = error_of(refused.result(), 400)
    assert "takes more than 1 s of computing time or 512 MiB of memory" in error["message"]
    assert "leave one of them" in error["message"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_schema")


def test_what_came_of_a_schema_is_remembered(served: Running):
    bomb = wanting(schema_bomb(40, "again"))
    first = error_of(served.chat(**SHORT, **bomb), 400)
    started = worker_seconds()
    assert [error_of(served.chat(**SHORT, **bomb), 400) for _ in range(20)] == [first] * 20
    assert worker_seconds() - started < 1, "a single one takes a second"


def test_a_client_that_leaves_takes_its_schema_with_it(served: Running):
    unfinished = metric(served, "specdec_unfinished_total")
    slow = {"type": "object", "properties": {"a": schema_bomb(40, "left")}}
    with httpx2.Client(base_url=served.url, timeout=0.3) as impatient, pytest.raises(httpx2.ReadTimeout):
        impatient.post("/v1/chat/completions", json={"model": NAME, **body(), **wanting(slow)})
    wait_until(lambda: metric(served, "specdec_planning") == 0, "it is no longer planned")
    assert metric(served, "specdec_unfinished_total") == unfinished + 1
    before = dict(workers())
    time.sleep(0.2)
    assert all(used - before.get(number, used) < 0.1 for number, used in workers()), "nothing is compiled any more"


def body(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}], **SHORT, **options}


def test_those_that_are_planned_wait_too():
    """Rows are free, but nobody gets to them: 429 once the queue's limit is reached, and not only in the queue."""
    limits = {"max_rows": 1, "max_waiting": 2}
    with running(MODEL, engine_options=limits, planning_timeout=100) as served, ThreadPoolExecutor(8) as threads:
        assert is_answered(served)
        bombs = [threads.submit(served.chat, **SHORT, **wanting(schema_bomb(40, f"n{place}"))) for place in range(8)]
        answers = [bomb.result() for bomb in bombs]
        full = [error_of(answer, 429) for answer in answers if answer.status_code == 429]
        assert full
        assert {error["code"] for error in full} == {"queue_full"}
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
        assert len(full) == sum(answer.status_code != 400 for answer in answers) < len(answers)
        assert is_answered(served)


def test_schemas_that_wait_leave_room_for_others():
    """Half of those that may wait are for grammars: the rest of the clients is not refused because of them."""
    limits = {"max_waiting": 4}
    with running(MODEL, engine_options=limits, planning_timeout=100) as served, ThreadPoolExecutor(8) as threads:
        assert is_answered(served)
        bombs = [threads.submit(served.chat, **SHORT, **wanting(schema_bomb(40, f"m{place}"))) for place in range(8)]
        wait_until(lambda: metric(served, "specdec_planning") == 4, "two are compiled, two wait")
        assert is_answered(served)
        assert {bomb.result().status_code for bomb in bombs} == {400, 429}


def test_the_time_limit_covers_planning():
    slow = wanting(schema_bomb(40, "timed"))
    with running(MODEL, timeout=0.3) as served:
        answer = served.chat(**SHORT, **slow)  # it may also be the start of the processes that takes so long
        assert error_of(answer, 504)["code"] == "timeout"


def test_a_server_that_stops_says_so_to_those_that_are_planned():
    with running(MODEL, grace=0.2, engine_options={"max_waiting": 100}) as served, ThreadPoolExecutor(8) as threads:
        assert is_answered(served)
        bombs = [threads.submit(served.chat, **SHORT, **wanting(schema_bomb(40, f"s{place}"))) for place in range(8)]
        wait_until(lambda: metric(served, "specdec_planning") == 8, "all are planned")
        served.stop()
        statuses = [bomb.result().status_code for bomb in bombs]
        assert set(statuses) <= {400, 503}
        assert 503 in statuses


def test_masks_of_hard_patterns_are_bounded():
    """llguidance's own limits bound what is computed for each token, as they do not bound compiling."""
    grammars = Grammars(TOKENIZER, [EOS])
    schema = {"type": "string", "pattern": ".*a.{500}b.*a.{300}"}
    processor = grammars.processor(grammars.compile(GrammarSource.of_schema(schema)), 0)
    text, slowest = list(b'"' + b"ab" * 300), 0.0
    for count in range(0, len(text), 20):
        started = time.thread_time()
        processor(torch.tensor([text[:count]], dtype=torch.long), torch.zeros(1, MODEL.config.vocab_size))
        slowest = max(slowest, time.thread_time() - started)
    assert slowest < 2


# templates


@pytest.mark.parametrize("text", ["loop", "grow", "double"])
def test_a_template_that_never_ends(served: Running, text: str):
    with ThreadPoolExecutor(1) as threads:
        refused = threads.submit(said, served, text)
        assert is_answered(served)
    error = error_of(refused.result(), 400)
    assert "chat template takes more than 1 s of computing time or 512 MiB of memory" in error["message"]
    assert (error["param"], error["code"]) == ("messages", "template_failed")
    assert is_answered(served)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("recurse", 500, "fails on this conversation (RecursionError"),
        ("add", 500, "fails on this conversation (TypeError"),
        ("include", 500, "fails on this conversation (TypeError"),
        ("undefined", 400, "refuses this conversation: 'nothing' is undefined"),
        ("refuse", 400, "refuses this conversation: not that"),
        ("long", 400, "which a text of 100000"),
    ],
)
def test_a_template_that_fails(served: Running, text: str, status: int, message: str):
    assert message in error_of(said(served, text), status)["message"]
    assert is_answered(served)


def test_a_template_renders_as_in_this_process(served: Running):
    """What the processes render is what `apply_chat_template` does, whatever is said."""
    for text in ("hello", "é€😀", "a\nb\t{{ messages }} {% if %}", '"\\u0041"'):
        answer = said(served, text)
        assert answer.json()["choices"][0]["message"]["content"] == text_of(plain_ids(MODEL, chat_prompt(text), 4))


@pytest.mark.parametrize(("template", "error"), [("{{ 1 + 'a' }}", "TypeError"), ("{% include 'x' %}", "TypeError")])
def test_a_broken_template_is_told_elsewhere_too(template: str, error: str):
    """`specdec generate`, `chat` and `batch` render in their own process: no traceback there."""
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"chat template fails on this conversation \({error}"):
        render_chat(tokenizer, [{"role": "user", "content": "hello"}])


# texts


def test_a_text_that_cannot_fit_is_not_tokenized(served: Running, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr("specdec.server.planning.encode_texts", refuse)
    monkeypatch.setattr("specdec.server.planning.encode_rendered", refuse)
    longest = max(map(len, TOKENIZER.get_vocab()))
    text = "a" * (512 * longest + 1)
    for answer in (said(served, text), served.http.post("/v1/completions", json={"model": NAME, "prompt": text})):
        error = error_of(answer, 400)
        assert error["code"] == "context_length_exceeded"
        assert "512 tokens here, which a text of" in error["message"]


def test_texts_that_take_long_do_not_hold_up_short_ones(served: Running, monkeypatch: pytest.MonkeyPatch):
    """However many of them there are: they have threads of their own."""
    monkeypatch.setattr(preprocessing, "_LARGE", 100)
    going = threading.Event()
    encode = served.server._service._planner.encode

    def slowly(body: Any, prompts: Any) -> Any:
        if len(prompts[0]) > 100:
            going.wait(60)
        return encode(body, prompts)

    monkeypatch.setattr(served.server._service._planner, "encode", slowly)
    with ThreadPoolExecutor(8) as threads:
        long = [threads.submit(said, served, "a" * 200) for _ in range(8)]
        wait_until(lambda: metric(served, "specdec_planning") == 8, "they are being planned")
        assert is_answered(served)
        going.set()
        assert {answer.result().status_code for answer in long} == {200}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack(served: Running, attack: Attack):
    """Whatever is sent, it is answered, and the loop that answers everybody is not held up by it."""
    answer = served.http.post(attack.path, json=attack.request(NAME))
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert len(answer.json()["error"]["message"]) < 2000
    assert is_answered(served)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_wrong_lists_are_not_told_member_by_member(attack: Attack):
    """A body of 1 MB once made 600,000 errors, which took seconds in the loop that answers everybody."""
    request = ChatRequest if attack.path == CHAT else CompletionRequest
    num_errors = 0
    try:
        request.model_validate(attack.request(NAME))
    except ValidationError as error:
        num_errors = error.error_count()
    assert num_errors < 20


# the processes


def test_processes_end_with_their_server():
    before = {number for number, _ in workers()}
    with running(MODEL) as served:
        assert is_answered(served)
        own = {number for number, _ in workers()} - before
        assert own
    wait_until(lambda: not own & {number for number, _ in workers()}, "none is left")


@pytest.mark.slow
def test_a_server_survives_its_processes():
    psutil = pytest.importorskip("psutil")
    before = {number for number, _ in workers()}
    with running(MODEL) as served:
        assert is_answered(served)
        for number in {number for number, _ in workers()} - before:
            with contextlib.suppress(psutil.Error):
                psutil.Process(number).kill()
        # what was about to be asked of one of them fails with it; the next one is new
        wait_until(lambda: is_answered(served), "it is answered again")
