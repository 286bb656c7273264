"""Chains that end where the draft is no longer sure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trees.chain import ChainGrower
from trees.draft import Draft
from trees.policy import Grower, GrowthPolicy, Round
from trees.tree import TokenTree


@dataclass(frozen=True)
class ConfidentChain(GrowthPolicy):
    """A chain that ends after a token of low probability (Draft & Verify; DEL, section 3.3).

    Of a draft that says how likely its tokens are accepted, that counts in the place of their probabilities. The unsure
    token itself is kept: it costs nothing more. Rows end on their own. Whether a token is drawn depends on
    the tokens before it only, so a sampled chain stays exact.

    Args:
        length: most tokens.
        threshold: the chain ends after a token whose draft probability is lower.

    Raises:
        ValueError: `length` is not a positive integer, or `threshold` is not in [0, 1].
    """

    length: int
    threshold: float

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"ConfidentChain(length={self.length!r}): length is a positive integer")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"ConfidentChain(threshold={self.threshold!r}): threshold lies between 0 and 1")

    def start(self, round_: Round) -> Grower:
        return _ConfidentGrower(round_, self.length, self.threshold)


class _ConfidentGrower(ChainGrower):
    def __init__(self, round_: Round, length: int, threshold: float):
        super().__init__(round_, length)
        self._threshold = threshold
        self._confidence = round_.confidence
        self._probs: list[list[float]] = [[] for _ in self._sizes]

    def _pick(self, scores_BV: Tensor) -> Tensor:
        token_B1 = super()._pick(scores_BV)
        sure_B1 = self._confidence()
        if sure_B1 is None:
            q_BV = self._q[-1] if self._sample else scores_BV.softmax(-1)
            sure_B1 = q_BV.gather(1, token_B1)
        for row, prob in enumerate(sure_B1[:, 0].tolist()):
            self._probs[row].append(prob)
            if prob < self._threshold:
                self._sizes[row] = min(self._sizes[row], len(self._tokens) + 1)
        return token_B1

    def finish(self) -> Draft:
        """The probabilities are on the host, and the trees tell them."""
        draft = super().finish()
        tokens = torch.cat(self._tokens, 1).tolist()
        chains = zip(tokens, self._probs, self._sizes, strict=True)
        rows = tuple(TokenTree.chain(own[:size], probs[:size]) for own, probs, size in chains)
        return replace(draft, trees=replace(draft.trees, rows=rows))
