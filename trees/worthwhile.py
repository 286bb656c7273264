"""Chains that grow while the next token is worth its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trees.chain import ChainGrower
from trees.growth import Draft, Grower, GrowthPolicy, Round
from trees.tree import TokenTree, TreeBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class WorthwhileChain(GrowthPolicy):
    """A chain that stops when the next token is not expected to bring what it costs.

    The next token is drafted if the chance that it will be accepted, summed over the rows of the batch, is at least its
    price. That chance is known before the token is drawn, so sampled chains stay exact: it is the non-anticipating rule
    "take the next one if (A + r v) / T(n + 1) > A / T(n)", with what the time would bring elsewhere for A / T(n). With
    prices of 0 this is `Chain`.

    Args:
        prices: of the second token, the third, ...: the tokens that the run makes otherwise in the time that drafting
            and verifying it takes. The chain has at most one token more than there are prices.
        chance: of acceptance, from a token's draft probability.
        next_chance: of acceptance of a token that is not drawn yet.
    """

    prices: Sequence[float]
    chance: Callable[[float], float]
    next_chance: float

    def start(self, round_: Round) -> Grower:
        return _WorthwhileGrower(round_, self)


class _WorthwhileGrower(ChainGrower):
    def __init__(self, round_: Round, policy: WorthwhileChain):
        super().__init__(round_, len(policy.prices) + 1)
        self._policy = policy
        self._reaches = [1.0] * len(self._sizes)
        self._chains: list[list[int]] = [[] for _ in self._sizes]
        self._probs: list[list[float]] = [[] for _ in self._sizes]

    def _pick(self, scores_BV: Tensor) -> Tensor:
        token_B1 = super()._pick(scores_BV)
        if self._sample:
            prob_B1 = self._q[-1].gather(1, token_B1)
        else:
            prob_B1 = (scores_BV.gather(1, token_B1) - scores_BV.logsumexp(-1, keepdim=True)).exp()
        self._device = token_B1.device
        drafted = len(self._tokens) + 1
        for row, (token, prob) in enumerate(zip(token_B1[:, 0].tolist(), prob_B1[:, 0].tolist(), strict=True)):
            if drafted <= self._sizes[row]:
                self._chains[row].append(token)
                self._probs[row].append(prob)
                self._reaches[row] *= self._policy.chance(prob)
        if drafted <= len(self._policy.prices) and not self._is_worthwhile(drafted):
            self._sizes = [min(size, drafted) for size in self._sizes]
        return token_B1

    def _is_worthwhile(self, drafted: int) -> bool:
        going_on = (reach for reach, size in zip(self._reaches, self._sizes, strict=True) if size > drafted)
        return sum(going_on) * self._policy.next_chance >= self._policy.prices[drafted - 1]

    def finish(self) -> Draft:
        chains = map(TokenTree.chain, self._chains, self._probs)
        return replace(super().finish(), trees=TreeBatch.stack(list(chains), self._device))
