"""The decoding loop: propose -> verify -> accept -> commit, until every row has stopped.

A round drafts a tree for each unfinished row, forwards all of them in one pass of the target, keeps the part that
the target agrees with, and commits it with one more token. `docs/structures.md` walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from specdec.acceptance import Acceptance
from specdec.drafters.base import DraftSession, Outcome
from specdec.recording import Recorder
from specdec.sampling import Prefixes, Sampler
from specdec.sequences import Sequences
from specdec.stats import DecodingStats
from specdec.stopping import StopChecker
from specdec.streaming import StreamFeed
from specdec.target import TreeModel
from trees import Draft, TreeBatch


@dataclass(kw_only=True, eq=False)
class DecodingLoop:
    """One `generate()` call at work.

    Args:
        target: verifies; its cache always holds all committed tokens but the last, the root.
        session: drafts.
        sequences: the committed tokens of the unfinished rows.
        context_length: positions that the target has; nothing is drafted past them.
        recorder: takes the rows that stop.
        started: `perf_counter()` when the call began.
    """

    target: TreeModel
    session: DraftSession
    sampler: Sampler
    stop: StopChecker
    sequences: Sequences
    recorder: Recorder
    feed: StreamFeed | None
    context_length: int
    started: float

    def __post_init__(self) -> None:
        self.stats = DecodingStats.for_rows(len(self.sequences))

    def run(self, prefill: Callable[[], Tensor]) -> None:
        """Decode until every row has stopped.

        Args:
            prefill: reads the prompt and returns the logits [B, 1, V] of its last token.
        """
        prefill_started = perf_counter()
        logits_B1V = prefill()
        self.stats.prefill_seconds = perf_counter() - prefill_started
        self.commit(Draft(trees=TreeBatch.empty(len(self.sequences), self.sequences.device)), logits_B1V)
        while len(self.sequences):
            self.round()
        if self.feed is not None:
            self.feed.end()
        self.stats.target_forwards = self.target.num_forwards
        self.stats.draft_forwards = self.session.num_forwards
        self.stats.finish(perf_counter() - self.started)

    def round(self) -> None:
        """One round."""
        started = perf_counter()
        draft = self.propose()
        drafted = perf_counter()
        logits_BTV = self.target.verify(draft.trees, self.sequences.roots_B1)
        self.stats.draft_seconds += drafted - started
        self.stats.verify_seconds += perf_counter() - drafted
        self.commit(draft, logits_BTV)

    def propose(self) -> Draft:
        """A tree for each row, no deeper than tokens can still be committed."""
        lengths, cached = self.sequences.lengths, self.target.cache.lengths
        return self.session.propose([self._max_depth(*row) for row in zip(lengths, cached, strict=True)])

    def commit(self, draft: Draft, logits_BTV: Tensor) -> None:
        """Accept, cut at the stop, and bring everything that follows the sequences up to date."""
        prefixes = Prefixes(self.sequences, draft.trees, range(draft.trees.num_slots))
        scores_BTV = self.sampler.process(logits_BTV, prefixes)
        paths, candidates = _to_host(draft.trees, self.sampler.accept(scores_BTV, draft))
        for row, path in enumerate(paths):
            self.sequences.put(row, candidates[row])
            slots = [0, *(node + 1 for node in path)]
            self.recorder.note(self.sequences.rows[row], slots, scores_BTV[row], logits_BTV[row])
        counts, stopped = self.stop.cut(self.sequences, candidates, self.recorder.scores)
        tokens = [row_tokens[:count] for row_tokens, count in zip(candidates, counts, strict=True)]
        self._commit_cache(paths, counts)
        for row, row_tokens in enumerate(tokens):
            self.sequences.commit(row, row_tokens)
        self._report(draft.trees, paths, tokens, stopped)
        self.session.observe(Outcome(paths=paths, tokens=tokens))
        self._let_go(stopped)

    def _max_depth(self, length: int, cached: int) -> int:
        """Drafted tokens that can be committed (one more always follows them) and have a position."""
        return max(0, min(self.stop.max_length - length, self.context_length - cached) - 1)

    def _commit_cache(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """Keep the root and the accepted nodes; the last committed token becomes the next root."""
        if self.target.cache.tail:
            kept = [[0, *(node + 1 for node in path)][:count] for path, count in zip(paths, counts, strict=True)]
            self.target.commit(kept)

    def _report(
        self,
        trees: TreeBatch,
        paths: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        stopped: Sequence[bool],
    ) -> None:
        """Tell the statistics, the recorder and the streamer what was committed."""
        rows, num_new = self.sequences.rows, self.sequences.num_new
        counts = [len(row_tokens) for row_tokens in tokens]
        if self.stats.num_new_tokens:
            self.stats.note_round(rows, trees.sizes, [len(path) for path in paths], counts)
        self.stats.note_tokens(sum(counts), perf_counter() - self.started)
        for row, row_tokens, finished, count in zip(rows, tokens, stopped, num_new, strict=True):
            self.recorder.trim(row, count)
            if self.feed is not None:
                self.feed.put(row, row_tokens, finished)
        if self.feed is not None:
            self.feed.flush()

    def _let_go(self, stopped: Sequence[bool]) -> None:
        """Rows that have stopped leave every part of the run."""
        if not any(stopped):
            return
        for index, finished in enumerate(stopped):
            if finished:
                row = self.sequences.rows[index]
                self.recorder.finish(row, self.sequences.prefix(index), self.target.cache, index)
        stay = [row for row, finished in enumerate(stopped) if not finished]
        self.sequences.select_rows(stay)
        if stay:
            self.target.select_rows(stay)
            self.session.select_rows(stay)


def _to_host(trees: TreeBatch, acceptance: Acceptance) -> tuple[list[list[int]], list[list[int]]]:
    """Accepted nodes and candidate tokens (theirs, then the next one) of every row, in one copy."""
    path_BD = acceptance.path_BD
    token_BD = trees.tokens_BN.gather(1, path_BD) if trees.width else path_BD
    heads_B2 = torch.stack([acceptance.counts_B, acceptance.next_B], 1)
    depth = path_BD.shape[1]
    paths, candidates = [], []
    for count, next_token, *rest in torch.cat([heads_B2, path_BD, token_BD], 1).tolist():
        paths.append(rest[:count])
        candidates.append([*rest[depth : depth + count], next_token])
    return paths, candidates
