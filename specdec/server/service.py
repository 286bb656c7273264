"""A model behind the API: what a request goes through, whatever its form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from time import perf_counter, time
from typing import Any

from specdec.server.errors import ApiError, queue_full
from specdec.server.forms import ChatForm, TokenDecoder
from specdec.server.jobs import Job, Runner, closing, too_late
from specdec.server.metrics import EngineLoad, Metrics
from specdec.server.options import ServerOptions
from specdec.server.planning import ModelFacts, Planner
from specdec.server.preprocessing import Preprocessed, Preprocessor
from specdec.server.protocol.answers import ModelCard
from specdec.server.protocol.requests import ChatRequest, CompletionRequest
from specdec.server.protocol.responses import ResponsesRequest
from specdec.server.replies.parser import ReplyParser
from specdec.server.replies.styles import HERMES
from specdec.server.responses import ResponsesForm


class Service:
    """Plans requests, submits them, and knows which are under way.

    Args:
        runner: the engine's thread.
        engine: the engine itself, for what it tells about its load.
        adapters: names of LoRA adapters, which are models of their own to clients.
    """

    def __init__(
        self,
        facts: ModelFacts,
        planner: Planner,
        decoder: TokenDecoder,
        runner: Runner,
        engine: EngineLoad,
        options: ServerOptions,
        adapters: Sequence[str] = (),
    ):
        self.options = options
        self.metrics = Metrics(engine, lambda: len(self._planning))
        self.decoder = decoder
        self.is_closing = False
        self._is_over = False
        created, length = int(time()), facts.context_length
        self.cards = {facts.name: ModelCard(id=facts.name, created=created, max_model_len=length, root=facts.name)}
        """What is served, by name."""
        for name in adapters:
            card = ModelCard(id=name, created=created, max_model_len=length, root=name, parent=facts.name)
            self.cards[name] = card
        self._facts = facts
        self._planner = planner
        self._runner = runner
        self._engine = engine
        self._jobs: set[Job] = set()
        self._planning: dict[asyncio.Task[Any], str] = {}
        self._preprocessor = Preprocessor(planner, seconds=options.planning_timeout, max_waiting=engine.max_waiting)

    @property
    def model_name(self) -> str:
        return self._facts.name

    def adapter_of(self, name: str) -> str | None:
        """The LoRA adapter of this name; None: it is the base's."""
        return None if name == self.model_name else name

    def check_model(self, name: str, param: str | None = "model") -> None:
        """Raise `ApiError` (404) unless this is a model served here."""
        if name not in self.cards:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"there is no model {name[:100]!r} here: this server has {', '.join(map(repr, self.cards))}",
                param=param,
                code="model_not_found",
            )

    def chat_form(self, body: ChatRequest, job: Job) -> ChatForm:
        """How the answer to a conversation is written."""
        return ChatForm(
            body.model,
            self.decoder,
            make_parser=lambda: self._parser(body, job),
            make_id=self._make_call_id,
            includes_usage=body.includes_usage,
        )

    def responses_form(self, body: ResponsesRequest, chat: ChatRequest, job: Job) -> ResponsesForm:
        """How the answer to `/v1/responses` is written.

        Args:
            chat: the conversation that it stands for.
        """
        return ResponsesForm(body, self._parser(chat, job), self._make_call_id)

    @property
    def _make_call_id(self) -> Callable[[], str]:
        return (self._facts.form.style or HERMES).call_id

    def _parser(self, body: ChatRequest, job: Job) -> ReplyParser:
        form = self._facts.form
        return form.parser(body.tool_names, has_tools=body.may_call, is_thinking=job.is_thinking)

    async def warm_up(self) -> None:
        """Wait until requests can be planned without delay."""
        await self._preprocessor.warm_up()

    async def start(self, body: ChatRequest | CompletionRequest, client: str) -> Job:
        """Plan and submit, in a task of its own. The caller closes the job; one that is cancelled leaves none.

        Raises:
            ApiError: the request cannot be answered, too many wait, or time was up.
        """
        if self.is_closing:
            raise closing()
        self.check_model(body.model)
        self._check_room(client)
        started, task = perf_counter(), asyncio.current_task()
        assert task is not None
        self._planning[task] = client
        try:
            async with asyncio.timeout(self.options.timeout):
                return await self._submit(body, await self._preprocessor.prepare(body), client, started)
        except TimeoutError:
            self.metrics.record_unfinished()
            raise too_late(self.options.timeout) from None
        except asyncio.CancelledError:
            self.metrics.record_unfinished()
            if self._is_over:
                raise closing() from None
            raise
        finally:
            del self._planning[task]

    def close(self) -> None:
        """Take nothing more. What is under way goes on."""
        self.is_closing = True

    def cancel_all(self) -> None:
        """End what is under way."""
        self._is_over = True
        for task in list(self._planning):
            task.cancel()
        for job in list(self._jobs):
            job.cancel(closing())

    async def release(self) -> None:
        """Give back what is held besides; nothing can be started any more."""
        await self._preprocessor.close()

    def _check_room(self, client: str) -> None:
        """Those that are planned wait too, where there is no row for them. Who may still wait: see `TurnQueue`."""
        engine, num_planned = self._engine, len(self._planning)
        most = engine.max_waiting + max(0, engine.max_rows - engine.num_rows)
        num_waiting = num_planned + engine.num_waiting
        has_one = client in self._planning.values()
        if num_waiting >= (most if has_one else 2 * most):
            raise queue_full(
                f"{num_waiting} requests wait, and no more may (max_waiting={engine.max_waiting}): try again later"
            )

    async def _submit(
        self, body: ChatRequest | CompletionRequest, asked: Preprocessed, client: str, started: float
    ) -> Job:
        loop = asyncio.get_running_loop()

        def submit() -> Job:
            job = Job(
                self._runner,
                self._planner.plan(body, asked.prompts, asked.matcher),
                self._facts.tokenizer,
                body.stops,
                shown=self._planner.shown(body),
                is_thinking=asked.is_thinking,
                client=client,
                adapter=self.adapter_of(body.model),
                loop=loop,
                started=started,
                timeout=self.options.timeout,
                on_end=self._forget,
            )
            job.submit()
            return job

        submitting = self._preprocessor.submit(submit)
        try:
            job = await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_close_job)  # it may be too late to stop it
            raise
        self._jobs.add(job)
        return job

    def _forget(self, job: Job) -> None:
        self._jobs.discard(job)
        self.metrics.record_job(job)


def _close_job(submitting: Future[Job]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().close()
