"""`specdec audit` finds faults that were planted, and only those."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from specdec.audit import Answer, Server, as_html, as_markdown, audit, make_cases
from specdec.audit.answers import Token, placed, tokens_from
from specdec.audit.cases import PENALTIES, STRUCTURE, Case
from specdec.audit.run import ALONE, LEAST_TIE_BOUND
from specdec.audit.verdicts import Verdict, compare
from tests.support.audited_server import DROPS, IGNORES, MIXES, AuditedServer
from tests.support.commands import error_of, specdec_command

FEW = ("--quick", "-n", "64", "--concurrency", "1,4")


def audited(server: AuditedServer, *options: str) -> tuple[int, str]:
    """The exit status and the page."""
    with server.running(), AuditedServer(speculates=False).running() as reference:
        result = specdec_command("audit", server.url, "--reference", reference.url, *FEW, *options)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("fault", "what", "where"),
    [
        (DROPS, "as if that had been left out", f"({ALONE}, 4 at once"),
        (MIXES, "which was decoded at the same time", "requests that are alone get the right answer"),
        (IGNORES, "that without frequency_penalty: the penalty had no effect", "all in penalties"),
    ],
)
def test_a_planted_fault_is_found_and_named(fault: str, what: str, where: str) -> None:
    status, page = audited(AuditedServer(fault))
    assert status == 1
    assert "**FAIL: of " in page
    assert what in page
    assert where in page


def test_a_sound_server_passes() -> None:
    server = AuditedServer()
    status, page = audited(server)
    assert status == 0, page
    assert "**PASS: " in page
    assert "tokens, " in page
    assert "accepted |" in page
    assert "up to token" not in page  # the boundary's case is right, and so not told
    assert "| context boundary | 1 |" in page
    assert server.num_left  # clients hung up


def test_a_server_that_drafts_nothing_proves_nothing() -> None:
    _, page = audited(AuditedServer(speculates=False))
    assert "nothing was drafted, so this says nothing about speculation" in page


def test_a_server_without_speculation_by_its_own_switch() -> None:
    """It can also limit what is drafted, which tells the depth of a fault."""
    with AuditedServer(DROPS, has_switch=True).running() as server:
        result = specdec_command("audit", server.url, *FEW, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert '"speculation": false' in document["reference"]
    wrong = {check["phase"] for check in document["checks"] if check["verdict"] == "different"}
    asked = {check["phase"] for check in document["checks"]}
    assert {phase for phase in asked if "drafted" in phase} == {f"at most {depth} drafted" for depth in (1, 2, 3, 5, 8)}
    assert {phase for phase in wrong if "drafted" in phase} == {"at most 5 drafted", "at most 8 drafted"}


def test_a_switch_that_is_ignored_is_no_reference() -> None:
    with AuditedServer().running() as server:
        assert "cannot turn speculation off for one request" in error_of(specdec_command("audit", server.url, *FEW))


def test_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {ending: tmp_path / f"audit.{ending}" for ending in ("md", "html", "json")}
    with AuditedServer().running() as server:
        findings = audit(
            Server(server.url), Server(server.url), make_cases(num_tokens=16, quick=True), concurrency=(2,)
        )
    assert as_markdown(findings).startswith("# Audit of speculative decoding\n\n**PASS: ")
    assert "<table>" in as_html(findings)
    assert findings.noise == 0.0
    assert findings.tie_bound == LEAST_TIE_BOUND
    assert any("no / conversations 'here'" in line for line in as_markdown(findings).splitlines())
    with AuditedServer(IGNORES).running() as server, AuditedServer(speculates=False).running() as other:
        findings = audit(Server(server.url), Server(other.url), make_cases(num_tokens=64, quick=True), concurrency=(1,))
        for ending, path in files.items():
            monkeypatch.setattr("specdec.audit.audit", lambda *args, **options: findings)
            options = ("--reference", other.url, "--output", str(path), "--json")
            result = specdec_command("audit", server.url, *options)
            assert result.exit_code == 1, ending
    document = json.loads(result.stdout)
    assert {check["group"] for check in document["checks"] if check["verdict"] == "different"} == {PENALTIES}
    assert json.loads(files["json"].read_text())["is_clean"] is False
    assert "<h2>Errors</h2>" in files["html"].read_text()


# verdicts


def answer_of(*tokens: tuple[str, float, dict[str, float]]) -> Answer:
    made = [Token(text=text, log_prob=log_prob, others=others) for text, log_prob, others in tokens]
    return Answer(text="".join(token.text for token in made), tokens=made, finish="length")


CASE = Case(name="a case", group="copies", prompt="x", max_tokens=8)
REFERENCE = answer_of((" a", -0.1, {}), (" b", -0.7, {" b": -0.7, " c": -0.7005, " d": -2.0}), (" e", -0.1, {}))


def test_a_tie_is_no_error() -> None:
    compared = compare(CASE, REFERENCE, Answer(text=" a c f"), tie_bound=1e-3)
    assert (compared.verdict, compared.token, compared.position) == (Verdict.TIE, 1, 3)
    assert compare(CASE, REFERENCE, Answer(text=" a c f"), tie_bound=1e-4).verdict is Verdict.DIFFERENT


def test_an_error_says_by_how_much() -> None:
    compared = compare(CASE, REFERENCE, Answer(text=" a d"), tie_bound=1e-3)
    assert compared.verdict is Verdict.DIFFERENT
    assert compared.gap == pytest.approx(1.3)
    unlikely = compare(CASE, REFERENCE, Answer(text=" a x"), tie_bound=1e-3)
    assert unlikely.remark == "not among the likeliest tokens of the reference"
    silent = compare(CASE, Answer(text=" a b e"), Answer(text=" a c"), tie_bound=1e-3)
    assert "tells no log-probabilities" in silent.remark


def test_an_end_can_be_a_tie() -> None:
    reference = answer_of((" a", -0.1, {}), (" b", -0.7, {"<|end|>": -0.7001}))
    assert compare(CASE, reference, Answer(text=" a"), tie_bound=1e-3).verdict is Verdict.TIE
    assert compare(CASE, REFERENCE, Answer(text=" a"), tie_bound=1e-3).verdict is Verdict.DIFFERENT


def test_a_tie_is_told_after_penalties() -> None:
    """Log-probabilities are told without them: the same gap is a tie or none."""
    case = Case(name="a case", group=PENALTIES, prompt="x", max_tokens=8, options={"frequency_penalty": 0.5})
    said = (" a", -0.1, {})
    reference = answer_of(said, (" b", -1.0, {" a": -0.5}), said)
    assert compare(case, reference, Answer(text=" a a"), tie_bound=1e-3).verdict is Verdict.TIE
    reference = answer_of(said, (" b", -1.0, {" a": -1.0}), said)
    assert compare(case, reference, Answer(text=" a a"), tie_bound=1e-3).verdict is Verdict.DIFFERENT


def test_what_is_no_json_is_no_tie() -> None:
    case = Case(name="a case", group=STRUCTURE, prompt="x", max_tokens=8)
    reference = answer_of(("[1", -0.1, {}), ("]", -0.7, {"": -0.7}))
    assert compare(case, reference, Answer(text="[1"), tie_bound=1e-3).verdict is Verdict.DIFFERENT


def test_failures_and_refusals() -> None:
    assert compare(CASE, REFERENCE, Answer(error="gone"), tie_bound=0.0).verdict is Verdict.FAILED
    assert compare(CASE, REFERENCE, Answer(error="no", status=400), tie_bound=0.0).verdict is Verdict.REFUSED
    assert compare(CASE, Answer(error="no"), Answer(text="a"), tie_bound=0.0).verdict is Verdict.NOT_CHECKED


def test_tokens_are_found_in_the_text() -> None:
    """Some servers tell tokens without the blank before them; where tokens are no text, nothing is claimed."""
    answer = Answer(text="ab cd", tokens=[Token(text=text, log_prob=0.0) for text in ("ab", "cd")])
    assert [start for start, _ in placed(answer)] == [0, 2]
    answer = Answer(text="é!", tokens=[Token(text=text, log_prob=0.0) for text in ("\ufffd", "\ufffd", "!")])
    assert list(placed(answer)) == []


def test_log_probabilities_of_every_form() -> None:
    columns = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}
    assert tokens_from(columns) == [Token(text="a", log_prob=-0.5, others={"a": -0.5, "b": -1.0})]
    assert tokens_from({"content": [entry]}) == [Token(text="a", log_prob=-0.5, others={"b": -1.0})]
    assert tokens_from({"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": None}) == [
        Token(text="a", log_prob=-0.5)
    ]
    assert tokens_from(None) == []


# what cannot be audited


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["localhost:8000"], "an endpoint is an address that starts with http:// or https://"),
        (["{url}", "--name", "other"], "has no model other; it has: copier"),
        (["{url}", "--concurrency", "0"], "--concurrency must be at least 1"),
        (["{url}", "--output", "page.pdf"], "it may be .md, .html, .json"),
        (["{url}", "--weights", "int8"], "--weights is of a model that is decoded here"),
        (["http://127.0.0.1:{port}"], "cannot reach http://127.0.0.1:"),
        (["{url}/metrics"], "/v1/models answers 404 nothing here"),
    ],
)
def test_what_is_wrong_is_told_first(options: list[str], message: str) -> None:
    with AuditedServer().running() as server, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        given = [option.format(url=server.url, port=port) for option in options]
        assert message in error_of(specdec_command("audit", *given))
