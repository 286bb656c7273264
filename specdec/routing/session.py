"""The draft's writer as a token-level drafter of the target, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdec.decoding.drafter import Drafter, DraftSession, Run
from specdec.routing.writer import StepWriter
from trees import Draft, TokenTree, TreeBatch


class StepDrafter(Drafter):
    """Drafts with the draft's writer, in the run whose steps it writes.

    Args:
        num_tokens: length of a proposal.
    """

    def __init__(self, writer: StepWriter, num_tokens: int):
        self.writer, self.num_tokens = writer, num_tokens
        self.model = writer.target.model
        """By which `Auto` tells what it has learned of one draft from that of another."""

    def start(self, run: Run) -> DraftSession:
        return _WriterSession(run, self.writer, self.num_tokens)


class _WriterSession(DraftSession):
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

    @property
    def num_forwards(self) -> int:
        return self._draft.num_forwards

    def propose(self, max_depths: Sequence[int]) -> Draft:
        limits = {row: min(self._num_tokens, depth) for row, depth in enumerate(max_depths) if depth}
        written = self._written(limits)
        trees = [TokenTree.chain(written.get(row, [])) for row in range(len(max_depths))]
        return Draft(trees=TreeBatch.stack(trees, self._run.device))

    def _written(self, limits: Mapping[int, int]) -> dict[int, list[int]]:
        """What the draft writes next, at most so many tokens of each row; nothing past the end of a step."""
        if not limits:
            return {}
        texts = self._run.sequences.tokens
        self._draft.sync({row: texts[row] for row in limits})
        written = {row: len(self._draft.step_tokens(row)) for row in limits}
        self._draft.write({row: written[row] + limit for row, limit in limits.items()})
        return {row: self._draft.step_tokens(row)[written[row] :] for row in limits}
