"""Chains that end where the draft is no longer sure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trees.growth import Draft, Grower, GrowthPolicy, Layer, Round
from trees.tree import ROOT, TreeBatch
from trees.urn import Urn


@dataclass(frozen=True)
class ConfidentChain(GrowthPolicy):
    """A chain that ends after a token of low probability (Draft & Verify; DEL, section 3.3).

    The unsure token itself is kept: it costs nothing more. Rows end on their own. Whether a token is drawn depends on
    the tokens before it only, so a sampled chain stays exact.

    Args:
        length: most tokens.
        threshold: the chain ends after a token whose draft probability is lower.

    Raises:
        ValueError: `length` is not a positive integer, or `threshold` no probability.
    """

    length: int
    threshold: float

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"ConfidentChain(length={self.length!r}): length is a positive integer")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"ConfidentChain(threshold={self.threshold!r}): threshold lies between 0 and 1")

    def start(self, round_: Round) -> Grower:
        return _ConfidentGrower(round_, [min(self.length, depth) for depth in round_.max_depths], self.threshold)


class _ConfidentGrower(Grower):
    def __init__(self, round_: Round, limits: list[int], threshold: float):
        self._limits = limits
        self._threshold = threshold
        self._sample = round_.sample
        self._generator = round_.generator
        self._tokens: list[Tensor] = []
        self._q: list[Tensor] = []

    @property
    def hungry(self) -> bool:
        return len(self._tokens) < max(self._limits)

    def grow(self, scores_BMV: Tensor) -> Layer:
        q_BV = scores_BMV[:, 0].softmax(-1)
        if self._sample:
            urn = Urn(q_BV, sample=True, generator=self._generator)
            token_B1, prob_B1 = urn.take(torch.arange(len(q_BV), device=q_BV.device), 1)
            urn.refill()
            self._q.append(q_BV)
        else:
            prob_B1, token_B1 = q_BV.max(-1, keepdim=True)
        parent = ROOT + len(self._tokens)
        self._tokens.append(token_B1)
        for row, prob in enumerate(prob_B1[:, 0].tolist()):
            if prob < self._threshold:
                self._limits[row] = min(self._limits[row], len(self._tokens))
        return Layer(tokens_BM=token_B1, parents_BM=torch.full_like(token_B1, parent))

    def finish(self) -> Draft:
        trees = TreeBatch.chains(torch.cat(self._tokens, 1), self._limits)
        if not self._sample:
            return Draft(trees=trees)
        return Draft(trees=trees, q_BTV=torch.stack([*self._q, torch.zeros_like(self._q[0])], 1))
