"""What Ray's workers run, and what people put into their own `ray.data` pipelines. Knows nothing of Ray itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.batch.lines import SETTING_NAMES, Job, Settings, job_of
from specdec.batch.worker import Answer, Worker
from specdec.errors import BatchError
from specdec.model_options import ModelOptions, Weights


class SpecdecBatch:
    """Continues the prompts of batches of a `ray.data.Dataset`; each instance holds a target and its drafter.

        answers = dataset.map_batches(SpecdecBatch, fn_constructor_kwargs={"model": "demo"}, concurrency=2)

    A batch has a column `prompt` (texts) or `messages` (lists of role and content), and may have columns for settings
    of a row (`max_new_tokens`, `temperature`, ...; see `Settings`). It comes back with the columns `text`,
    `finish_reason`, `prompt_tokens`, `completion_tokens` and `error` more: the text is None where there is an error.
    Greedy text is exactly the target's own.

    Args:
        model: 'demo', a hub id, or a folder that every node has.
        draft: a smaller model of the same tokenizer.
        drafter: as `specdec batch --drafter`.
        weights: "float", "stock", "int8" or "int4".
        dtype, device, threads, trust_remote_code: as in `specdec.models.load`.
        max_rows: rows that are decoded at once; None chooses by what forwards cost.
        reuses_replies: draft from earlier answers too, each instance from its own.
        settings: the defaults of every row, by name.

    Raises:
        ModelError, DraftError, ValueError: as loading does; a wrong setting.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        draft: str | None = None,
        drafter: str | None = None,
        weights: Weights = "float",
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        trust_remote_code: bool = False,
        max_rows: int | None = None,
        reuses_replies: bool = False,
        settings: Mapping[str, Any] | None = None,
    ):
        from specdec.models.pair import load_pair
        from specdec.specs import choose_drafter

        spec = choose_drafter(drafter, draft, for_engine=True)
        self._defaults = Settings().overridden(settings or {})
        options = ModelOptions(
            dtype=dtype, device=device, threads=threads, weights=weights, trust_remote_code=trust_remote_code
        )
        pair = load_pair(model, draft, options, translates=spec.translates)
        self.worker = Worker(
            pair.target.model,
            pair.target.tokenizer,
            drafter=pair.build(spec),
            max_rows=max_rows,
            reuses_replies=reuses_replies,
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of columns, as `map_batches` gives it with its default `batch_format`."""
        names = [name for name in ("prompt", "messages", *SETTING_NAMES) if name in batch]
        num_rows = len(next(iter(batch.values()))) if batch else 0
        rows = [{name: _plain(batch[name][row]) for name in names} for row in range(num_rows)]
        answers = self._answer_rows(rows)
        columns = {
            "text": [answer.text for answer in answers],
            "finish_reason": [answer.finish_reason for answer in answers],
            "error": [answer.error for answer in answers],
        }
        counts = {
            "prompt_tokens": [answer.num_prompt_tokens for answer in answers],
            "completion_tokens": [answer.num_tokens for answer in answers],
        }
        texts = {name: np.array(column, dtype=object) for name, column in columns.items()}
        return {**batch, **texts, **{name: np.array(column, dtype=np.int64) for name, column in counts.items()}}

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers to some jobs, in order."""
        return self.worker.answer(jobs)

    def window(self) -> int:
        """Jobs that it is best given at once."""
        return self.worker.window

    def _answer_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        jobs: list[Job] = []
        answers: dict[int, Answer] = {}
        for number, row in enumerate(rows):
            try:
                jobs.append(job_of(row, number, self._defaults))
            except BatchError as error:
                answers[number] = Answer(text=None, finish_reason="error", error=str(error))
        answers.update(zip((job.number for job in jobs), self.answer(jobs), strict=True))
        return [answers[number] for number in range(len(rows))]


def _plain(value: Any) -> Any:
    """What Arrow made an array of, as Python's own."""
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value
