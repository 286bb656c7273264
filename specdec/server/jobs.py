"""The generations behind one request, brought from the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from specdec.errors import CapacityError, UnsupportedOptionError
from specdec.server.errors import ApiError, invalid, queue_full
from specdec.server.origins import Origins
from specdec.server.planning import ChoicePlan
from specdec.text.detokenize import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdec.engine import Generation, Request, RoundReport, TokenLogprobs

_log = logging.getLogger("specdec.server")


class Runner(Protocol):
    """What a job needs of `specdec.engine.EngineThread`."""

    def submit(self, request: Request) -> Generation: ...

    def cancel(self, generation: Generation) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is new of one choice.

    Args:
        text: that can be told.
        tokens: that it is made of; those of text that is held back come later, those behind a stop string never.
        logprobs: one for each of these tokens, if they were asked for.
        offsets: where the text of each of these tokens starts, in characters of the whole text.
        finish_reason: of the last part.
        runs: how many characters of the text, by turns, were the model's own and had been drafted; None if rounds are
            not kept.
        rounds: that have brought tokens since the part before, if they are kept.
    """

    index: int
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    offsets: Sequence[int]
    finish_reason: str | None
    runs: Sequence[int] | None = None
    rounds: Sequence[RoundReport] = ()


class _Choice:
    """The text of one generation, and the tokens that have not been told yet."""

    def __init__(
        self,
        index: int,
        plan: ChoicePlan,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        shown: Mapping[int, str],
    ):
        self.generation: Generation | None = None
        self._index = index
        self._eos_ids = frozenset(plan.config.eos_token_id or ())
        self._text = TextStream(tokenizer, stop, shown)
        self._pending: list[tuple[int, int]] = []
        """Each token, and where its text starts."""
        self._num_told_characters = 0
        self._num_told = 0
        self._origins = Origins() if plan.keeps_rounds else None

    def add(self, tokens: Sequence[int]) -> Part | None:
        """Take new tokens; None if there is nothing to tell."""
        text = ""
        for token in tokens:
            start = self._num_told_characters + len(text) + self._text.num_held
            if self._origins is not None:
                assert self.generation is not None
                self._origins.add(start, self.generation.rounds or ())
            if token not in self._eos_ids:
                self._pending.append((token, start))
                text += self._text.add(token)
        return self._part(text, None) if text else None

    def finish(self, reason: str) -> Part:
        return self._part(self._text.finish(), reason)

    def _part(self, text: str, reason: str | None) -> Part:
        self._num_told_characters += len(text)
        is_whole = reason is not None and not self._text.is_stopped
        count = sum(is_whole or start < self._num_told_characters for _, start in self._pending)
        told, self._pending = self._pending[:count], self._pending[count:]
        assert self.generation is not None
        known = self.generation.logprobs
        logprobs = None if known is None else known[self._num_told : self._num_told + count]
        self._num_told += count
        return Part(
            index=self._index,
            text=text,
            tokens=[token for token, _ in told],
            logprobs=logprobs,
            offsets=[start for _, start in told],
            finish_reason=reason,
            runs=None if self._origins is None else self._origins.runs(len(text)),
            rounds=() if self._origins is None else self._origins.rounds(),
        )


class Job:
    """Runs the choices of one answer. Whoever has submitted it closes it.

    Args:
        stop: stop strings.
        shown: special tokens that are a part of the text.
        is_thinking: whether the prompt has opened the reasoning.
        client: whose it is, for taking turns.
        adapter: the LoRA adapter that answers, None: the base.
        loop: in which its parts are awaited.
        started: when the request arrived, by `time.perf_counter`.
        timeout: seconds from then until the answer must be complete.
        on_end: called when it is closed.
    """

    def __init__(
        self,
        runner: Runner,
        plans: Sequence[ChoicePlan],
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        *,
        shown: Mapping[int, str],
        is_thinking: bool,
        client: str,
        adapter: str | None,
        loop: asyncio.AbstractEventLoop,
        started: float,
        timeout: float,
        on_end: Callable[[Job], None],
    ):
        self.started = started
        self.is_thinking = is_thinking
        self.first_token_at: float | None = None
        self._runner = runner
        self._plans = plans
        self._client = client
        self._adapter = adapter
        self._timeout = timeout
        self._on_end = on_end
        self._choices = [_Choice(index, plan, tokenizer, stop, shown) for index, plan in enumerate(plans)]
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, Sequence[int] | Generation]] = asyncio.Queue()
        self._failure: ApiError | None = None
        self._num_running = 0
        self._is_closed = False

    @property
    def generations(self) -> list[Generation]:
        return [choice.generation for choice in self._choices if choice.generation is not None]

    @property
    def is_complete(self) -> bool:
        """Whether everything has come to its end and was told."""
        return not self._num_running

    def submit(self) -> None:
        """Queue everything, or nothing. May be called in another thread than the loop's.

        Raises:
            ApiError: the queue is full (429), the request is too large for this server or wrong (400).
        """
        from specdec.engine import Request

        for index, plan in enumerate(self._plans):
            request = Request(
                prompt=plan.prompt,
                config=plan.config,
                seed=plan.seed,
                client=self._client,
                adapter=self._adapter,
                logits_processor=plan.logits_processor,
                stopping_criteria=plan.stopping_criteria,
                num_logprobs=plan.num_logprobs,
                max_drafted=plan.max_drafted,
                keeps_rounds=plan.keeps_rounds,
                kind=f"{self._client} {plan.kind}" if plan.kind else "",  # of no other client's replies
                on_tokens=self._teller(index),
                on_finish=self._teller(index),
            )
            try:
                self._choices[index].generation = self._runner.submit(request)
            except (CapacityError, UnsupportedOptionError, ValueError, RuntimeError) as error:
                self._cancel()
                raise _refusal(error) from error
            self._num_running += 1

    def cancel(self, failure: ApiError) -> None:
        """End what is under way; `failure` is what the client is told."""
        self._failure = failure
        self._cancel()

    def close(self) -> None:
        """Nobody listens any more: end what is under way. Does nothing the second time."""
        if not self._is_closed:
            self._is_closed = True
            self._cancel()
            self._on_end(self)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """What comes, of all choices, until everything has ended.

        Raises:
            ApiError: the generation failed, took too long, or was cancelled.
        """
        deadline = self._loop.time() + self._timeout - (perf_counter() - self.started)
        while self._num_running:
            try:
                async with asyncio.timeout_at(deadline):
                    index, event = await self._events.get()
            except TimeoutError:
                raise too_late(self._timeout) from None
            part = self._take(index, event)
            if part is not None:
                yield part

    def _cancel(self) -> None:
        for generation in self.generations:
            if not generation.is_finished:
                self._runner.cancel(generation)

    def _take(self, index: int, event: Sequence[int] | Generation) -> Part | None:
        choice = self._choices[index]
        if isinstance(event, Sequence):
            if self.first_token_at is None:
                self.first_token_at = perf_counter()
            return choice.add(event)
        self._num_running -= 1
        if event.finish_reason == "cancelled":
            raise self._failure or ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the generation was cancelled")
        if event.finish_reason == "error":
            raise _failure(event.error)
        assert event.finish_reason is not None
        return choice.finish(event.finish_reason)

    def _teller(self, index: int) -> Callable[[Sequence[int] | Generation], None]:
        """A callback for the engine's thread."""

        def tell(event: Sequence[int] | Generation) -> None:
            kept = list(event) if isinstance(event, Sequence) else event
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, kept))

        return tell


def _refusal(error: Exception) -> ApiError:
    """What a client is told if the engine does not take a request."""
    if isinstance(error, CapacityError):
        return queue_full(str(error))
    if isinstance(error, ValueError):
        return invalid(str(error))
    return closing()


def _failure(error: Exception | None) -> ApiError:
    """What a client is told if a generation failed; a `ValueError` was about the request."""
    if isinstance(error, ValueError):
        return invalid(str(error))
    _log.error("a generation failed", exc_info=error)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the generation failed; the server's log says why")


def too_late(timeout: float) -> ApiError:
    """504 of a request that has had its time, in seconds."""
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"the reply was not finished within {timeout:g} s and was cancelled: ask for fewer tokens",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def closing() -> ApiError:
    """503 while the server shuts down."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", code="closing")
