"""A model behind the API: what a request goes through, whatever its form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from time import perf_counter, time
from typing import TypeVar

from specdec.server.answers import TokenSpeller
from specdec.server.errors import ApiError
from specdec.server.jobs import Job, Runner, closing
from specdec.server.metrics import EngineLoad, Metrics
from specdec.server.options import ServerOptions
from specdec.server.planning import ChoicePlan, ModelFacts, Planner
from specdec.server.protocol import ChatRequest, CompletionRequest, ModelCard

Body = TypeVar("Body", ChatRequest, CompletionRequest)


class Service:
    """Plans requests, submits them, and knows which are under way.

    Args:
        runner: the engine's thread.
        engine: the engine itself, for what it tells about its load.
    """

    def __init__(
        self,
        facts: ModelFacts,
        planner: Planner,
        speller: TokenSpeller,
        runner: Runner,
        engine: EngineLoad,
        options: ServerOptions,
    ):
        self.options = options
        self.metrics = Metrics(engine)
        self.speller = speller
        self.is_closing = False
        self.card = ModelCard(id=facts.name, created=int(time()))
        self._facts = facts
        self._planner = planner
        self._runner = runner
        self._jobs: set[Job] = set()
        # one thread: tokenizers and grammars of one model do not have to be thread-safe, and the loop never waits
        self._thinking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="specdec-planner")

    @property
    def model_name(self) -> str:
        return self._facts.name

    def check_model(self, name: str, param: str | None = "model") -> None:
        """Raise `ApiError` (404) unless this is the model served here."""
        if name != self.model_name:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"there is no model {name[:100]!r} here: this server has {self.model_name!r}",
                param=param,
                code="model_not_found",
            )

    async def start_chat(self, body: ChatRequest, client: str) -> Job:
        return await self._start(body, self._planner.plan_chat, client)

    async def start_completion(self, body: CompletionRequest, client: str) -> Job:
        return await self._start(body, self._planner.plan_completion, client)

    def close(self) -> None:
        """Take nothing more. What is under way goes on."""
        self.is_closing = True

    def cancel_all(self) -> None:
        """End what is under way."""
        for job in list(self._jobs):
            job.cancel(closing())

    async def _start(self, body: Body, plan: Callable[[Body], Sequence[ChoicePlan]], client: str) -> Job:
        """Plan and submit for a client. The caller closes the job."""
        if self.is_closing:
            raise closing()
        self.check_model(body.model)
        loop, started = asyncio.get_running_loop(), perf_counter()

        def submit() -> Job:
            job = Job(
                self._runner,
                plan(body),
                self._facts.tokenizer,
                body.stops,
                client=client,
                loop=loop,
                started=started,
                timeout=self.options.timeout,
                on_end=self._forget,
            )
            job.submit()
            return job

        job = await loop.run_in_executor(self._thinking, submit)
        self._jobs.add(job)
        return job

    def _forget(self, job: Job) -> None:
        self._jobs.discard(job)
        self.metrics.note_job(job)
