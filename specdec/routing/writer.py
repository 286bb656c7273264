"""A model that writes steps: the decoding loop, with pauses, on a text that somebody else may go on with.

Two of them make a routed run: the draft's and the target's. Each holds the text on its own (`Sequences`), with a cache
that may lag behind it: what the other one wrote is read in the same forward that needs it, unless both work on one
cache. `sync` takes back what was written in vain. Rows write steps of their own, from where they stand; a forward is of
those that write.

Shape legend: B rows, R rows that write, T slots, V vocabulary, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from routers import Signals
from specdec.acceptance import Accepted, to_host
from specdec.decoding.drafter import Outcome
from specdec.decoding.loop import Committed, DecodingLoop
from specdec.decoding.sampling import Prefixes
from specdec.routing.reading import TextReader, chain_batch
from specdec.routing.stop import StepStop
from specdec.tree_model.model import TreeModel
from trees import Draft

READ_AT_ONCE = 16
"""Tokens of a rejected step that a CPU reads at once: most of it does not agree, and every token is paid for."""


@dataclass(kw_only=True, eq=False)
class StepWriter(DecodingLoop):
    """Writes steps of some rows at a time; otherwise a `DecodingLoop`.

    Args:
        steps: takes the place of `stop`.
        prefill: reads the prompts of the caller's rows of these indices; called when the model is first needed.
        vocab_size: of the distributions that it writes from: the target's.
        widest: tokens of a forward in which several rows write; on CPUs their drafts are cut to that.
        reads_first: whether what the other one has written is read before anything is drafted after it, so that the
            session sees rounds of its own drafts only.
        wants_signals: whether to keep `Signals` of what it writes; with `wants_hidden` hidden states too.
    """

    stop: StepStop
    prefill: Callable[[TreeModel, Sequence[int]], None]
    vocab_size: int
    widest: int
    reads_first: bool = False
    num_requests: ClassVar[int] = 0
    endpoint: ClassVar[None] = None
    wants_signals: bool = False
    wants_hidden: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reader = TextReader(
            target=self.target, sequences=self.sequences, prefill=self.prefill, vocab_size=self.vocab_size
        )
        self._leads: list[int] = []
        self._scored: _ScoredDrafts | None = None
        self._signals: list[list[_TokenSignals | None]] = [[None] * len(row) for row in self.sequences.tokens]
        self._is_own = True
        """Whether the round verifies what the session has drafted."""

        if self.wants_hidden:
            self.target.keep_states({self.target.num_layers})

    @property
    def device(self) -> torch.device:
        """Of the text."""
        return self.sequences.device

    @property
    def num_forwards(self) -> int:
        """Of the model so far."""
        return self.target.num_forwards

    def close(self) -> None:
        """The run is over."""
        self.session.close()

    def share_cache_of(self, owner: StepWriter) -> None:
        """Work on the cache of another writer, whose model has the same layers: neither reads what the other has read.

        A step that is taken back goes from the cache, whoever has written it. To be called before anything is read.
        """
        self._reader.share_cache_of(owner._reader)

    def append_draft_step(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Commit of these drafts what the model would have written, and its own token after that."""
        rest = {row: tokens for row, tokens in drafts.items() if tokens or self._must_read(row)}
        most = READ_AT_ONCE if self.target.device.type == "cpu" else sys.maxsize
        while rest:
            before = {row: len(self.sequences.tokens[row]) for row in rest}
            parts = {row: list(tokens[: min(most, self._room(row))]) for row, tokens in rest.items()}
            self.score_drafts(parts)
            self.commit_scored({})
            rest = {row: self._left_of(tokens, row, before[row]) for row, tokens in rest.items()}
            rest = {row: tokens for row, tokens in rest.items() if tokens and self._room(row)}

    def _left_of(self, tokens: Sequence[int], row: int, start: int) -> Sequence[int]:
        """What of these tokens may still follow in a row, whose own begin at `start`."""
        written = self.sequences.tokens[row][start:]
        agrees = list(tokens[: len(written)]) == written
        return tokens[len(written) :] if agrees and not self.stop.steps[row].is_over else ()

    def write(self, limits: Mapping[int, int]) -> None:
        """Go on with these rows' steps until each is over or has the given number of tokens. Other rows that are
        writing go on as well, as far as these take.

        Args:
            limits: row -> tokens of the step, those that stand there included.
        """
        self.begin(limits)
        while any(self.stop.steps[row].writing for row in limits):
            self.round()

    def begin(self, limits: Mapping[int, int]) -> None:
        """As `write`, round by round: until none of the rows writes, call `round`."""
        for row, limit in limits.items():
            self.stop.go_on(row, len(self.step_tokens(row)), limit)

    def step_tokens(self, row: int) -> list[int]:
        """What stands in a row's step."""
        return self.sequences.tokens[row][self.stop.steps[row].start :]

    def step_signals(self, row: int) -> Signals:
        """Of the step's tokens, all of which this writer must have written."""
        kept = [signal for signal in self._signals[row][self.stop.steps[row].start :] if signal is not None]
        columns = np.array([signal.values for signal in kept], np.float32).reshape(len(kept), 3)
        hidden = kept[-1].hidden if kept else None
        return Signals(log_probs=columns[:, 0], entropies=columns[:, 1], margins=columns[:, 2], hidden=hidden)

    def sync(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Make these the rows' tokens. What they share with those that stand there keeps its place in the cache."""
        assert self._scored is None, "commit or discard what has been scored first"
        appended: list[list[int]] = [[] for _ in self.sequences.rows]
        for row, text in texts.items():
            step, length = self.stop.steps[row], len(self.sequences.tokens[row])
            shared = self._reader.replace(row, text)
            appended[row] = list(text[shared:])
            if shared < length or appended[row]:
                step.is_over = step.is_last = False
                self._signals[row] = [*self._signals[row][:shared], *[None] * len(appended[row])]
        self.session.observe(Outcome(paths=[[]] * len(appended), tokens=appended, is_own=False))

    def begin_steps(self, rows: Iterable[int]) -> None:
        """The next step of these rows begins at their end."""
        for row in rows:
            self.stop.begin_step(row, self.sequences.tokens[row])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.sequences.select_rows(rows)
        self.stop.select_rows(rows)
        self._signals = [self._signals[row] for row in rows]
        self.session.select_rows(rows)
        self.target.states = {}  # of the rows of the last forward, not of all
        self._reader.select_rows(rows)

    def score_drafts(self, chains: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Verify chains and commit none of them: `commit_scored` does, or `discard`. Rows that write wait meanwhile.

        Args:
            chains: row -> tokens that could follow the row's.

        Returns:
            row -> logits [T, V] after its root and each of its tokens.
        """
        assert self._scored is None
        waiting = self.stop.writing
        for row, step in enumerate(self.stop.steps):
            step.writing = row in chains
        draft = Draft(trees=chain_batch([list(chains.get(row, ())) for row in range(len(self.sequences))], self.device))
        logits_RTV = self.verify(draft)
        self._scored = _ScoredDrafts(draft, logits_RTV, waiting)
        return dict(zip(self.stop.writing, logits_RTV, strict=True))

    def commit_scored(
        self, kept: Mapping[int, Sequence[Sequence[int]]], goes_on: Collection[int] = frozenset()
    ) -> None:
        """Commit what was scored.

        Args:
            kept: row -> the steps that its chain begins with, kept as they are. In the other rows the model's own
                tokens stand, as far as the chain agrees with them, and one more.
            goes_on: rows in which the model's own tokens follow the steps that are kept.
        """
        assert self._scored is not None
        draft, logits_RTV, waiting = self._scored
        self._scored = None
        self._is_own = False
        given = {row: sum(map(len, steps)) for row, steps in kept.items() if row in goes_on}
        accepted = self.accept(draft, logits_RTV, given)
        for row, steps in kept.items():
            tokens = [token for step in steps for token in step]
            before = len(tokens) if row in goes_on else len(tokens) - len(steps[-1])
            if before:
                self.stop.begin_step(row, [*self.sequences.tokens[row], *tokens[:before]])
                self.stop.steps[row].writing = True
            if row not in goes_on:
                accepted.candidates[row] = tokens
                accepted.paths[row] = list(range(len(tokens) - 1))
                self._signals[row] = [*self._signals[row][: len(self.sequences.tokens[row])], *[None] * len(tokens)]
        for row in self.stop.writing:
            self.stop.steps[row].limit = sys.maxsize
        self.commit(draft, accepted)
        self._is_own = True
        self._resume(waiting)

    def discard(self) -> None:
        """Forget what was scored."""
        if self._scored is not None:
            waiting, self._scored = self._scored.waiting, None
            self.target.forget_tail()
            self._resume(waiting)

    def verify(self, draft: Draft) -> Tensor:
        """Logits [R, T, V] of the rows that write, after the root and every node, read together with what the cache
        does not hold yet."""
        started = perf_counter()
        rows, reader = self.stop.writing, self._reader
        reader.get_ready(rows)
        leads = {row: reader.unread(row) for row in rows}
        self._leads = [len(leads.get(row, ())) for row in range(len(self.sequences))]
        logits_RTV = reader.forward(
            {row: [*leads[row], reader.root(row), *draft.trees.row(row).tokens] for row in rows}
        )
        if any(self._leads):
            logits_RTV = _from_slot(logits_RTV, [self._leads[row] for row in rows])[:, : draft.trees.num_slots]
        self.stats.verify_seconds += perf_counter() - started
        return logits_RTV

    def accept(self, draft: Draft, logits_RTV: Tensor, given: Mapping[int, int] | None = None) -> Accepted:
        """What the model keeps of the chain of each row that writes, and the token after it; nothing in other rows.

        Args:
            given: row -> number of its chain's first tokens that are kept whatever the model says.
        """
        rows = self.stop.writing
        part, sequences = draft, self.sequences
        if len(rows) < len(sequences):
            part = Draft(trees=chain_batch([draft.trees.row(row).tokens for row in rows], self.device))
            sequences = sequences.row_subset(rows)
        prefixes = Prefixes(sequences, part.trees, range(part.trees.num_slots))
        scores_RTV = self.sampler.process(logits_RTV[:, : part.trees.num_slots], prefixes)
        numbers = [(given or {}).get(row, 0) for row in rows]
        if any(numbers):
            rest = [draft.trees.row(row).tokens[count:] for row, count in zip(rows, numbers, strict=True)]
            part, scores_RTV = Draft(trees=chain_batch(rest, self.device)), _from_slot(scores_RTV, numbers)
        found = to_host(part.trees, self.sampler.accept(scores_RTV[:, : part.trees.num_slots], part))
        accepted = Accepted([[] for _ in self.sequences.rows], [[] for _ in self.sequences.rows])
        for index, row in enumerate(rows):
            count = numbers[index]
            path = [*range(count), *(count + node for node in found.paths[index])]
            tokens = [*draft.trees.row(row).tokens[:count], *found.candidates[index]]
            accepted.paths[row], accepted.candidates[row] = path, tokens
            signals: list[_TokenSignals | None] = [None] * len(tokens)
            if self.wants_signals:
                slots = [0, *(node + 1 for node in path)]
                signals = [*self._signals_of(logits_RTV[index, slots], tokens, row, slots)]
            self._signals[row].extend(signals)
        return accepted

    def _outcome(self, paths: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Outcome:
        return Outcome(paths=paths, tokens=tokens, is_own=self._is_own)

    def _must_read(self, row: int) -> bool:
        reader = self._reader
        return self.reads_first and (not reader.has_read or reader.cached(row) < self.sequences.lengths[row] - 1)

    def _max_depths(self) -> list[int]:
        most, writing = sys.maxsize, self.stop.writing
        if len(writing) > 1 and self.target.device.type == "cpu":
            most = max(0, self.widest // len(writing) - 1)
        return [min(most, self._room(row)) if row in writing else 0 for row in range(len(self.sequences))]

    def _room(self, row: int) -> int:
        """Drafted tokens of a row that can be committed and have a position."""
        return max(0, min(self.stop.max_length - 1, self.context_length) - self.sequences.lengths[row])

    def _commit_cache(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        kept = [
            [*range(lead), *[lead + slot for slot in [0, *(node + 1 for node in path)][:count]]]
            for lead, path, count in zip(self._leads, paths, counts, strict=True)
        ]
        self._reader.keep(kept)

    def _report(self, committed: Committed) -> None:
        trees, paths, tokens, _ = committed
        busy = self.stop.writing
        self.stats.record_round(
            [self.sequences.rows[row] for row in busy],
            [trees.sizes[row] for row in busy],
            [trees.row_depths[row] for row in busy],
            [len(paths[row]) for row in busy],
            [len(tokens[row]) for row in busy],
        )
        for row, signals in enumerate(self._signals):
            del signals[len(self.sequences.tokens[row]) :]

    def _let_go(self, stopped: Sequence[bool]) -> None:
        """Rows that have come to a pause stay."""
        for step, pauses in zip(self.stop.steps, stopped, strict=True):
            step.writing = step.writing and not pauses

    def _resume(self, waiting: Sequence[int]) -> None:
        """Only the rows that have waited write."""
        for row, step in enumerate(self.stop.steps):
            step.writing = row in waiting

    def _signals_of(
        self, logits_TV: Tensor, tokens: Sequence[int], row: int, slots: Sequence[int]
    ) -> list[_TokenSignals]:
        columns = _thoughts(logits_TV.float(), torch.tensor(tokens, device=logits_TV.device)).tolist()
        hidden = [None] * len(tokens)
        if self.wants_hidden:
            states_TC = self.target.states[self.target.num_layers][self.stop.writing.index(row)]
            hidden = list(states_TC[[self._leads[row] + slot for slot in slots]].float().cpu().numpy())
        return [_TokenSignals(tuple(values), state) for values, state in zip(columns, hidden, strict=True)]


class _ScoredDrafts(NamedTuple):
    """Chains that have been verified and not committed; the rows that were writing wait."""

    draft: Draft
    logits_RTV: Tensor
    waiting: Sequence[int]


class _TokenSignals(NamedTuple):
    values: tuple[float, ...]
    hidden: np.ndarray | None


def _thoughts(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Of each token log p, entropy and margin, [T, 3], in one pass of exponentials."""
    best_T1, likeliest_T1 = logits_TV.max(-1, keepdim=True)
    below_TV = (logits_TV - best_T1).clamp_min(-1e4)  # 0 * -inf is no number
    weights_TV = below_TV.exp()
    total_T = weights_TV.sum(-1)
    entropy_T = total_T.log() - (weights_TV * below_TV).sum(-1) / total_T
    log_p_T = below_TV.gather(1, tokens_T.unsqueeze(1))[:, 0] - total_T.log()
    second_T = weights_TV.scatter_(1, likeliest_T1, 0).amax(-1)
    return torch.stack([log_p_T, entropy_T, (1 - second_T) / total_T], 1)


def _from_slot(values_RTV: Tensor, first: Sequence[int]) -> Tensor:
    """Each row from a slot of its own on; the last slot stands for those past the end."""
    first_R1 = torch.tensor(first, device=values_RTV.device).unsqueeze(1)
    slots_RT = (first_R1 + torch.arange(values_RTV.shape[1], device=first_R1.device)).clamp_max(values_RTV.shape[1] - 1)
    return values_RTV[torch.arange(len(first), device=first_R1.device).unsqueeze(1), slots_RT]
