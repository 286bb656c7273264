"""Copy what followed before: prompt lookup over a suffix automaton.

Prompt lookup decoding (Saxena 2023) with the matching of SAM-Decoding (Hu et al. 2024, section 3): the longest
suffix of the whole text so far that occurred before. It may have occurred more than once. A text that repeats itself
is best copied from the latest position, an edit or an extract of the prompt from the earliest: a chain copies from that
one of the two which has predicted more of the row's text lately. A tree holds several continuations, of that suffix and
of shorter ones; `continuations.py` says which.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.decoding.earlier import EarlierTexts
from specdec.decoding.sequences import num_shared
from specdec.drafters.lookup.continuations import Source, likeliest_paths
from specdec.drafters.lookup.suffix_automaton import NOWHERE, Context, SuffixAutomaton
from specdec.errors import UnsupportedOptionError
from trees import Chain, Draft, DySpec, TokenTree, TreeBatch

_DECAY = 0.8
"""Of what the two positions have predicted, from round to round."""

_BOUNDARY = -1
"""Stands between the texts of a corpus; equal to no token, so that no match crosses it."""


class PromptLookup(Drafter):
    """Drafts the continuation of the longest repeated suffix; costs no forward.

    The longer the suffix, the surer its continuation: short ones are followed by short chains.

    A call may name a tree: `trees.Chain(length)` sets the length, `trees.DySpec(budget)` drafts the `budget` likeliest
    continuations (`max_depth` and `shared` are honoured). Other policies choose among the tokens of a draft model and
    are refused.

    Args:
        num_tokens: most tokens of the chain that it drafts, unless the call names a tree.
        min_match: shortest suffix worth copying after. 1 drafts more often and is wrong more often.
        corpus: token ids of further texts to copy from (each a sequence of ids); the row's own text wins ties. Rows
            with earlier texts of their own kind (`engine.Request.kind`) have those in its place.
        tokens_per_match: most tokens of the chain for each token of the suffix; None for no such limit.

    Raises:
        ValueError: a number is not positive, or a corpus text is not a sequence of token ids.
    """

    supports_rollback = True

    def __init__(
        self,
        num_tokens: int = 20,
        min_match: int = 1,
        corpus: Iterable[Sequence[int]] | None = None,
        tokens_per_match: int | None = 5,
    ):
        numbers = {"num_tokens": num_tokens, "min_match": min_match}
        if tokens_per_match is not None:
            numbers["tokens_per_match"] = tokens_per_match
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PromptLookup({name}={value!r}): {name} is a positive integer")
        self.num_tokens = num_tokens
        self.min_match = min_match
        self.tokens_per_match = tokens_per_match
        self.corpus = _corpus_automaton(corpus) if corpus is not None else None

    def start(self, run: Run) -> LookupSession:
        policy = Chain(self.num_tokens) if run.tree is None else run.tree
        if isinstance(policy, Chain):
            return ChainSession(self, run, policy)
        if isinstance(policy, DySpec):
            return _TreeSession(self, run, policy)
        raise UnsupportedOptionError(
            f"PromptLookup has no draft model to grow tree={policy!r}: pass trees.Chain(length) or "
            "trees.DySpec(budget), or draft with specdec.drafters.SmallModel(model)"
        )


def _corpus_automaton(corpus: Iterable[Sequence[int]]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for text in corpus:
        if isinstance(text, str) or not all(isinstance(token, int) and token >= 0 for token in text):
            raise ValueError(
                "PromptLookup(corpus=...): each text is a sequence of token ids, for example tokenizer(text).input_ids"
            )
        for token in (*text, _BOUNDARY):
            automaton.append(token)
    return automaton


class _EarlierCorpus:
    """An automaton of earlier texts, brought up to date when a row joins."""

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()
        self._num_read = self._num_forgotten = 0

    def update(self, earlier: EarlierTexts) -> SuffixAutomaton:
        if earlier.num_forgotten != self._num_forgotten:  # rows that have the old one keep it
            self._automaton, self._num_read, self._num_forgotten = SuffixAutomaton(), 0, earlier.num_forgotten
        for text in earlier.texts[self._num_read :]:
            for token in (*text, _BOUNDARY):
                self._automaton.append(token)
        self._num_read = len(earlier.texts)
        return self._automaton


class Proposal(NamedTuple):
    """A chain that may be drafted: its tokens, and how sure each of them is if those before it are right."""

    tokens: list[int]
    probs: tuple[float, ...]


_NOTHING = Proposal([], ())


@dataclass
class _RowText:
    """A row's own text, and how much of its end the corpus contains.

    Args:
        corpus: earlier texts; it may grow: what was found in it stays found.
        lead: how many tokens more the latest position of a suffix has predicted than its earliest, decayed.
        unread: committed tokens that wait until the row is to draft: several at once take little more than one.
    """

    own: SuffixAutomaton
    corpus: SuffixAutomaton | None = None
    in_corpus: Context = NOWHERE
    lead: float = 0.0
    unread: list[int] = field(default_factory=list)

    @property
    def positions(self) -> tuple[int, int]:
        """Where the token after the longest repeated suffix stands: latest and earliest."""
        return self.own.longest_match().next, self.own.first_position_after(self.own.known_suffix().state)

    def judge(self, tokens: Sequence[int]) -> None:
        """Compare what the two positions have predicted with the tokens that are next."""
        latest, earliest = self.positions
        if latest != earliest:
            lead = self._num_predicted(latest, tokens) - self._num_predicted(earliest, tokens)
            self.lead = _DECAY * self.lead + lead

    def _num_predicted(self, position: int, tokens: Sequence[int]) -> int:
        return num_shared(_copy(self.own.tokens, position, len(tokens)), tokens)


class LookupSession(DraftSession):
    takes_rows = True

    def __init__(self, drafter: PromptLookup, run: Run):
        self._drafter = drafter
        self._run = run
        self._rows: list[_RowText] = []
        self._corpora: WeakKeyDictionary[EarlierTexts, _EarlierCorpus] = WeakKeyDictionary()
        for index in range(len(run.sequences)):
            self._add(index)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        return Draft(trees=TreeBatch.stack(self.trees(max_depths), self._run.device))

    @abstractmethod
    def trees(self, max_depths: Sequence[int]) -> list[TokenTree]:
        """What `propose` proposes, on the host: a tree for each row."""

    def observe(self, outcome: Outcome) -> None:
        for row, tokens in zip(self._rows, outcome.tokens, strict=True):
            row.unread += tokens

    def select_rows(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def join(self) -> None:
        self._add(-1)

    def rollback(self) -> None:
        """What was taken back stays a text to copy from, as one that has been written once."""

    def _add(self, index: int) -> None:
        earlier, corpus = self._run.sequences.earlier[index], self._drafter.corpus
        if earlier is not None:
            corpus = self._corpora.setdefault(earlier, _EarlierCorpus()).update(earlier)
        self._rows.append(_RowText(SuffixAutomaton(), corpus))
        self._read(self._rows[-1], self._run.sequences.tokens[index])

    def _catch_up(self, row: _RowText) -> None:
        self._read(row, row.unread)
        row.unread.clear()

    def _read(self, row: _RowText, tokens: Iterable[int]) -> None:
        for token in tokens:
            row.own.append(token)
            if row.corpus is not None:
                row.in_corpus = row.corpus.step(row.in_corpus, token)

    def _longest_suffix(self, row: _RowText) -> tuple[SuffixAutomaton, Context]:
        """The longest suffix that is known, and the text that knows it."""
        own = row.own.known_suffix()
        if row.corpus is None or own.length >= row.in_corpus.length:
            return row.own, own
        return row.corpus, row.in_corpus


class ChainSession(LookupSession):
    """Copies what followed the longest suffix."""

    def __init__(self, drafter: PromptLookup, run: Run, policy: Chain):
        super().__init__(drafter, run)
        self._policy = policy

    def trees(self, max_depths: Sequence[int]) -> list[TokenTree]:
        return [TokenTree.chain(proposal.tokens, probs=proposal.probs) for proposal in self.proposals(max_depths)]

    def proposals(self, max_depths: Sequence[int]) -> list[Proposal]:
        """What `trees` makes trees of."""
        lengths = (min(self._policy.length, depth) for depth in max_depths)
        return [self._continuation(*row) for row in zip(self._rows, lengths, strict=True)]

    def _catch_up(self, row: _RowText) -> None:
        row.judge(row.unread)
        super()._catch_up(row)

    def _continuation(self, row: _RowText, length: int) -> Proposal:
        if not length:
            return _NOTHING
        self._catch_up(row)
        text, suffix = self._longest_suffix(row)
        if suffix.length < self._drafter.min_match:
            return _NOTHING
        if self._drafter.tokens_per_match is not None:
            length = min(length, self._drafter.tokens_per_match * suffix.length)
        if text is row.own:
            copied = _copy(text.tokens, row.positions[row.lead < 0], length)
        else:
            start = text.position_after(suffix.state)
            known = text.tokens[start : start + length]
            copied = list(takewhile(lambda token: _BOUNDARY < token < self._run.vocab_size, known))
        return Proposal(copied, _confidences(suffix.length, len(copied)))


class _TreeSession(LookupSession):
    """Takes the likeliest continuations."""

    def __init__(self, drafter: PromptLookup, run: Run, policy: DySpec):
        super().__init__(drafter, run)
        self._policy = policy

    def trees(self, max_depths: Sequence[int]) -> list[TokenTree]:
        policy = self._policy
        if policy.max_depth is not None:
            max_depths = [min(depth, policy.max_depth) for depth in max_depths]
        for row in self._rows:
            self._catch_up(row)
        sources = [
            Source(*self._longest_suffix(row), max_depth=depth)
            for row, depth in zip(self._rows, max_depths, strict=True)
        ]
        if policy.shared:
            return self._likeliest(sources, policy.budget * sum(depth > 0 for depth in max_depths))
        return [tree for source in sources for tree in self._likeliest([source], policy.budget)]

    def _likeliest(self, sources: Sequence[Source], budget: int) -> list[TokenTree]:
        return likeliest_paths(
            sources, budget=budget, shortest=self._drafter.min_match, vocab_size=self._run.vocab_size
        )


def _copy(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; past the end the repetition goes on with its own period."""
    period = len(tokens) - start
    if period >= length:
        return list(tokens[start : start + length])
    return [tokens[start + offset % period] for offset in range(length)]


@lru_cache(1024)
def _confidences(num_agreed: int, length: int) -> tuple[float, ...]:
    """Of tokens after so many that have agreed. A guess, not a frequency: the more they are, the surer is the next."""
    counts = range(num_agreed, num_agreed + length)
    return tuple(count**2 / (count**2 + 4) for count in counts)
