"""Chains: every token follows the one before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trees.draft import Draft
from trees.policy import Grower, GrowthPolicy, Layer, Round
from trees.token_source import CandidateSampler
from trees.tree import ROOT, TreeBatch


@dataclass(frozen=True)
class Chain(GrowthPolicy):
    """A chain of `length` tokens (speculative sampling; Leviathan et al. 2023, Chen et al. 2023).

    Raises:
        ValueError: `length` is not a positive integer.
    """

    length: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"Chain(length={self.length!r}): length is a positive integer")

    def start(self, round_: Round) -> Grower:
        return ChainGrower(round_, self.length)


class ChainGrower(Grower):
    """Grows a chain in each row.

    Args:
        length: most tokens.
    """

    def __init__(self, round_: Round, length: int):
        self._sizes = [min(length, depth) for depth in round_.max_depths]
        self._sample = round_.sample
        self._generator = round_.generator
        self._tokens: list[Tensor] = []
        self._q: list[Tensor] = []

    @property
    def needs_scores(self) -> bool:
        return len(self._tokens) < max(self._sizes)

    def grow(self, scores_BMV: Tensor) -> Layer:
        token_B1 = self._pick(scores_BMV[:, 0])
        parent = ROOT + len(self._tokens)
        self._tokens.append(token_B1)
        return Layer(tokens_BM=token_B1, parents_BM=np.full(token_B1.shape, parent))

    def _pick(self, scores_BV: Tensor) -> Tensor:
        """The next token of every row, [B, 1]."""
        if not self._sample:
            return scores_BV.argmax(-1, keepdim=True)
        self._q.append(scores_BV.softmax(-1))
        sampler = CandidateSampler(self._q[-1], sample=True, generator=self._generator)
        return sampler.take(torch.arange(len(scores_BV), device=scores_BV.device), 1)[0]

    def finish(self) -> Draft:
        trees = TreeBatch.chains(torch.cat(self._tokens, 1), self._sizes)
        if not self._sample:
            return Draft(trees=trees)
        unread = torch.zeros_like(self._q[0])
        return Draft(trees=trees, q_BTV=torch.stack([*self._q, unread], 1))
