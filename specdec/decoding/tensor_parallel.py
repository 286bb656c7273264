"""A target that transformers has split over processes (tensor parallelism): the first one decides, the others follow.

Every process holds a part of every layer, so that all of them have to make the same forwards: one that drafts another
token, or stops elsewhere, leaves the others waiting for ever. What a drafter proposes, what is accepted and where rows
stop may depend on time, on chance and on rounding, so the first process alone settles it and tells the others. A
failure there is told too, and raised by all.

Shape legend: B rows, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from specdec.acceptance import Acceptance
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stopping import Scores, StopChecker
from specdec.devices import num_processes
from specdec.errors import DraftError, ProcessError
from trees import Draft, TokenTree, TreeBatch

_FAILED = -1
_MESSAGE = 256
"""Numbers that a message has room for before a second one follows it."""


class Processes:
    """The processes that a target is split over.

    Args:
        model: with `num_processes(model)` above 1.
    """

    def __init__(self, model: PreTrainedModel):
        self._group = model._mesh_manager.get_mesh("tp").get_group()
        self._device = model.device
        self.is_first = dist.get_rank(self._group) == 0

    def settle(self, decide: Callable[[], Sequence[int]]) -> list[int]:
        """What `decide` returns in the first process, in all of them; it is called there only.

        Raises:
            ProcessError: it failed there; in the first process, whatever it raised.
        """
        failure: Exception | None = None
        numbers: Sequence[int] = ()
        if self.is_first:
            try:
                numbers = decide()
            except Exception as error:
                failure = error
        count, *told = self._tell([len(numbers) if failure is None else _FAILED, *numbers[:_MESSAGE]], _MESSAGE + 1)
        if failure is not None:
            raise failure
        if count == _FAILED:
            raise ProcessError("the first process has failed: its message says why")
        if count > _MESSAGE:
            told += self._tell(numbers[_MESSAGE:], count - _MESSAGE)
        return told[:count]

    def _tell(self, numbers: Sequence[int], size: int) -> list[int]:
        """One broadcast of `size` numbers, padded."""
        message = torch.zeros(size, dtype=torch.int64)
        message[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        message = message.to(self._device)
        dist.broadcast(message, group=self._group, group_src=0)
        return message.tolist()


def start_session(drafter: Drafter, run: Run, processes: Processes) -> DraftSession:
    """The session of a drafter that works in the first process only.

    Raises:
        DraftError: it needs layers of the target, or a model that is itself split.
    """
    for draft_model in drafter.models():
        if num_processes(draft_model) > 1:
            raise DraftError(
                f"{type(drafter).__name__} has a draft model that is split over processes: load the draft without "
                "tp_plan (only the first process drafts)"
            )
    target = run.target.model
    if any(processes.settle(lambda: [not drafter.is_warm(target)])):
        drafter.warm_up(target)
    return _LedSession(drafter, run, processes)


class _LedSession(DraftSession):
    """In the first process the drafter at work, in the others what it says."""

    def __init__(self, drafter: Drafter, run: Run, processes: Processes):
        self._run = run
        self._processes = processes
        self._failure: Exception | None = None
        self._own: DraftSession | None = None
        with self._target_is_out_of_reach():
            processes.settle(lambda: self._start(drafter))

    def _start(self, drafter: Drafter) -> Sequence[int]:
        self._own = drafter.start(self._run)
        return ()

    @property
    def num_forwards(self) -> int:
        return 0 if self._own is None else self._own.num_forwards

    @property
    def control_seconds(self) -> float:
        return 0.0 if self._own is None else self._own.control_seconds

    def explain(self) -> dict[str, Any]:
        return {} if self._own is None else self._own.explain()

    def propose(self, max_depths: Sequence[int]) -> Draft:
        drafts: list[Draft] = []
        with self._target_is_out_of_reach():
            told = self._processes.settle(lambda: self._propose(max_depths, drafts))
        return drafts[0] if drafts else Draft(trees=_trees(told, len(max_depths), self._run.device))

    def _propose(self, max_depths: Sequence[int], drafts: list[Draft]) -> Sequence[int]:
        if self._failure is not None:
            raise self._failure
        assert self._own is not None
        drafts.append(self._own.propose(max_depths))
        return _numbers(drafts[0].trees)

    def observe(self, outcome: Outcome) -> None:
        if self._own is not None and self._failure is None:
            try:
                self._own.observe(outcome)
            except Exception as error:  # raised when all processes are there to hear of it
                self._failure = error

    def select_rows(self, rows: Sequence[int]) -> None:
        if self._own is not None:
            self._own.select_rows(rows)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    @contextmanager
    def _target_is_out_of_reach(self) -> Iterator[None]:
        """Refuse forwards of the target, in which the other processes would not take part."""

        def refuse(*_: object) -> None:
            raise DraftError(
                "this drafter runs layers of the target, which is split over processes: draft with "
                "specdec.drafters.PromptLookup(), SmallModel(model) or Auto()"
            )

        model = self._run.target.model
        parts = [model.get_input_embeddings(), *self._run.target.views.layers, model.get_output_embeddings()]
        hooks = [part.register_forward_pre_hook(refuse) for part in parts if part is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _numbers(trees: TreeBatch) -> list[int]:
    rows = [trees.row(row) for row in range(trees.num_rows)]
    return list(chain.from_iterable((len(row), *row.tokens, *row.parents) for row in rows))


def _trees(numbers: Sequence[int], num_rows: int, device: torch.device) -> TreeBatch:
    rows, rest = [], iter(numbers)
    for _ in range(num_rows):
        size = next(rest)
        rows.append(TokenTree(tokens=[next(rest) for _ in range(size)], parents=[next(rest) for _ in range(size)]))
    return TreeBatch.stack(rows, device)


class LedSampler(Sampler):
    """Accepts what the first process accepts: the others have neither its randomness nor what it drafted from."""

    def __init__(self, sampler: Sampler, processes: Processes):
        vars(self).update(vars(sampler))
        self._processes = processes

    def accept(self, scores_BTV: Tensor, draft: Draft) -> Acceptance:
        def decide() -> list[int]:
            accepted = super(LedSampler, self).accept(scores_BTV, draft)
            path_BN = torch.nn.functional.pad(accepted.path_BD, (0, width - accepted.path_BD.shape[1]))
            columns = [accepted.counts_B[:, None], accepted.next_B[:, None], path_BN]
            return torch.cat(columns, 1).flatten().tolist()

        width = draft.trees.width
        told = self._processes.settle(decide)
        table = torch.tensor(told, device=scores_BTV.device).view(len(scores_BTV), 2 + width)
        return Acceptance(path_BD=table[:, 2:], counts_B=table[:, 0], next_B=table[:, 1])


class LedStopChecker(StopChecker):
    """Stops where the first process stops: criteria may look at the clock."""

    def __init__(self, criteria: StoppingCriteriaList, processes: Processes):
        super().__init__(criteria)
        self._processes = processes

    def cut(
        self, sequences: Sequences, candidates: Sequence[Sequence[int]], scores_of: Callable[[int], Scores]
    ) -> tuple[list[int], list[bool]]:
        def decide() -> list[int]:
            counts, stopped = super(LedStopChecker, self).cut(sequences, candidates, scores_of)
            return [*counts, *map(int, stopped)]

        told = self._processes.settle(decide)
        return told[: len(candidates)], [bool(stops) for stops in told[len(candidates) :]]
