"""An answer beside the reference's: the same, a tie, or an error, and what the error looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from specdec.audit.answers import Answer, Token, placed
from specdec.audit.cases import PENALTIES, STRUCTURE, Case

_ENDS = ("", "</s>", "<eos>")
_TELLING = 12
"""Characters that two texts have in common only if one comes from the other."""
_QUOTE = 40


class Verdict(StrEnum):
    """How an answer compares."""

    IDENTICAL = "identical"
    TIE = "tie"
    DIFFERENT = "different"
    FAILED = "failed"
    """There is no answer."""
    REFUSED = "refused"
    """The server under audit does not do what the reference does."""
    NOT_CHECKED = "not checked"
    """Nor does the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of one answer.

    Args:
        position: characters that are the same.
        token: the reference's token in which the first difference is, by its number from 0; None if it is not known.
        gap: by how much the reference prefers its own token, in natural logarithms; None if it is not known.
        expected, got: the texts from there on.
        remark: what is known beyond that.
    """

    verdict: Verdict
    position: int | None = None
    token: int | None = None
    gap: float | None = None
    expected: str = ""
    got: str = ""
    remark: str = ""


def compare(case: Case, reference: Answer, answer: Answer, *, tie_bound: float) -> Comparison:
    """Compare two greedy answers to a case.

    Args:
        reference: with the log-probabilities of its tokens, where it has them.
        tie_bound: what the reference prefers its own token by where rounding may decide.
    """
    if reference.error is not None:
        return Comparison(verdict=Verdict.NOT_CHECKED, remark=f"the reference: {reference.error}")
    if answer.error is not None:
        verdict = Verdict.REFUSED if answer.is_refused else Verdict.FAILED
        return Comparison(verdict=verdict, remark=answer.error)
    if answer.text == reference.text:
        return Comparison(verdict=Verdict.IDENTICAL)
    pairs = enumerate(zip(reference.text, answer.text, strict=False))
    position = next((at for at, (a, b) in pairs if a != b), min(len(reference.text), len(answer.text)))
    token, start, gap = _gap(case, reference, answer, position)
    is_tie = gap is not None and abs(gap) < tie_bound and not _breaks(case, reference, answer)
    remark = "" if gap is not None or is_tie else _why_unknown(reference, token)
    return Comparison(
        verdict=Verdict.TIE if is_tie else Verdict.DIFFERENT,
        position=position,
        token=token,
        gap=gap,
        expected=reference.text[start : start + _QUOTE],
        got=answer.text[start : start + _QUOTE],
        remark=remark,
    )


def _gap(case: Case, reference: Answer, answer: Answer, position: int) -> tuple[int | None, int, float | None]:
    """The reference's token of the first difference, where it begins, and what it is preferred by."""
    spelled = list(placed(reference))
    for number, (start, token) in enumerate(spelled):
        following = spelled[number + 1][0] if number + 1 < len(spelled) else len(reference.text) + 1
        if start <= position < following:
            said = [each for _, each in spelled[:number]]
            return number, start, _preference(case, token, answer.text[start:], said)
    return None, position, None


def _preference(case: Case, token: Token, rest: str, said: Sequence[Token]) -> float | None:
    """By how much a token is preferred to the one with which `rest` begins; None if that one is not listed."""

    def begins(text: str) -> bool:
        if not rest:
            return text in _ENDS or text.startswith("<|")
        return bool(text) and (rest.startswith(text) or rest.startswith(f" {text}"))

    known = [text for text in token.others if begins(text) and text != token.text]
    if not known:
        return None
    other = max(known, key=len)
    return _score(case, token.text, token.log_prob, said) - _score(case, other, token.others[other], said)


def _score(case: Case, text: str, log_prob: float, said: Sequence[Token]) -> float:
    """With the penalties of OpenAI's API: log-probabilities are told without them."""
    count = sum(token.text == text for token in said)
    presence = case.options.get("presence_penalty", 0.0) * (count > 0)
    return float(log_prob - presence - case.options.get("frequency_penalty", 0.0) * count)


def _why_unknown(reference: Answer, token: int | None) -> str:
    if not reference.tokens:
        return "the reference tells no log-probabilities: a tie cannot be told from an error"
    if token is None:
        return "the reference's tokens do not spell its text: a tie cannot be told from an error"
    return "not among the likeliest tokens of the reference"


def _breaks(case: Case, reference: Answer, answer: Answer) -> bool:
    """Whether an answer is no JSON where the reference's is."""
    return case.group == STRUCTURE and _is_json(reference.text) and not _is_json(answer.text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def diagnose(case: Case, answer: Answer, compared: Comparison, references: Mapping[str, Answer]) -> str:
    """What an error looks like, in one sentence; empty if it looks like nothing known.

    Args:
        references: case -> the reference's answer, of all that was asked at the same time and of the case itself.
    """
    reference, position = references[case.name], compared.position or 0
    got, expected = answer.text[position:], reference.text[position:]
    twin = references.get(case.twin or "")
    if case.group == PENALTIES and twin is not None and _is_like(answer.text, twin.text, position):
        return f"the answer is that without {' and '.join(case.options)}: the penalty had no effect"
    if any(stop in answer.text for stop in case.options.get("stop", ())):
        return "the answer goes past its stop string"
    if _breaks(case, reference, answer):
        return "the answer is no JSON, which the grammar would have made it"
    if not answer.text:
        return "the answer is empty"
    strange = got[:_TELLING]
    if len(strange) == _TELLING and strange not in reference.text and strange not in case.prompt:
        for name, other in references.items():
            if strange in other.text:
                return f"the answer goes on as that to '{name}' does, which was decoded at the same time"
    if (missing := _missing(reference, answer, compared)) is not None:
        return f"the answer goes on as the reference does after {missing!r}: as if that had been left out"
    if len(got) >= _TELLING and got[: len(expected)] and _doubled(got, expected):
        return "the answer goes on as the reference does after a few more characters: as if something had been put in"
    return ""


def _is_like(text: str, other: str, position: int) -> bool:
    """Whether a text follows another one beyond where it should have left it."""
    return text == other or text[: position + _TELLING] == other[: position + _TELLING]


def _missing(reference: Answer, answer: Answer, compared: Comparison) -> str | None:
    """What of the reference the answer has left out, if it goes on as the reference does."""
    start = compared.position if compared.token is None else _start(reference, compared.token)
    assert start is not None
    rest = answer.text[start:]
    for length in range(1, 2 * _QUOTE):
        after = reference.text[start + length :]
        common = min(len(after), len(rest), 2 * _TELLING)
        if common >= _TELLING and after[:common] == rest[:common]:
            return reference.text[start : start + length]
    return None


def _start(reference: Answer, number: int) -> int:
    return list(placed(reference))[number][0]


def _doubled(got: str, expected: str) -> bool:
    return any(got[more : more + _TELLING] == expected[:_TELLING] for more in range(1, _QUOTE))
