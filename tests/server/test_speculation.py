"""Speculation per request: switched, told, and shown in the stream; and what is told of requests besides."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

from specdec.drafters import PromptLookup, SmallModel
from specdec.engine import RoundReport
from specdec.server.options import ServerOptions
from specdec.server.origins import Origins
from tests.support.serving import NAME, Running, chat_prompt, plain_ids, running, served_model, text_of, wait_until
from trees import TokenTree

MODEL = served_model(max_position_embeddings=512)
SHORT = {"max_tokens": 30, "temperature": 0}
EXPECTED = text_of(plain_ids(MODEL, chat_prompt("hello"), 30))
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """With a draft that is the model itself, so that drafted tokens are kept."""
    drafter = SmallModel(MODEL, num_tokens=4)
    with running(MODEL, max_new_tokens=256, engine_options={"drafter": drafter}, cors=(ORIGIN,)) as server:
        yield server


@pytest.mark.parametrize(
    ("speculation", "most"), [(None, 4), (True, 4), (False, 0), ({"num_speculative_tokens": 2}, 2), ({}, None)]
)
def test_a_request_says_how_far_is_drafted(served: Running, speculation: Any, most: int | None):
    answer = served.chat(**SHORT, speculation=speculation)
    if most is None:
        assert answer.status_code == 400
        assert "speculation" in answer.json()["error"]["message"]
        return
    document = answer.json()
    assert document["choices"][0]["message"]["content"] == EXPECTED
    told, details = document["speculation"], document["usage"]["completion_tokens_details"]
    histogram = told["acceptance_histogram"]
    assert len(histogram) == most + 1
    assert sum(histogram) == told["num_rounds"]
    assert told["mean_acceptance_length"] == pytest.approx(30 / told["num_rounds"])
    assert details["accepted_prediction_tokens"] == told["num_accepted_tokens"]
    assert told["draft_acceptance_rate"] == (1 if most else None)


def test_the_other_api_says_so_too(served: Running):
    body = {"model": NAME, "input": "hello", "max_output_tokens": 30, "temperature": 0, "speculation": False}
    answer = served.http.post("/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == EXPECTED
    assert answer["speculation"]["num_draft_tokens"] == 0


def test_requests_of_one_key_draft_from_earlier_replies():
    """And those of another key do not, nor those without."""
    with running(MODEL, engine_options={"drafter": PromptLookup(min_match=4)}) as served:
        accepted = []
        for key in ("a", "a", "b", None, "a"):
            document = served.chat(**SHORT, prompt_cache_key=key).json()
            assert document["choices"][0]["message"]["content"] == EXPECTED
            accepted.append(document["speculation"]["num_accepted_tokens"])
    assert accepted[0] == accepted[2] == accepted[3] < accepted[1] == accepted[4]


def events(served: Running, **options: Any) -> list[dict[str, Any]]:
    answer = served.chat(stream=True, **SHORT, **options)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_tells_which_characters_were_drafted(served: Running):
    chunks = events(served, stream_options={"include_speculation": True, "include_usage": True})
    parts = [
        (chunk["choices"][0]["delta"], chunk["speculation"])
        for chunk in chunks
        if chunk["choices"] and "speculation" in chunk
    ]
    assert "".join(delta.get("content", "") for delta, _ in parts) == EXPECTED
    for delta, told in parts:
        assert sum(told["runs"]) == len(delta.get("content", ""))
        if told.get("tree"):
            assert len(told["tree"]["parents"]) == len(told["tree"]["texts"]) == len(told["tree"]["accepted"])
    assert sum(sum(told["runs"][1::2]) for _, told in parts) > len(EXPECTED) / 2
    for name in ("num_rounds", "num_draft_tokens", "num_accepted_tokens"):
        assert sum(told[name] for _, told in parts) == chunks[-1]["speculation"][name] > 0
    assert sum(told["num_tokens"] for _, told in parts) == 30
    plain = events(served, stream_options={"include_speculation": True}, speculation=False)
    assert not any(len(chunk["speculation"]["runs"]) > 1 for chunk in plain if "speculation" in chunk)
    assert not any("speculation" in chunk for chunk in events(served))


def test_who_wrote_which_characters():
    def report(num_accepted: int, num_tokens: int) -> RoundReport:
        tree = TokenTree.chain(range(num_accepted))
        return RoundReport(tree=tree, path=tuple(range(num_accepted)), num_tokens=num_tokens)

    origins, rounds = Origins(), [report(0, 1), report(2, 3), report(1, 1)]
    for start in (0, 2, 3, 3, 5):  # a token without characters of its own among them
        origins.add(start, rounds)
    assert origins.runs(1) == [1]
    assert origins.runs(3) == [1, 1, 1]
    assert origins.runs(4) == [1, 3]
    assert origins.rounds() == rounds
    assert origins.rounds() == []


def test_each_request_is_one_line(served: Running, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "specdec.server.requests"):
        served.chat(**{**SHORT, "max_tokens": 29})
        served.http.get("/no%1bthing")
        served.http.get("/health")
        lines: list[str] = []

        def told() -> int:  # a line comes after the end of its answer, and one of an earlier test may come now
            told = [each.getMessage() for each in caplog.records if each.name == "specdec.server.requests"]
            lines[:] = [line for line in told if " + 30 tokens" not in line]
            return len(lines)

        wait_until(lambda: told() >= 2, "two lines")
    assert len(lines) == 2
    lines.sort(key=lambda line: " 404 " in line)
    assert re.fullmatch(
        r"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s, \d+ \+ 29 tokens, first after \d+\.\d\d s, "
        r"\d+ of \d+ drafted kept",
        lines[0],
    )
    assert "404" in lines[1]
    assert "\x1b" not in lines[1]
    assert "hello" not in lines[0]


def test_pages_of_a_named_origin_may_use_the_server(served: Running):
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = served.http.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    other = served.http.request("OPTIONS", "/v1/chat/completions", headers={**asked, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    with pytest.raises(ValueError, match="an origin is like"):
        ServerOptions(cors=("chat.example.org",))


def test_the_dashboard_shows_what_there_is(served: Running):
    served.chat(**SHORT)
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana-dashboard.json").read_text())
    shown = set(re.findall(r"specdec_\w+", json.dumps(dashboard["panels"])))
    text = served.http.get("/metrics").text
    told = set(re.findall(r"^(specdec_\w+)", text, re.MULTILINE))
    assert shown
    assert shown <= told
    plain = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in told if not name.endswith("_created")}
    assert plain == {re.sub(r"_bucket$", "", name) for name in shown}
