"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from specdec.server.jobs import Job

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class EngineLoad(Protocol):
    """What is read of `specdec.engine.Engine` whenever somebody asks; from another thread, so it may be a round old."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def max_rows(self) -> int: ...

    @property
    def max_waiting(self) -> int: ...


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        num_planned: requests that are being planned.
    """

    def __init__(self, engine: EngineLoad, num_planned: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "specdec_requests_total",
            "Answers sent, by status; a stream counts with the status that it started with.",
            ["path", "status"],
            registry=registry,
        )
        self._unfinished = Counter(
            "specdec_unfinished_total",
            "Answers that ended early: the client left, time was up, or the generation failed.",
            registry=registry,
        )
        self._prompt_tokens = Counter("specdec_prompt_tokens_total", "Tokens of prompts.", registry=registry)
        self._reused = Counter(
            "specdec_reused_prompt_tokens_total", "Of these, tokens that were known already.", registry=registry
        )
        self._tokens = Counter("specdec_generated_tokens_total", "Tokens generated.", registry=registry)
        self._rounds = Counter("specdec_rounds_total", "Rounds, counted for each request in them.", registry=registry)
        self._drafted = Counter("specdec_drafted_tokens_total", "Drafted tokens that were verified.", registry=registry)
        self._accepted = Counter("specdec_accepted_tokens_total", "Drafted tokens that were kept.", registry=registry)
        self._first_token = Histogram(
            "specdec_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "specdec_time_per_token_seconds",
            "Of each answer, the time from the first token to the last, divided by the tokens between.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        for name, meaning, read in (
            ("specdec_planning", "Requests that are rendered, tokenized and compiled, or wait for it.", num_planned),
            ("specdec_rows", "Requests that are being decoded.", lambda: engine.num_rows),
            ("specdec_queue_length", "Requests that wait.", lambda: engine.num_waiting),
            ("specdec_cached_tokens", "Slots of key/value memory in use.", lambda: engine.num_cached_tokens),
        ):
            Gauge(name, meaning, registry=registry).set_function(read)

    def record_answer(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def record_unfinished(self) -> None:
        """Count a request that ended early."""
        self._unfinished.inc()

    def record_job(self, job: Job) -> None:
        """Count what a job has done, once it is closed."""
        now = perf_counter()
        for generation in job.generations:
            stats = generation.stats
            self._prompt_tokens.inc(stats.num_prompt_tokens)
            self._reused.inc(stats.num_reused_tokens)
            self._tokens.inc(len(generation.tokens))
            self._rounds.inc(stats.rounds)
            self._drafted.inc(stats.drafted)
            self._accepted.inc(stats.accepted)
        if not job.is_complete:
            self.record_unfinished()
        if job.first_token_at is not None:
            self._first_token.observe(job.first_token_at - job.started)
            longest = max(len(generation.tokens) for generation in job.generations)
            if job.is_complete and longest > 1:
                self._per_token.observe((now - job.first_token_at) / (longest - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)
