"""A model that writes steps: the decoding loop, with pauses, on a text that somebody else may go on with.

Two of them make a routed run: the draft's and the target's. Each holds the text on its own (`Sequences`), with a cache
that may lag behind it: what the other one wrote is read in the same forward that needs it. `sync` takes back what was
written in vain. Rows that pause take part in a batch's forwards with one token that is dropped again.

Shape legend: B rows, T slots, L lead, V vocabulary, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from routers import Segmenter, Signals
from specdec.acceptance import Accepted
from specdec.drafters.base import Outcome
from specdec.loop import Committed, DecodingLoop
from specdec.sequences import Sequences
from specdec.stopping import Scores, StopChecker
from specdec.target import TreeModel
from trees import Draft, TreeBatch

_LONGEST_LEAD = 256
"""Tokens of all rows that are read together with a draft; before more than that the model catches up, in such parts."""


@dataclass(kw_only=True)
class _RowStep:
    """Where a row stands in its step.

    Args:
        start: number of its tokens before the step, without padding.
        in_fence: whether the step begins inside a code block.
        limit: number of the step's tokens at which to pause.
        is_over: it has come to its end.
        is_last: and the text with it.
        writing: it is being written now.
    """

    start: int
    in_fence: bool = False
    limit: int = 0
    is_over: bool = False
    is_last: bool = False
    writing: bool = False


class StepStop(StopChecker):
    """Stops rows where plain decoding would, and pauses them where their step ends.

    Args:
        lengths: number of each row's tokens, without padding.
    """

    def __init__(self, criteria: StoppingCriteriaList, segmenter: Segmenter, lengths: Sequence[int]):
        super().__init__(criteria)
        self.steps = [_RowStep(start=length) for length in lengths]
        self._segmenter = segmenter

    def begin_steps(self, tokens: Sequence[Sequence[int]]) -> None:
        """Every row's next step begins at its end."""
        self.steps = [
            _RowStep(start=len(row), in_fence=self._segmenter.in_fence_after(row[step.start :], step.in_fence))
            for step, row in zip(self.steps, tokens, strict=True)
        ]

    def ends(self, row: int, written: Sequence[int], new: Sequence[int]) -> bool:
        """Whether a row's step, of which some tokens are written, comes to its end in new ones."""
        return self._end(self.steps[row], written, new) is not None

    def cut(
        self, sequences: Sequences, candidates: Sequence[Sequence[int]], scores_of: Callable[[int], Scores]
    ) -> tuple[list[int], list[bool]]:
        """As `StopChecker.cut`; rows that pause count as stopped, and rows that do not write have no candidates."""
        counts, stopped = super().cut(sequences, candidates, scores_of)
        for row, step in enumerate(self.steps):
            if step.writing:
                written = sequences.tokens[row][step.start :]
                counts[row], stopped[row] = self._cut_step(step, written, candidates[row][: counts[row]], stopped[row])
        return counts, stopped

    def _cut_step(self, step: _RowStep, written: Sequence[int], new: Sequence[int], is_last: bool) -> tuple[int, bool]:
        end = self._end(step, written, new)
        if end is not None and end < len(written) + len(new):
            is_last = False
        count = len(new) if end is None else end - len(written)
        if count > step.limit - len(written):
            return step.limit - len(written), True
        step.is_over, step.is_last = end is not None or is_last, is_last
        return count, step.is_over or count == step.limit - len(written)

    def _end(self, step: _RowStep, written: Sequence[int], new: Sequence[int]) -> int | None:
        return self._segmenter.end([*written, *new], in_fence=step.in_fence, known=len(written))

    def select_rows(self, rows: Sequence[int]) -> None:
        self.steps = [self.steps[row] for row in rows]


@dataclass(kw_only=True, eq=False)
class StepWriter(DecodingLoop):
    """Writes steps of some rows at a time; otherwise a `DecodingLoop`.

    Args:
        steps: takes the place of `stop`.
        prefill: reads the prompts of the caller's rows of these indices; called when the model is first needed.
        vocab_size: of the distributions that it writes from: the target's.
        wants_signals: whether to keep `Signals` of what it writes; with `wants_hidden` hidden states too.
    """

    stop: StepStop
    prefill: Callable[[TreeModel, Sequence[int]], None]
    vocab_size: int
    num_requests: ClassVar[int] = 0
    endpoint: ClassVar[None] = None
    wants_signals: bool = False
    wants_hidden: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._leads: list[int] = []
        self._weighed: tuple[Draft, Tensor] | None = None
        self._suggested: dict[int, list[int]] = {}
        self._signals: list[list[_TokenSignals | None]] = [[None] * len(row) for row in self.sequences.tokens]
        self._has_read = False
        if self.wants_hidden:
            self.target.keep_states({self.target.num_layers})

    @property
    def num_forwards(self) -> int:
        """Of the model so far."""
        return self.target.num_forwards

    def close(self) -> None:
        """The run is over."""
        self.session.close()

    def suggest(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Tokens to verify next in these rows, whatever their number, instead of what the session proposes."""
        self._suggested = {row: list(tokens) for row, tokens in drafts.items() if tokens}

    def write(self, limits: Mapping[int, int]) -> None:
        """Go on with these rows' steps until each is over or has the given number of tokens.

        Args:
            limits: row -> tokens of the step, those that stand there included.
        """
        for row, limit in limits.items():
            step = self.stop.steps[row]
            step.limit = limit
            step.writing = not step.is_over and len(self.step_tokens(row)) < limit
        while any(step.writing for step in self.stop.steps):
            self.round()

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
        assert self._weighed is None, "settle what has been weighed first"
        appended: list[list[int]] = [[] for _ in self.sequences.rows]
        for row, text in texts.items():
            step, length = self.stop.steps[row], len(self.sequences.tokens[row])
            shared = self.sequences.replace(row, text)
            appended[row] = list(text[shared:])
            if shared < length or appended[row]:
                step.is_over = step.is_last = False
                self._signals[row] = [*self._signals[row][:shared], *[None] * len(appended[row])]
        if self._has_read:
            # the last token is never cached: it is the root of the next forward
            lengths = zip(self.sequences.lengths, appended, strict=True)
            self.target.cache.truncate([length - max(1, len(tokens)) for length, tokens in lengths])
        self.session.observe(Outcome(paths=[[]] * len(appended), tokens=appended, is_own=False))

    def begin_steps(self) -> None:
        """Every row's next step begins at its end."""
        self.stop.begin_steps(self.sequences.tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.sequences.select_rows(rows)
        self.stop.select_rows(rows)
        self._signals = [self._signals[row] for row in rows]
        self._suggested = {}
        self.session.select_rows(rows)
        if self._has_read and rows:
            self.target.select_rows(rows)

    def weigh(self, chains: Mapping[int, Sequence[int]]) -> Tensor:
        """Verify chains without committing any of them: `settle` does, or `discard`.

        Args:
            chains: row -> tokens that could follow the row's.

        Returns:
            Logits [B, 1 + longest, V] after each row's root and each of its tokens.
        """
        assert self._weighed is None
        for row in chains:
            self.stop.steps[row].writing = True
        tokens = [list(chains.get(row, ())) for row in range(len(self.sequences))]
        draft = Draft(trees=_chains(tokens, self.sequences.device))
        logits_BTV = self.verify(draft)
        self._weighed = draft, logits_BTV
        return logits_BTV

    def settle(self, kept: Mapping[int, Sequence[int]]) -> None:
        """Commit what was weighed.

        Args:
            kept: row -> the first tokens of its chain, kept as they are. In the other rows the model's own tokens
                stand, as far as the chain agrees with them, and one more.
        """
        assert self._weighed is not None
        draft, logits_BTV = self._weighed
        self._weighed = None
        accepted = self.accept(draft, logits_BTV)
        for row, tokens in kept.items():
            accepted.candidates[row] = list(tokens)
            accepted.paths[row] = list(range(len(tokens) - 1))
            self._signals[row] = [*self._signals[row][: len(self.sequences.tokens[row])], *[None] * len(tokens)]
        for step in self.stop.steps:
            step.limit = sys.maxsize
        self.commit(draft, accepted)
        for step in self.stop.steps:
            step.writing = False

    def discard(self) -> None:
        """Forget what was weighed."""
        if self._weighed is not None:
            self._weighed = None
            self.target.forget_tail()
            for step in self.stop.steps:
                step.writing = False

    def verify(self, draft: Draft) -> Tensor:
        """Logits [B, T, V] after the root and every node, read together with what the cache does not hold yet."""
        started = perf_counter()
        self._read_prompts()
        self._catch_up()
        lead = [self._unread(row) if step.writing else [] for row, step in enumerate(self.stop.steps)]
        self._leads = [len(tokens) for tokens in lead]
        chains = [draft.trees.row(row).tokens for row in range(draft.trees.num_rows)]
        tokens = [[*lead[row], self._root(row), *chain] for row, chain in enumerate(chains)]
        logits_BTV = self._forward(tokens)
        if any(self._leads):
            first_B1 = torch.tensor(self._leads, device=logits_BTV.device).unsqueeze(1)
            slots_BT = (first_B1 + torch.arange(draft.trees.num_slots, device=first_B1.device)).clamp_max(
                logits_BTV.shape[1] - 1
            )
            logits_BTV = logits_BTV[torch.arange(len(tokens), device=first_B1.device).unsqueeze(1), slots_BT]
        self.stats.verify_seconds += perf_counter() - started
        return logits_BTV

    def accept(self, draft: Draft, logits_BTV: Tensor) -> Accepted:
        accepted = super().accept(draft, logits_BTV)
        for row, step in enumerate(self.stop.steps):
            if not step.writing:
                accepted.paths[row].clear()
                accepted.candidates[row].clear()
                continue
            tokens, slots = accepted.candidates[row], [0, *(node + 1 for node in accepted.paths[row])]
            signals: list[_TokenSignals | None] = [None] * len(tokens)
            if self.wants_signals:
                signals = [*self._signals_of(logits_BTV[row, slots], tokens, row, slots)]
            self._signals[row].extend(signals)
        return accepted

    def propose(self) -> Draft:
        """What was suggested, and in the other rows what the session proposes."""
        started, rooms = perf_counter(), self._max_depths()
        suggested = {row: tokens[: rooms[row]] for row, tokens in self._suggested.items()}
        self._suggested = {}
        draft = self.session.propose([0 if row in suggested else room for row, room in enumerate(rooms)])
        assert draft.trees.is_chain, "steps are chains"
        if suggested:
            chains = [suggested.get(row, draft.trees.row(row).tokens) for row in range(len(rooms))]
            draft = Draft(trees=_chains(chains, self.sequences.device))
        self.stats.draft_seconds += perf_counter() - started
        return draft

    def _max_depths(self) -> list[int]:
        return [
            max(0, min(self.stop.max_length - 1, self.context_length) - length) if step.writing else 0
            for length, step in zip(self.sequences.lengths, self.stop.steps, strict=True)
        ]

    def _commit_cache(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        kept = [
            [*range(lead), *[lead + slot for slot in [0, *(node + 1 for node in path)][:count]]]
            for lead, path, count in zip(self._leads, paths, counts, strict=True)
        ]
        self.target.commit(kept)

    def _report(self, committed: Committed) -> None:
        trees, paths, tokens, _ = committed
        busy = [row for row, step in enumerate(self.stop.steps) if step.writing]
        self.stats.note_round(
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

    def _read_prompts(self) -> None:
        if not self._has_read:
            self.prefill(self.target, self.sequences.rows)
            self.target.cache.truncate([length - 1 for length in self.target.cache.lengths])
            self._has_read = True

    def _unread(self, row: int) -> list[int]:
        """Committed tokens that the cache does not hold, without the root."""
        cached = self.target.cache.lengths[row]
        return self.sequences.prefix(row)[cached:-1].tolist()

    def _root(self, row: int) -> int:
        """The last token; of a row that does not write the first one that is not cached: what it says is dropped."""
        place = -1 if self.stop.steps[row].writing else self.target.cache.lengths[row]
        return int(self.sequences.prefix(row)[place])

    def _catch_up(self) -> None:
        """Read what is too long to be read with a draft."""
        while True:
            lead = [self._unread(row) if step.writing else [] for row, step in enumerate(self.stop.steps)]
            part = max(1, _LONGEST_LEAD // len(lead))
            if max(map(len, lead)) <= part:
                return
            tokens = [row[:part] or [self._root(index)] for index, row in enumerate(lead)]
            self._forward(tokens)
            self.target.commit([range(len(row[:part])) for row in lead])

    def _forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, longest, V] after every token, over the target's vocabulary; the tokens become the tail."""
        readable = [[min(token, self.target.vocab_size - 1) for token in row] for row in tokens]
        batch = _chains(readable, self.target.device)
        trees = TreeBatch.chains(batch.tokens_BN[:, 1:], [size - 1 for size in batch.sizes])
        logits_BTV = self.target.verify(trees, batch.tokens_BN[:, :1])
        missing = self.vocab_size - logits_BTV.shape[-1]
        if missing:
            logits_BTV = torch.nn.functional.pad(logits_BTV, (0, missing), value=-torch.inf)
        return logits_BTV.to(self.sequences.device)

    def _signals_of(
        self, logits_TV: Tensor, tokens: Sequence[int], row: int, slots: Sequence[int]
    ) -> list[_TokenSignals]:
        log_p_TV = logits_TV.float().log_softmax(-1)
        p_TV = log_p_TV.exp()
        top_T2 = p_TV.topk(2, -1).values
        chosen_T = log_p_TV.gather(1, torch.tensor(tokens, device=log_p_TV.device).unsqueeze(1))[:, 0]
        entropy_T = torch.special.entr(p_TV).sum(-1)
        columns = torch.stack([chosen_T, entropy_T, top_T2[:, 0] - top_T2[:, 1]], 1).tolist()
        hidden = [None] * len(tokens)
        if self.wants_hidden:
            states_TC = self.target.states[self.target.num_layers][row]
            hidden = list(states_TC[[self._leads[row] + slot for slot in slots]].float().cpu().numpy())
        return [_TokenSignals(tuple(values), state) for values, state in zip(columns, hidden, strict=True)]


@dataclass(frozen=True, slots=True)
class _TokenSignals:
    values: tuple[float, ...]
    hidden: np.ndarray | None


def _chains(rows: Sequence[Sequence[int]], device: torch.device) -> TreeBatch:
    width = max(map(len, rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    tokens_BN = torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)
    return TreeBatch.chains(tokens_BN, [len(row) for row in rows])
