"""The decoding loop: propose -> verify -> accept -> commit, until every row has stopped. Rows may join between rounds.

A round drafts a tree for each unfinished row, forwards all of them in one pass of the target, keeps the part that
the target agrees with, and commits it with one more token. `docs/structures.md` walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from specdec.acceptance import Acceptance, Accepted, to_host
from specdec.cuda import functions_of
from specdec.cuda.timing import DeviceSpan
from specdec.decoding.drafter import DraftSession, Outcome
from specdec.decoding.earlier import EarlierTexts
from specdec.decoding.recording import Recorder
from specdec.decoding.sampling import Prefixes, Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stats import DecodingStats
from specdec.decoding.stopping import StopChecker
from specdec.decoding.tensor_parallel import Ranks
from specdec.stages import OneOff
from specdec.streaming import StreamFeed
from specdec.tree_model.cache import RowStates
from specdec.tree_model.model import TreeModel
from trees import Draft, TreeBatch


class Committed(NamedTuple):
    """For each row the accepted nodes of its tree, the tokens that a round has committed, and whether it stops."""

    trees: TreeBatch
    paths: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    stopped: Sequence[bool]


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
        ranks: the processes that the target is split over.
        setup: what the call spends on work that later ones find done.
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
    ranks: Ranks = field(default_factory=Ranks)
    setup: OneOff = field(default_factory=OneOff)

    def __post_init__(self) -> None:
        self.stats = DecodingStats.for_rows(len(self.sequences))
        self._spans: list[tuple[str, DeviceSpan, float]] = []
        """Of the round so far: where in `stats` they count, and what they took on the host."""

    def run(self, prefill: Callable[[], Tensor]) -> None:
        """Decode until every row has stopped.

        Args:
            prefill: reads the prompt and returns the logits [B, 1, V] of its last token.
        """
        prefill_started = perf_counter()
        logits_B1V = prefill()
        self.stats.prefill_seconds = perf_counter() - prefill_started
        nothing = Draft(trees=TreeBatch.empty(len(self.sequences), self.sequences.device))
        self.commit(nothing, self.accept(nothing, logits_B1V))
        while len(self.sequences):
            self.round()
        if self.feed is not None:
            self.feed.end()
        self.stats.target_forwards = self.target.num_forwards
        self.stats.draft_forwards = self.session.num_forwards
        self.stats.control_seconds = self.session.control_seconds
        self.stats.finish(perf_counter() - self.started, self.setup.seconds)

    def round(self) -> None:
        """One round."""
        draft = self.propose()
        logits_BTV = self.verify(draft)
        accepted = self.accept(draft, logits_BTV)
        self.commit(draft, accepted)

    def propose(self) -> Draft:
        """A tree for each row, no deeper than tokens can still be committed."""
        with self._timed("draft_seconds"):
            return self.session.propose(self._max_depths())

    def verify(self, draft: Draft) -> Tensor:
        """Logits [B, T, V] after the root and every node, from one forward of the target."""
        with self._timed("verify_seconds"):
            return self.target.verify(draft.trees, self.sequences.roots_B1, draft.grown_indices)

    def accept(self, draft: Draft, logits_BTV: Tensor) -> Accepted:
        """What the target keeps of each tree, and the token after it."""
        scores_BTV, acceptance = self._judge(draft, logits_BTV)
        accepted = to_host(draft.trees, acceptance)
        if self.target.keeps_bits:
            accepted = accepted.in_chains()
        self._note_times()
        for row, (number, path) in enumerate(zip(self.sequences.rows, accepted.paths, strict=True)):
            if self.recorder.keeps(number):
                slots = [0, *(node + 1 for node in path)]
                self.recorder.record(number, slots, scores_BTV[row], logits_BTV[row])
        return accepted

    def commit(self, draft: Draft, accepted: Accepted) -> None:
        """Cut at the stop, and bring everything that follows the sequences up to date."""
        paths, candidates = accepted.paths, accepted.candidates
        self.sequences.put_all(candidates)
        counts, stopped = self.ranks.cut(lambda: self.stop.cut(self.sequences, candidates, self.recorder.scores))
        tokens = [row_candidates[:count] for row_candidates, count in zip(candidates, counts, strict=True)]
        self._commit_cache(paths, counts)
        for row, row_tokens in enumerate(tokens):
            self.sequences.commit(row, row_tokens)
        self._report(Committed(draft.trees, paths, tokens, stopped))
        self.session.observe(self._outcome(paths, tokens))
        self._let_go(stopped)

    def join(
        self,
        tokens: Sequence[int],
        states: RowStates | None,
        hidden: dict[int, Tensor],
        earlier: EarlierTexts | None = None,
    ) -> int:
        """A row more, between two rounds. Its last token is the root of its first round.

        Args:
            tokens: its prompt, without padding.
            states: of all tokens but the last, copied; None if there is but one token.
            hidden: see `TreeModel.joined_states`.
            earlier: see `Sequences.earlier`.

        Returns:
            Its number in `sequences.rows`.
        """
        number = self.sequences.join(tokens, earlier)
        self.target.join(states, hidden)
        self.session.join()
        return number

    def leave(self, gone: Collection[int]) -> None:
        """Rows of these indices leave every part of the run; the last ones take their places."""
        left = [index for index in range(len(self.sequences)) if index not in gone]
        movers = reversed(left)
        stay = [next(movers) if index in gone else index for index in range(len(left))]
        self.sequences.select_rows(stay)
        self.target.select_rows(stay)
        self.session.select_rows(stay)

    def _judge(self, draft: Draft, logits_BTV: Tensor) -> tuple[Tensor, Acceptance]:
        """The processed scores, if they are kept, and what is accepted: replayed where there are graphs."""
        keeps_scores, graphs = any(map(self.recorder.keeps, self.sequences.rows)), functions_of(self.target)
        rule = None if graphs is None else self.sampler.rule(draft, keeps_scores=keeps_scores)
        if rule is not None and rule.takes_logits:
            scores_BTV = logits_BTV
        else:
            prefixes = Prefixes(self.sequences, draft.trees, range(draft.trees.num_slots))
            scores_BTV = self.sampler.process(logits_BTV, prefixes)
        if graphs is not None and rule is not None:
            return scores_BTV, rule.replay(graphs, draft, scores_BTV, self.sampler.generator)
        return scores_BTV, self.ranks.accept(draft, lambda: self.sampler.accept(scores_BTV, draft))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started, span = perf_counter(), DeviceSpan(self.target.device)
        yield
        span.end()
        self._spans.append((name, span, perf_counter() - started))

    def _note_times(self) -> None:
        """The device has done what was launched."""
        for name, span, seconds in self._spans:
            setattr(self.stats, name, getattr(self.stats, name) + span.seconds(on_host=seconds))
        self._spans.clear()

    def _outcome(self, paths: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Outcome:
        """Of a round, as the session is told."""
        return Outcome(paths=paths, tokens=tokens)

    def _max_depths(self) -> list[int]:
        """Drafted tokens of each row that can be committed (one more always follows them) and have a position."""
        most = self.target.most_drafted
        return [
            max(0, min(limit - length - 1, self.context_length - cached - 1, most))
            for limit, length, cached in zip(
                self.stop.limits(self.sequences), self.sequences.lengths, self.target.cache.lengths, strict=True
            )
        ]

    def _commit_cache(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """Keep the root and the accepted nodes; the last committed token becomes the next root."""
        if self.target.cache.tail:
            kept = [[0, *(node + 1 for node in path)][:count] for path, count in zip(paths, counts, strict=True)]
            self.target.commit(kept)

    def _report(self, committed: Committed) -> None:
        """Tell the statistics, the recorder and the streamer."""
        trees, paths, tokens, stopped = committed
        rows, num_new = self.sequences.rows, self.sequences.num_new
        counts = [len(row_tokens) for row_tokens in tokens]
        if self.stats.num_new_tokens:
            self.stats.record_round(rows, trees.sizes, trees.row_depths, [len(path) for path in paths], counts)
            if reasons := self.session.explain():
                self.stats.trace.append({**reasons, "drafted": trees.sizes, "committed": counts})
        self.stats.record_tokens(sum(counts), perf_counter() - self.started)
        for row, count in zip(rows, num_new, strict=True):
            self.recorder.trim(row, count)
        if self.feed is not None:
            num_accepted = [min(len(path), count) for path, count in zip(paths, counts, strict=True)]
            self.feed.put_round(rows, tokens, num_accepted)
            for row, row_tokens, finished in zip(rows, tokens, stopped, strict=True):
                self.feed.put(row, row_tokens, finished)
            self.feed.flush()

    def _let_go(self, stopped: Sequence[bool]) -> None:
        """Rows that have stopped leave."""
        gone = {index for index, finished in enumerate(stopped) if finished}
        for index in sorted(gone):
            row = self.sequences.rows[index]
            self.recorder.finish(row, self.sequences.prefix(index), self.target.cache, index)
        if gone:
            self.leave(gone)
