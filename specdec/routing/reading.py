"""What a writer's model has read of its texts, and how it reads the rest; two writers may share one cache.

Shape legend: R rows that are read, T slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.decoding.sequences import Sequences, num_shared
from specdec.tree_model.model import TreeModel
from trees import TokenTree, TreeBatch

_LONGEST_LEAD = 256
"""Tokens that are read together with a draft; before more than that the model catches up, in such parts."""
_CHEAP_WIDTH = 16
"""A forward of so many tokens may cost little more than one of few. Up to there rows that pause can be read along, with
a token that is dropped again, and the states of those that write need not be copied."""
_SLOTS_OF_A_TOKEN = 192
"""Copying the states of so many slots costs a CPU about as much as a token that is dropped."""


class _Held:
    """Of each row the tokens, padding included, whose states a cache holds."""

    def __init__(self, num_rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.readers: list[list[int]] = []
        """For each text that is read into the cache, by row: how many of these it is known to begin with."""

    def truncate(self, row: int, length: int) -> None:
        del self.tokens[row][length:]
        for known in self.readers:
            known[row] = min(known[row], length)


@dataclass(kw_only=True, eq=False)
class TextReader:
    """Reads the texts of a writer.

    Args:
        target, sequences: the writer's.
        prefill: reads the prompts of the caller's rows of these indices; called when the model is first needed.
        vocab_size: of the logits: the target's, which may be larger than the model's.
    """

    target: TreeModel
    sequences: Sequences
    prefill: Callable[[TreeModel, Sequence[int]], None]
    vocab_size: int
    has_read: bool = field(default=False, init=False)
    _owner: TextReader | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._held = _Held(len(self.sequences))
        self._known = [0] * len(self.sequences)
        self._held.readers.append(self._known)

    def share_cache_of(self, owner: TextReader) -> None:
        """As `StepWriter.share_cache_of`."""
        self._owner, self._held = owner, owner._held
        self._held.readers.append(self._known)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, which those of `sequences` are now."""
        self._known[:] = [self._known[row] for row in rows]
        if self._owner is None:
            self._held.tokens[:] = [self._held.tokens[row] for row in rows]
            if self.has_read and rows:
                self.target.select_rows(rows)

    def replace(self, row: int, text: Sequence[int]) -> int:
        """Make this a row's text; returns how many of the tokens that stand there stay."""
        padding = self.sequences.lengths[row] - len(self.sequences.tokens[row])
        shared = self.sequences.replace(row, text)
        self._known[row] = min(self._known[row], padding + shared)
        return shared

    def cached(self, row: int) -> int:
        """Slots of a row's text that the cache holds. The last token is none of them: it is the root of the next
        forward."""
        text, known = self.sequences.prefix(row), self._known[row]
        self._known[row] = known + num_shared(self._held.tokens[row][known:], text[known:-1].tolist())
        return min(self._known[row], len(text) - 1)

    def unread(self, row: int) -> list[int]:
        """Committed tokens, without the root, that the cache of a row that writes does not hold."""
        cached = self.target.cache.lengths[row]
        return self.sequences.prefix(row)[cached:-1].tolist()

    def root(self, row: int) -> int:
        """The last token; of a row that does not write, whatever it says is dropped."""
        return int(self.sequences.prefix(row)[-1])

    def get_ready(self, rows: Sequence[int]) -> None:
        """Before a forward of these rows: what the cache holds besides their texts is forgotten, and what is too long
        to be read with a draft is read: where several rows write, each row's on its own."""
        self._read_prompts()
        self._take_back(rows)
        longest = _LONGEST_LEAD if len(rows) == 1 else _CHEAP_WIDTH
        for row in rows:
            while len(lead := self.unread(row)) > longest:
                part = lead[:_LONGEST_LEAD]
                self.forward({row: part})
                self.keep([range(len(part) if index == row else 0) for index in range(len(self.sequences))])

    def forward(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits [R, longest, V] after every token of some rows, over the target's vocabulary.

        The tokens become their tail. Hidden states that are kept are of these rows too.
        """
        num_rows, rows, longest = len(self.sequences), list(tokens), max(map(len, tokens.values()))
        if self._is_better_apart(rows, longest):
            with self.target.row_subset(rows, longest):
                logits_RTV = self._read([tokens[row] for row in rows])
        else:
            logits_RTV = self._read([tokens.get(row) or [self.root(row)] for row in range(num_rows)])
            if len(rows) < num_rows:
                logits_RTV = logits_RTV[rows]
                self.target.states = {depth: states[rows] for depth, states in self.target.states.items()}
        missing = self.vocab_size - logits_RTV.shape[-1]
        if missing:
            logits_RTV = torch.nn.functional.pad(logits_RTV, (0, missing), value=-torch.inf)
        return logits_RTV.to(self.sequences.device)

    def _is_better_apart(self, rows: Sequence[int], longest: int) -> bool:
        """Whether to copy the states of rows that write, and not to read the others along."""
        num_rows = len(self.sequences)
        num_dropped = longest * (num_rows - len(rows))
        if not num_dropped or num_rows * longest > _CHEAP_WIDTH:
            return bool(num_dropped)
        num_copied = sum(self.target.cache.lengths[row] for row in rows)
        return self.target.device.type == "cpu" and num_copied < num_dropped * _SLOTS_OF_A_TOKEN

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Commit these slots of each row's tail to the cache."""
        before = self.target.cache.lengths
        self.target.commit(kept)
        for row, (old, new) in enumerate(zip(before, self.target.cache.lengths, strict=True)):
            self._held.tokens[row] += self.sequences.prefix(row, new)[old:].tolist() if new > old else []

    def _read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, longest, V]."""
        readable = [[min(token, self.target.vocab_size - 1) for token in row] for row in rows]
        batch = chain_batch(readable, self.target.device)
        trees = TreeBatch.chains(batch.tokens_BN[:, 1:], [size - 1 for size in batch.sizes])
        return self.target.verify(trees, batch.tokens_BN[:, :1])

    def _read_prompts(self) -> None:
        if self._owner is not None:
            self._owner._read_prompts()
            self.target.share_cache_with(self._owner.target)
        elif not self.has_read:
            self.prefill(self.target, self.sequences.rows)
            self.target.cache.truncate_committed([length - 1 for length in self.target.cache.lengths])
            for row, length in enumerate(self.target.cache.lengths):
                self._held.tokens[row][:] = self.sequences.prefix(row, length).tolist()
        self.has_read = True

    def _take_back(self, rows: Sequence[int]) -> None:
        """Forget what the cache holds besides the texts of these rows."""
        lengths = self.target.cache.lengths
        kept = [self.cached(row) if row in rows else length for row, length in enumerate(lengths)]
        if kept != lengths:
            self.target.cache.truncate_committed(kept)
            for row, length in enumerate(kept):
                self._held.truncate(row, length)


def chain_batch(rows: Sequence[Sequence[int]], device: torch.device) -> TreeBatch:
    """A chain of tokens for each row."""
    return TreeBatch.stack([TokenTree.chain(row) for row in rows], device)
