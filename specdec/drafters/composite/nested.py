"""Speculation within speculation: what drafts for the target, such as its int8 copy, decodes speculatively itself.

The copy's chain is the output of a decoding loop of its own, in which another drafter proposes and the copy verifies.
It works on the target's cache: what it commits there while it drafts is taken back before the target verifies. When the
target disagrees, the other drafter's text is taken back too (`DraftSession.rollback`).

Whether the copy goes on is decided by what it has written so far, and every token of it is distributed as the copy's
own given those before, so that is the q of the draft.

Shape legend: B rows, T slots, n tokens of a chain, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.acceptance import to_host
from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.decoding.sampling import Prefixes
from specdec.decoding.sequences import num_shared
from specdec.drafters.model.growing import target_scores
from specdec.tree_model.model import TreeModel
from specdec.tree_model.sparse import SparseModel
from trees import Draft, GainLimitedChain, TokenTree, TreeBatch


@dataclass(slots=True)
class _Line:
    """What the copy has written of a row's draft: tokens, their probabilities and, where it samples, its q of each."""

    tokens: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    q_V: list[Tensor] = field(default_factory=list)


class NestedSession(DraftSession):
    """Drafts chains.

    Args:
        copy: of the target, with keys and values like the target's own.
        cheap: drafts for the copy, and can take back what it has read.
        most: tokens of a chain at which it ends.
        least: tokens up to which the copy goes on in any case.

    Attributes:
        policy: says when to stop, of chains of `least` tokens and more; None stops there.
    """

    policy: GainLimitedChain | None
    grows_trees = True

    def __init__(self, run: Run, copy: TreeModel, cheap: Drafter, *, most: int, least: int):
        assert cheap.supports_rollback
        self.policy = None
        self._run = run
        self._most, self._least = most, least
        self._copy = copy
        self._sequences = run.sequences.copy()
        self._own_run = replace(run, target=self._copy, sequences=self._sequences, tree=None)
        self._cheap = cheap.start(self._own_run)
        self._lines: list[_Line] = []
        self._num_steps = 0

    @property
    def takes_rows(self) -> bool:  # type: ignore[override]
        return self._cheap.takes_rows

    @property
    def num_forwards(self) -> int:
        return self._copy.num_forwards + self._cheap.num_forwards

    @property
    def num_steps(self) -> int:
        """Tokens that have been drafted: a forward brings several."""
        return self._num_steps

    @property
    def control_seconds(self) -> float:
        return self._cheap.control_seconds

    def propose(self, max_depths: Sequence[int]) -> Draft:
        self._lines = [_Line() for _ in max_depths]
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        self._follow()
        start = self._copy.cache.point()
        try:
            limits = [min(depth, self._most) for depth in max_depths]
            while self._goes_on(limits):
                self._round(limits, max_depths)
        finally:
            self._copy.cache.return_to(start)
        draft = self._chains()
        self._num_steps += draft.trees.width
        return draft

    def _follow(self) -> None:
        """See what the target has committed."""
        self._copy.share_cache_with(self._run.target)

    def observe(self, outcome: Outcome) -> None:
        lines, self._lines = self._lines or [_Line() for _ in outcome.tokens], []
        counts = [num_shared(line.tokens, tokens) for line, tokens in zip(lines, outcome.tokens, strict=True)]
        for row, (line, count) in enumerate(zip(lines, counts, strict=True)):
            self._sequences.retract(row, len(line.tokens) - count)
        self._cheap.rollback()
        appended = [tokens[count:] for tokens, count in zip(outcome.tokens, counts, strict=True)]
        for row, tokens in enumerate(appended):
            self._sequences.put(row, tokens)
            self._sequences.commit(row, tokens)
        self._cheap.observe(Outcome(paths=[[]] * len(appended), tokens=appended, is_own=False))

    def select_rows(self, rows: Sequence[int]) -> None:
        self._sequences.select_rows(rows)
        self._cheap.select_rows(rows)

    def join(self) -> None:
        self._sequences.join(self._run.sequences.tokens[-1], self._run.sequences.earlier[-1])
        self._cheap.join()

    def close(self) -> None:
        self._cheap.close()

    def _goes_on(self, limits: Sequence[int]) -> bool:
        pairs = list(zip(self._lines, limits, strict=True))
        unfinished = [line for line, limit in pairs if len(line.tokens) < limit]
        if any(len(line.tokens) < self._least for line in unfinished):
            return True
        return bool(unfinished) and self.policy is not None and self.policy.goes_on([line.probs for line in unfinished])

    def _round(self, limits: Sequence[int], max_depths: Sequence[int]) -> None:
        """A round of the copy's own decoding; rows that have come to their limit wait.

        Args:
            max_depths: of the whole draft. The cheap drafter is told all of the room that there is: it weighs what it
                has to read first against that.
        """
        writes = [len(line.tokens) < limit for line, limit in zip(self._lines, limits, strict=True)]
        rooms = [
            depth - len(line.tokens) - 1 if is_writing else 0
            for line, depth, is_writing in zip(self._lines, max_depths, writes, strict=True)
        ]
        draft = self._cheap.propose(rooms)
        logits_BTV = self._copy.verify(draft.trees, self._sequences.roots_B1)
        prefixes = Prefixes(self._sequences, draft.trees, range(draft.trees.num_slots))
        scores_BTV = target_scores(self._own_run, logits_BTV, prefixes)
        paths, tokens = to_host(draft.trees, self._run.sampler.accept(scores_BTV, draft))
        tokens = [own[: limit - len(line.tokens)] for own, limit, line in zip(tokens, limits, self._lines, strict=True)]
        slots = [[0, *(node + 1 for node in path)][: len(own)] for path, own in zip(paths, tokens, strict=True)]
        self._copy.commit(slots)
        for row, own in enumerate(tokens):
            self._sequences.put(row, own)
            self._sequences.commit(row, own)
            self._note(self._lines[row], own, scores_BTV[row, slots[row]])
        # the newest token has been read by nobody yet, whatever it was
        paths = [path[: max(len(own) - 1, 0)] for path, own in zip(paths, tokens, strict=True)]
        self._cheap.observe(Outcome(paths=paths, tokens=tokens))

    def _note(self, line: _Line, tokens: Sequence[int], scores_nV: Tensor) -> None:
        if not tokens:
            return
        q_nV = scores_nV.softmax(-1)
        chosen_n1 = torch.tensor(tokens, device=q_nV.device).unsqueeze(1)
        line.tokens.extend(tokens)
        line.probs.extend(q_nV.gather(1, chosen_n1)[:, 0].tolist())
        if self._run.sampler.do_sample:
            line.q_V.extend(q_nV)

    def _chains(self) -> Draft:
        """The lines as chains, drawn where the run samples."""
        run = self._run
        trees = TreeBatch.stack([TokenTree.chain(line.tokens, probs=line.probs) for line in self._lines], run.device)
        if not run.sampler.do_sample:
            return Draft(trees=trees)
        q_BTV = torch.zeros((trees.num_rows, trees.num_slots, run.vocab_size), device=run.device)
        for row, line in enumerate(self._lines):
            if line.q_V:
                q_BTV[row, : len(line.q_V)] = torch.stack(line.q_V)
        return Draft(trees=trees, q_BTV=q_BTV)


class NestedSparseSession(NestedSession):
    """The same with a part of the target's past, in a cache of its own; drafts nothing while no row is longer.

    Args:
        budget: slots of that part.
    """

    _copy: SparseModel

    def __init__(self, run: Run, copy: SparseModel, cheap: Drafter, *, most: int, least: int, budget: int):
        super().__init__(run, copy, cheap, most=most, least=least)
        self._budget = budget

    @property
    def attended(self) -> int:
        return self._budget

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(self._run.target.cache.lengths) <= self._budget:
            self._lines = []
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        return super().propose(max_depths)

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self._copy.select_rows(rows)

    def join(self) -> None:
        super().join()
        self._copy.join()

    def _follow(self) -> None:
        self._copy.follow(self._run.target)
