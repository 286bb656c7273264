"""A target that transformers has split over processes (tensor parallelism): the first one decides, the others follow.

Every process holds a part of every layer, so that all of them have to make the same forwards: one that drafts another
token, or stops elsewhere, leaves the others waiting for ever. What a drafter proposes, what is accepted and where rows
stop may depend on time, on chance and on rounding, so the first process alone decides it and tells the others. A
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
from transformers import PreTrainedModel

from specdec.acceptance import Acceptance
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.errors import DraftError, ProcessError
from specdec.hf import num_processes
from trees import Draft, TokenTree, TreeBatch

_FAILED = -1
_MESSAGE = 256
"""Numbers that a message has room for before a second one follows it."""


class Ranks:
    """The processes that a target is split over. Here it is one, which decides for itself."""

    def start(self, drafter: Drafter, run: Run) -> DraftSession:
        """The session of a drafter, which works in the first process only.

        Raises:
            DraftError: the drafter does not fit the target, the call or the processes.
        """
        return drafter.start(run)

    def accept(self, draft: Draft, decide: Callable[[], Acceptance]) -> Acceptance:
        """What is kept of a draft: the other processes have neither the randomness nor what was drawn from."""
        return decide()

    def cut(self, decide: Callable[[], tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
        """How many tokens rows keep, and whether they stop (`StopChecker.cut`): criteria may look at the clock."""
        return decide()


def ranks_of(model: PreTrainedModel) -> Ranks:
    """The processes that a model is split over."""
    return Ranks() if num_processes(model) == 1 else TensorParallelRanks(model)


class TensorParallelRanks(Ranks):
    """Several processes: the first one decides, and tells the others.

    Args:
        model: with `num_processes(model)` above 1.
    """

    def __init__(self, model: PreTrainedModel):
        self._group = model._mesh_manager.get_mesh("tp").get_group()
        self._device = model.device
        self._is_first = dist.get_rank(self._group) == 0

    def start(self, drafter: Drafter, run: Run) -> DraftSession:
        for draft_model in drafter.models():
            if num_processes(draft_model) > 1:
                raise DraftError(
                    f"{type(drafter).__name__} has a draft model that is split over processes: load the draft without "
                    "tp_plan (only the first process drafts)"
                )
        target = run.target.model
        if any(self.broadcast_from_rank0(lambda: [not drafter.is_warm(target)])):
            drafter.warm_up(target)
        return _BroadcastSession(drafter, run, self)

    def accept(self, draft: Draft, decide: Callable[[], Acceptance]) -> Acceptance:
        def decide_in_numbers() -> list[int]:
            accepted = decide()
            path_BN = torch.nn.functional.pad(accepted.path_BD, (0, width - accepted.path_BD.shape[1]))
            columns = [accepted.counts_B[:, None], accepted.next_B[:, None], path_BN]
            return torch.cat(columns, 1).flatten().tolist()

        width = draft.trees.width
        told = self.broadcast_from_rank0(decide_in_numbers)
        table = torch.tensor(told, device=draft.trees.device).view(draft.trees.num_rows, 2 + width)
        return Acceptance(path_BD=table[:, 2:], counts_B=table[:, 0], next_B=table[:, 1])

    def cut(self, decide: Callable[[], tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
        def decide_in_numbers() -> list[int]:
            counts, stopped = decide()
            return [*counts, *map(int, stopped)]

        told = self.broadcast_from_rank0(decide_in_numbers)
        num_rows = len(told) // 2
        return told[:num_rows], [bool(stops) for stops in told[num_rows:]]

    def broadcast_from_rank0(self, decide: Callable[[], Sequence[int]]) -> list[int]:
        """What `decide` returns in the first process, in all of them; it is called there only.

        Raises:
            ProcessError: it failed there; in the first process, whatever it raised.
        """
        failure: Exception | None = None
        numbers: Sequence[int] = ()
        if self._is_first:
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


class _BroadcastSession(DraftSession):
    """In the first process the drafter at work, in the others what it says."""

    def __init__(self, drafter: Drafter, run: Run, ranks: TensorParallelRanks):
        self._run = run
        self._ranks = ranks
        self._failure: Exception | None = None
        self._own: DraftSession | None = None
        with self._target_is_out_of_reach():
            ranks.broadcast_from_rank0(lambda: self._start(drafter))

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
            told = self._ranks.broadcast_from_rank0(lambda: self._propose(max_depths, drafts))
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
