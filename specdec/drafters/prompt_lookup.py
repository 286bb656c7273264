"""Copy what followed the last time: prompt lookup over a suffix automaton.

Prompt lookup decoding (Saxena 2023) with the matching of SAM-Decoding (Hu et al. 2024, section 3): the longest
suffix of the whole text so far that occurred before, the latest occurrence on ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.errors import UnsupportedOptionError
from trees import Chain, Draft, TokenTree, TreeBatch

_BOUNDARY = -1
"""Stands between the texts of a corpus; equal to no token, so that no match crosses it."""


class PromptLookup(Drafter):
    """Drafts the continuation of the longest repeated suffix; costs no forward.

    Args:
        num_tokens: longest draft.
        min_match: shortest suffix worth copying after. 1 drafts more often and is wrong more often.
        corpus: token ids of further texts to copy from (each a sequence of ids); the row's own text wins ties.

    Raises:
        ValueError: a number is not positive, or a corpus text is not a sequence of token ids.
    """

    def __init__(self, num_tokens: int = 10, min_match: int = 2, corpus: Iterable[Sequence[int]] | None = None):
        for name, value in (("num_tokens", num_tokens), ("min_match", min_match)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PromptLookup({name}={value!r}): {name} is a positive integer")
        self.num_tokens = num_tokens
        self.min_match = min_match
        self.corpus = _corpus_automaton(corpus) if corpus is not None else None

    def start(self, run: Run) -> DraftSession:
        if run.tree is not None and not isinstance(run.tree, Chain):
            raise UnsupportedOptionError(
                f"PromptLookup copies one continuation: tree={run.tree!r} is not possible, trees.Chain(length) is"
            )
        return _LookupSession(self, run)


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


@dataclass
class _RowText:
    """A row's own text, and how much of its end the corpus contains."""

    own: SuffixAutomaton
    corpus_state: int = 0
    corpus_match: int = 0


class _LookupSession(DraftSession):
    def __init__(self, drafter: PromptLookup, run: Run):
        self._drafter = drafter
        self._run = run
        self._num_tokens = run.tree.length if isinstance(run.tree, Chain) else drafter.num_tokens
        self._rows = [_RowText(SuffixAutomaton()) for _ in run.sequences.rows]
        for row, tokens in zip(self._rows, run.sequences.tokens, strict=True):
            self._read(row, tokens)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        chains = [
            TokenTree.chain(self._continuation(row, min(self._num_tokens, max_depth)))
            for row, max_depth in zip(self._rows, max_depths, strict=True)
        ]
        return Draft(trees=TreeBatch.stack(chains, self._run.device))

    def observe(self, outcome: Outcome) -> None:
        for row, tokens in zip(self._rows, outcome.tokens, strict=True):
            self._read(row, tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def _read(self, row: _RowText, tokens: Iterable[int]) -> None:
        corpus = self._drafter.corpus
        for token in tokens:
            row.own.append(token)
            if corpus is not None:
                row.corpus_state, row.corpus_match = corpus.step(row.corpus_state, row.corpus_match, token)

    def _continuation(self, row: _RowText, length: int) -> list[int]:
        match = row.own.longest_match()
        if max(match.length, row.corpus_match) < self._drafter.min_match:
            return []
        corpus = self._drafter.corpus
        if corpus is None or match.length >= row.corpus_match:
            return _copy(row.own.tokens, match.next, length)
        start = corpus.position_after(row.corpus_state)
        text = corpus.tokens[start : start + length]
        return list(takewhile(lambda token: _BOUNDARY < token < self._run.vocab_size, text))


def _copy(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; past the end the repetition goes on with its own period."""
    period = len(tokens) - start
    return [tokens[start + offset % period] for offset in range(length)]
