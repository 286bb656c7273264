"""A model at work on jobs: they join and leave one ragged batch (`specdec.engine`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from specdec.batch.lines import Job
from specdec.control.capacity import RowTimer, best_rows
from specdec.drafters import Drafter
from specdec.engine import Engine, EngineThread, Generation, Request
from specdec.errors import SpecdecError, WorkerError
from specdec.text.prompting import encode_rendered, encode_texts, has_chat_template, render_chat, user_turn
from specdec.tree_model.compatibility import position_limit

CHUNKS_IN_HAND = 2
"""Calls of `answer` at the same time: while the last jobs of one are finished, those of the next have begun."""
_WINDOW = 4
"""Jobs in hand for each row: while a long answer holds up those after it, the other rows have something to do."""
_LONG = 16
"""Characters for each position of the model, from which on a text is counted before it is encoded as a whole."""
_PIECE = 1 << 14
"""Characters that are counted at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a job came to.

    Args:
        text: without special tokens; None if there is none.
        finish_reason: "stop" or "length"; "error" if there is no text.
        error: why there is none.
        num_prompt_tokens, num_tokens: read and written.
        num_rounds, num_drafted, num_accepted: of speculation (see `DecodingStats`).
    """

    text: str | None
    finish_reason: str
    error: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class Pending:
    """A job under way; `answer` is None until it is finished."""

    def __init__(self, job: Job):
        self.job = job
        self.answer: Answer | None = None
        self.is_finished = threading.Event()

    def finish(self, answer: Answer) -> None:
        self.answer = answer
        self.is_finished.set()


class Worker:
    """Answers jobs with one model, in a thread of its own.

    Args:
        model, tokenizer: the target, and what makes its prompts.
        drafter: as in `specdec.generate`.
        max_rows: jobs that are decoded at once; None chooses by what forwards of so many rows cost on this machine.
        reuses_replies: whether drafts are also copied from earlier answers, which suits jobs whose answers are alike.
            Answers stay the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drafter: Drafter | PreTrainedModel | str | None = None,
        max_rows: int | None = None,
        reuses_replies: bool = False,
    ):
        self.max_rows = best_rows(RowTimer(model).seconds) if max_rows is None else max_rows
        self.window = _WINDOW * self.max_rows
        self._tokenizer = tokenizer
        self._num_positions = position_limit(model)
        self._kind = "job" if reuses_replies else ""
        self._news = threading.Event()
        self._failure: Exception | None = None
        engine = Engine(
            model,
            drafter=drafter,
            tokenizer=tokenizer,
            max_rows=self.max_rows,
            max_waiting=CHUNKS_IN_HAND * self.window,
        )
        self._engine = EngineThread(engine)

    def begin(self, job: Job) -> Pending:
        """Take a job; a job that cannot be answered is finished at once, with the reason."""
        pending = Pending(job)
        try:
            request = Request(
                prompt=self._encode(job),
                config=GenerationConfig(**job.settings.generation_kwargs),
                seed=job.settings.seed,
                kind=self._kind,
                on_finish=lambda generation: self._finish(pending, generation),
            )
            self._engine.submit(request)
        except (SpecdecError, ValueError) as error:
            pending.finish(_failure(error))
        return pending

    def wait(self) -> None:
        """Sleep until a job has been finished.

        Raises:
            WorkerError: the model has failed.
        """
        self._news.wait()
        self._news.clear()
        self._check()

    def close(self) -> None:
        """Drop what is under way."""
        self._engine.close(timeout=0)

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers to some jobs, in order. May be called from several threads: their jobs share the batch.

        Raises:
            WorkerError: the model has failed.
        """
        answers: list[Answer] = []
        pending = [self.begin(job) for job in jobs[: self.window]]
        for index in range(len(jobs)):
            pending[index].is_finished.wait()
            answer = pending[index].answer
            if answer is None:
                self._check()
            assert answer is not None
            answers.append(answer)
            if len(pending) < len(jobs):
                pending.append(self.begin(jobs[len(pending)]))
        return answers

    def _encode(self, job: Job) -> list[int]:
        conversation, system = job.conversation, job.settings.system
        is_text, has_template = isinstance(conversation, str), has_chat_template(self._tokenizer)
        if is_text and (job.settings.raw or not has_template):
            if system is not None:
                raise ValueError("a system prompt is part of a chat template, and there is none here")
            text, encode = conversation, encode_texts
        elif has_template:
            messages = user_turn(conversation, system) if isinstance(conversation, str) else conversation
            text, encode = render_chat(self._tokenizer, messages), encode_rendered
        else:
            raise ValueError("this model has no chat template for messages: give a prompt")
        assert isinstance(text, str)
        self._check_length(text)
        return encode(self._tokenizer, [text])["input_ids"][0].tolist()

    def _check_length(self, text: str) -> None:
        """Refuse a text that is far too long: encoding megabytes takes minutes, in which no other line is begun.

        Counts piece by piece, up to twice what would fit: where it is cut, a text has some tokens more.
        """
        if len(text) <= _LONG * self._num_positions:
            return
        num_tokens = 0
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            num_tokens += len(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
            if num_tokens > 2 * self._num_positions:
                raise ValueError(
                    f"the prompt has more than {2 * self._num_positions} tokens but the model has "
                    f"{self._num_positions} positions: shorten it"
                )

    def _finish(self, pending: Pending, generation: Generation) -> None:
        """In the engine's thread: note the answer, or what keeps all answers from being made."""
        error = generation.error
        if generation.finish_reason == "cancelled" or (error and not isinstance(error, (SpecdecError, ValueError))):
            self._failure = self._failure or error or RuntimeError("it was closed")
            pending.is_finished.set()
        elif error is not None:
            pending.finish(_failure(error))
        else:
            pending.finish(self._answer(generation))
        self._news.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise WorkerError(f"the model has stopped: {_reason(self._failure)}") from self._failure

    def _answer(self, generation: Generation) -> Answer:
        stats = generation.stats
        return Answer(
            text=self._tokenizer.decode(generation.tokens, skip_special_tokens=True),
            finish_reason=generation.finish_reason or "",
            num_prompt_tokens=stats.num_prompt_tokens,
            num_tokens=len(generation.tokens),
            num_rounds=stats.rounds,
            num_drafted=stats.drafted,
            num_accepted=stats.accepted,
        )


def _failure(error: Exception) -> Answer:
    return Answer(text=None, finish_reason="error", error=_reason(error))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
