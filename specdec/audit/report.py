"""The findings on one page, to attach to a bug report."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from typing import Any

from specdec import __version__
from specdec.audit.cases import GROUPS
from specdec.audit.run import ALONE, Check, Findings, tally
from specdec.audit.verdicts import Verdict

_MOST_ERRORS = 5
_MOST_TIES = 12
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.2rem .6rem;text-align:left}"
    "pre,code{font-size:.9em}pre{overflow-x:auto;background:#8882;padding:.5rem}"
)


def headline(findings: Findings) -> str:
    """The result in one sentence."""
    num_compared = findings.count(Verdict.IDENTICAL, Verdict.TIE, Verdict.DIFFERENT)
    if findings.errors:
        kinds = {Verdict.DIFFERENT: "differ from the reference", Verdict.FAILED: "failed"}
        said = [f"{count} {what}" for verdict, what in kinds.items() if (count := findings.count(verdict))]
        return f"FAIL: of {num_compared + findings.count(Verdict.FAILED)} answers, {' and '.join(said)}"
    if not findings.is_clean:
        return "NOTHING COMPARED: no case was answered by both"
    ties = findings.count(Verdict.TIE)
    return f"PASS: {num_compared} answers, all those of the reference" + (
        f", {ties} of them up to a tie" if ties else ""
    )


def as_markdown(findings: Findings) -> str:
    """The page as Markdown."""
    parts = [
        "# Audit of speculative decoding\n",
        f"**{headline(findings)}.**\n",
        *_about(findings),
        *_table(findings),
        *_errors(findings),
        *_ties(findings),
        *_rest(findings),
    ]
    return "\n".join(parts) + "\n"


def as_html(findings: Findings) -> str:
    """The page by itself, for a browser."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(as_markdown(findings))
    title = escape(headline(findings))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>\n<body>\n{body}</body></html>\n"
    )


def as_document(findings: Findings) -> dict[str, Any]:
    """The findings as JSON has it."""
    return {
        "schema_version": 1,
        "result": headline(findings),
        "is_clean": findings.is_clean,
        **{name: value for name, value in asdict(findings).items() if name != "checks"},
        "checks": [
            {
                "phase": check.phase,
                "group": check.case.group,
                "case": check.case.name,
                **asdict(check.comparison),
                "diagnosis": check.diagnosis,
            }
            for check in findings.checks
        ],
    }


def _about(findings: Findings) -> list[str]:
    noise = "" if findings.noise is None else f" (the reference's own noise is {findings.noise:.2g})"
    lines = {
        "endpoint": _code(findings.endpoint) + (f", version {findings.version}" if findings.version else ""),
        "reference": _code(findings.reference),
        "drafted": _drafted(findings),
        "a tie is": f"a difference where the reference prefers its token by less than {findings.tie_bound:.2g} in "
        f"log-probability{noise}",
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {findings.seconds:.0f} s, by specdec {__version__} on "
        f"Python {platform.python_version()}",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items()), ""]


def _drafted(findings: Findings) -> str:
    if findings.num_drafted is None:
        return "the server does not say; make sure that it speculates"
    if findings.num_drafted == 0:
        return "**nothing was drafted, so this says nothing about speculation**"
    accepted = "" if findings.num_accepted is None else f", {findings.num_accepted} of them accepted"
    return f"{findings.num_drafted} tokens{accepted}"


def _table(findings: Findings) -> list[str]:
    verdicts = [verdict for verdict in Verdict if findings.count(verdict)]
    lines = [f"| requests | {' | '.join(verdicts)} |", f"|---|{'--:|' * len(verdicts)}"]
    for phase in findings.phases:
        counts = tally(findings, phase)
        lines.append(f"| {phase} | {' | '.join(str(counts[verdict]) for verdict in verdicts)} |")
    lines += ["", f"| what is asked | {' | '.join(verdicts)} |", f"|---|{'--:|' * len(verdicts)}"]
    for group, what in GROUPS.items():
        numbers = [findings.count(verdict, group=group) for verdict in verdicts]
        if any(numbers):
            lines.append(f"| {group}: {what} | {' | '.join(map(str, numbers))} |")
    return [*lines, ""]


def _errors(findings: Findings) -> list[str]:
    if not findings.errors:
        return []
    alike: dict[Any, list[Check]] = {}
    for check in findings.errors:
        compared = check.comparison
        alike.setdefault((check.case.name, compared.position, compared.got, compared.remark), []).append(check)
    groups = sorted(alike.values(), key=lambda checks: (not checks[0].diagnosis, -len(checks)))
    lines = ["## Errors\n", f"{_where(findings)}\n"]
    for checks in groups[:_MOST_ERRORS]:
        lines += _error(checks)
    if len(groups) > _MOST_ERRORS:
        lines.append(f"... and {len(groups) - _MOST_ERRORS} more; `--json` tells all of them.\n")
    case = groups[0][0].case
    body = json.dumps({"model": "...", **case.body()})
    return [*lines, f"The request of the first one, to `{case.path}`:\n", "```json", body, "```\n"]


def _where(findings: Findings) -> str:
    """In which phases and groups there are errors, where that is not all of them."""
    phases = list(dict.fromkeys(check.phase for check in findings.errors))
    groups = list(dict.fromkeys(check.case.group for check in findings.errors))
    when = "in every phase" if len(phases) == len(findings.phases) else f"in these phases: {', '.join(phases)}"
    what = f", all in {groups[0]}" if len(groups) == 1 else ""
    alone = "" if ALONE in phases or ALONE not in findings.phases else ": requests that are alone get the right answer"
    return f"There are errors {when}{what}{alone}."


def _error(checks: list[Check]) -> list[str]:
    first = checks[0]
    phases = ", ".join(check.phase for check in checks)
    lines = [f"### {first.case.group}, {first.case.name}\n"]
    compared = first.comparison
    if compared.verdict is Verdict.FAILED:
        return [*lines, f"No answer: {_code(compared.remark)} ({phases}).\n"]
    token = "" if compared.token is None else f", in token {compared.token}"
    gap = f"the reference prefers its token by {compared.gap:.3g}" if compared.gap is not None else compared.remark
    lines.append(f"First difference after {compared.position} characters{token}; {gap} ({phases}).\n")
    if first.diagnosis:
        lines.append(f"**{first.diagnosis[:1].upper()}{first.diagnosis[1:]}.**\n")
    return [*lines, "```text", f"expected {compared.expected!r}", f"got      {compared.got!r}", "```\n"]


def _ties(findings: Findings) -> list[str]:
    ties = [check for check in findings.checks if check.comparison.verdict is Verdict.TIE]
    if not ties:
        return []
    lines = ["## Ties\n", "What follows a tie is not compared.\n", "| case | requests | token | preferred by |"]
    lines.append("|---|---|--:|--:|")
    for check in ties[:_MOST_TIES]:
        compared = check.comparison
        lines.append(f"| {check.case.name} | {check.phase} | {compared.token} | {compared.gap:.2g} |")
    return [*lines, ""]


def _rest(findings: Findings) -> list[str]:
    lines = list(findings.notes)
    missed = (Verdict.REFUSED, Verdict.NOT_CHECKED)
    seen = {
        (check.case.group, check.comparison.verdict): check.comparison.remark
        for check in findings.checks
        if check.comparison.verdict in missed
    }
    lines += [f"{group}: {verdict}; {_code(remark)}" for (group, verdict), remark in seen.items()]
    return ["## Not compared\n", *(f"* {line}" for line in lines), ""] if lines else []


def _code(text: str) -> str:
    """Of words that are not ours: no mark-up, and no new cell of a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"
