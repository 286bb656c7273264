"""The draft's writer as a token-level drafter of the target: a rejected step first, then a few tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdec.drafters.base import DraftSession, Run
from specdec.routing.writer import StepWriter
from trees import Draft, TokenTree, TreeBatch


class WriterSession(DraftSession):
    """Proposes what the draft's writer writes on the target's text.

    The chains are given, not drawn, to the target's verification: it then walks them with its own choice of every
    token. That stays exact where a router has looked at a step before it was rejected, which makes the draft's
    distribution given the rejection another one than q.

    Args:
        num_tokens: length of a proposal.
    """

    def __init__(self, run: Run, draft: StepWriter, num_tokens: int):
        self._run = run
        self._draft = draft
        self._num_tokens = num_tokens
        self._hints: dict[int, list[int]] = {}

    def hint(self, hints: Mapping[int, Sequence[int]]) -> None:
        """Tokens to propose next in these rows, whatever their number."""
        self._hints = {row: list(tokens) for row, tokens in hints.items()}

    def propose(self, max_depths: Sequence[int]) -> Draft:
        chains = [self._hints.pop(row, [])[:depth] for row, depth in enumerate(max_depths)]
        limits = {
            row: min(self._num_tokens, depth)
            for row, (depth, chain) in enumerate(zip(max_depths, chains, strict=True))
            if depth and not chain
        }
        for row, tokens in self._written(limits).items():
            chains[row] = tokens
        trees = TreeBatch.stack([TokenTree.chain(chain) for chain in chains], self._run.device)
        return Draft(trees=trees)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._hints = {}

    def _written(self, limits: Mapping[int, int]) -> dict[int, list[int]]:
        """What the draft writes next, at most so many tokens of each row; nothing past the end of a step."""
        if not limits:
            return {}
        texts = self._run.sequences.tokens
        self._draft.sync({row: texts[row] for row in limits})
        written = {row: len(self._draft.step_tokens(row)) for row in limits}
        self._draft.write({row: written[row] + limit for row, limit in limits.items()})
        return {row: self._draft.step_tokens(row)[written[row] :] for row in limits}
