"""The contract of a drafter.

A `Drafter` is configuration and may serve many runs, also at the same time; `start` makes the `DraftSession` of one
`generate()` call, before any work is done. The loop prefills and tells the session with `observe` the first tokens (a
round without a draft); then each round it calls `propose`, verifies the trees, commits, and tells with `observe` what
became of them. Rows that have finished leave with `select_rows`. Under an engine a session starts without rows, and
they join between rounds.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda import exit_model_of, tree_model_of
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.tree_model.model import TreeModel
from trees import Draft, GrowthPolicy, TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a session knows of the `generate()` call that it serves.

    Args:
        target: the model that verifies, with its cache (`Drafter.make_target`). Most drafters need no more of it than
            its `model`.
        vocab_size: width of the target's distributions; proposed ids lie below it.
        sequences: the committed tokens, kept up to date by the loop. Read, never written, by sessions.
        sampler: the user's processors: q must be taken after them, on each node's own prefix.
        tree: the growth policy that the caller asked for; None leaves the choice to the drafter.
        input_ids: int64 [B, P] the prompt (P is 0 if the caller passed embeddings; B is 0 where rows join later).
        attention_mask: [B, P], None if nothing is masked.
    """

    target: TreeModel
    vocab_size: int
    sequences: Sequences
    sampler: Sampler
    tree: GrowthPolicy | None
    input_ids: Tensor
    attention_mask: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.sequences.device


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a round committed, for each row that took part in it.

    Args:
        paths: accepted nodes of each row's tree, from the root down.
        tokens: committed tokens of each row: the path's, then the bonus or the correction.
        is_own: whether the trees were this session's. They are another's where drafters take turns, and everyone's
            where drafts are merged.
        own: where drafts are merged, the nodes of this session's own trees on each row's path, from the root down
            and in its own numbers.
        verified: where drafts are merged, the trees that were verified.
    """

    paths: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    is_own: bool = True
    own: Sequence[Sequence[int]] | None = None
    verified: TreeBatch | None = None

    @property
    def own_paths(self) -> Sequence[Sequence[int]]:
        """For each row the accepted nodes of this session's own tree, from the root down."""
        if self.own is not None:
            return self.own
        return self.paths if self.is_own else [()] * len(self.paths)

    def as_foreign(self) -> Outcome:
        """What it is to a session that has not drafted the round."""
        return replace(self, is_own=False, own=None, verified=None)


class DraftSession(ABC):
    """A drafter at work on one batch."""

    takes_rows: bool = False
    """Whether rows may join (see `join`)."""

    runs_target: bool = False
    """Whether drafting runs layers of the target ahead: one session of a round can do so."""

    grows_trees: bool = False
    """Whether `policy` shapes the next drafts, and may be replaced between rounds."""
    policy: GrowthPolicy | None = None

    @property
    def num_forwards(self) -> int:
        """Forwards of a draft model so far."""
        return 0

    @property
    def num_steps(self) -> int:
        """Steps of drafting so far, each of which takes about the same time: most often the forwards."""
        return self.num_forwards

    @property
    def control_seconds(self) -> float:
        """Spent on watching candidates that did not draft, so far."""
        return 0.0

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens of all rows that the drafter has to read, besides the newest, before it can draft; padding counts."""
        return 0

    @property
    def draft_model(self) -> PreTrainedModel | None:
        """The model whose forwards draft, if there is one that is not a part of the target."""
        return None

    @property
    def attended(self) -> int | None:
        """Slots of each row that a step attends to, where the whole target drafts on a part of its past."""
        return None

    def explain(self) -> dict[str, Any]:
        """Why the last proposal was made as it was, for the trace: names and numbers."""
        return {}

    @abstractmethod
    def propose(self, max_depths: Sequence[int]) -> Draft:
        """Draft a tree for each row of `run.sequences`.

        Deterministic trees are always lossless. Drawn ones (`Draft.is_drawn`) must come from exactly the q that is
        returned, without replacement among siblings.

        Args:
            max_depths: for each row the depth past which nothing can be committed any more (0: do not draft).
        """

    def observe(self, outcome: Outcome) -> None:
        """Learn what became of the last proposal. `run.sequences` already holds the committed tokens."""

    def rollback(self) -> None:
        """Rows of `run.sequences` may have become shorter: forget what has been read past their ends.

        Sessions of drafters with `Drafter.supports_rollback` are told so where what they took for committed was a draft
        itself.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rollback()")

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order. `run.sequences` has already done so."""

    def join(self) -> None:
        """Take the row that `run.sequences` has just been given at its end.

        Sessions of engines start without rows, and call `join` for each, where `takes_rows` says that they can.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it takes_rows, and has no join()")

    def close(self) -> None:
        """The run is over, also when it ended in an exception."""


class Drafter(ABC):
    """Proposes tokens for the target to verify."""

    prior_acceptance: float = 0.0
    """Share of tokens on which it can be taken to agree with any target, however unsure it is of them: where `Auto`
    begins."""

    supports_rollback: bool = False
    """Whether its sessions can take back what they have read (see `DraftSession.rollback`)."""

    needs_exits: bool = False
    """Whether it, or a drafter that it is made of, runs some of the target's layers: `run.target` is then an
    `EarlyExitModel`."""

    def __repr__(self) -> str:
        """As it is called on a command line: `prompt-lookup`, `auto(small-model)`."""
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()
        parts = ", ".join(map(repr, vars(self).get("drafters", ())))
        return f"{name}({parts})" if parts else name

    def models(self) -> Iterator[PreTrainedModel]:
        """The draft models that it, or the drafters that it is made of, has been given."""
        return iter(())

    def is_warm(self, target: PreTrainedModel) -> bool:
        """Whether `warm_up` has nothing left to do."""
        return True

    def warm_up(self, target: PreTrainedModel) -> None:
        """Make the forwards of the target that a session would make by itself, outside verification.

        All processes that a target is split over come here before the first of them drafts alone: how many forwards
        there are must not depend on time or chance.
        """

    def make_target(self, model: PreTrainedModel) -> TreeModel:
        """The tree model that verifies what this drafter proposes."""
        return exit_model_of(model) if self.needs_exits else tree_model_of(model)

    @abstractmethod
    def start(self, run: Run) -> DraftSession:
        """Begin a run.

        Raises:
            DraftError: the drafter does not fit the target or the call.
        """
