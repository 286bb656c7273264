"""Tokens that a request's own processors force are drafted for nothing; another drafter drafts the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.tree_model.model import TreeModel
from trees import Draft, GrowthPolicy, Merged, Merger, TokenTree, TreeBatch

_LEAST = 2
"""Forced tokens for which another draft is passed over; a single one is drafted where there is no other."""


class Forced(Drafter):
    """Drafts what a grammar leaves no choice about, and lets another drafter draft elsewhere. As exact as that one.

    Which tokens are forced is asked of the processors (`Sampler.forced`); they are verified like any others.

    Args:
        drafter: drafts for rows that have a choice.
    """

    def __init__(self, drafter: Drafter):
        self.drafters = (drafter,)
        self.needs_exits = drafter.needs_exits

    def models(self) -> Iterator[PreTrainedModel]:
        return self.drafters[0].models()

    def is_warm(self, target: PreTrainedModel) -> bool:
        return self.drafters[0].is_warm(target)

    def warm_up(self, target: PreTrainedModel) -> None:
        self.drafters[0].warm_up(target)

    def make_target(self, model: PreTrainedModel) -> TreeModel:
        return self.drafters[0].make_target(model)

    def start(self, run: Run) -> DraftSession:
        return _ForcedSession(run, self.drafters[0].start(run))


class _ForcedSession(DraftSession):
    def __init__(self, run: Run, session: DraftSession):
        self._run = run
        self._session = session
        self._merged: Merged | None = None
        self.takes_rows = session.takes_rows
        self.runs_target = session.runs_target
        self.grows_trees = session.grows_trees

    @property
    def policy(self) -> GrowthPolicy | None:
        return self._session.policy

    @policy.setter
    def policy(self, policy: GrowthPolicy | None) -> None:
        self._session.policy = policy

    @property
    def num_forwards(self) -> int:
        return self._session.num_forwards

    @property
    def num_steps(self) -> int:
        return self._session.num_steps

    @property
    def control_seconds(self) -> float:
        return self._session.control_seconds

    @property
    def num_uncached_tokens(self) -> int:
        return self._session.num_uncached_tokens

    @property
    def draft_model(self) -> PreTrainedModel | None:
        return self._session.draft_model

    def explain(self) -> dict[str, Any]:
        return self._session.explain()

    def propose(self, max_depths: Sequence[int]) -> Draft:
        forced = [self._forced(row, depth) for row, depth in enumerate(max_depths)]
        self._merged = None
        if not any(forced):
            return self._session.propose(max_depths)
        is_left = [len(tokens) < _LEAST for tokens in forced]
        own = self._session.propose([depth if left else 0 for depth, left in zip(max_depths, is_left, strict=True)])
        chains = [[] if size else tokens for tokens, size in zip(forced, own.trees.sizes, strict=True)]
        merger = Merger(len(forced))
        merger.add(own)
        merger.add(Draft(trees=TreeBatch.stack([TokenTree.chain(chain) for chain in chains], self._run.device)))
        self._merged = merger.finish(0 if self.runs_target else None)
        return self._merged.draft

    def _forced(self, row: int, most: int) -> list[int]:
        tokens = self._run.sampler.forced(row, self._run.sequences)[:most] if most else []
        within = [token < self._run.vocab_size for token in tokens]
        return tokens if all(within) else tokens[: within.index(False)]

    def observe(self, outcome: Outcome) -> None:
        merged, self._merged = self._merged, None
        if merged is None or not (outcome.is_own or outcome.own is not None):
            self._session.observe(outcome)
        elif not any(map(len, merged.nodes[0])):
            self._session.observe(outcome.as_foreign())
        else:
            own, verified = merged.own_paths(0, outcome.own_paths), merged.draft.trees
            self._session.observe(replace(outcome, is_own=False, own=own, verified=verified))

    def rollback(self) -> None:
        self._session.rollback()

    def select_rows(self, rows: Sequence[int]) -> None:
        self._session.select_rows(rows)

    def join(self) -> None:
        self._session.join()

    def close(self) -> None:
        self._session.close()
