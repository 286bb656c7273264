"""One line for each request: who, what, how long, and what speculation did. Nothing that was asked or answered."""

from __future__ import annotations

import logging
from http import HTTPStatus

from starlette.types import Scope

from specdec.server.answers import speculation_of
from specdec.server.jobs import Job

JOB = "specdec.job"
"""Where a request's scope has its `Job`."""
_MAX_PATH = 60
_log = logging.getLogger("specdec.server.requests")


def log_request(scope: Scope, status: int, seconds: float) -> None:
    """At the end of an answer; status 0: none was begun. What is asked for all the time is told only if it fails."""
    if scope["path"] in ("/metrics", "/health") and status == HTTPStatus.OK:
        return
    client = scope["client"][0] if scope.get("client") else "-"
    path = repr(scope["path"][:_MAX_PATH])[1:-1]  # line breaks and escapes of terminals stay what they are
    job: Job | None = scope.get(JOB)
    told = "" if job is None else f", {_work_of(job)}"
    _log.info("%s %s %s %s %.2f s%s", client, scope["method"][:10], path, status or "-", seconds, told)


def _work_of(job: Job) -> str:
    generations = job.generations
    stats, done = [each.stats for each in generations], speculation_of(generations)
    num_prompt_tokens = sum(each.num_prompt_tokens for each in stats)
    num_tokens = sum(len(each.tokens) for each in generations)
    parts = [f"{num_prompt_tokens} + {num_tokens} tokens"]
    if job.first_token_at is not None:
        parts.append(f"first after {job.first_token_at - job.started:.2f} s")
    if done.num_draft_tokens:
        parts.append(f"{done.num_accepted_tokens} of {done.num_draft_tokens} drafted kept")
    if not job.is_complete:
        parts.append("not finished")
    return ", ".join(parts)
