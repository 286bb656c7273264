"""Which exit layer drafts the next round, and how far: DEL (arXiv 2504.05598), and tokens per second.

The hidden states of a round tell, for every candidate exit and committed token, whether that exit would have drafted
it (*agreement*) and how sure it was (*confidence*). `ExitStatistics` sums both, an objective turns the sums into an
`ExitChoice`, and `ExitControl` is the two at work in one `generate()` call.

Agreement is 0 or 1 when decoding greedily (the exit's argmax is the target's) and sum_v min(q(v), p(v)) when sampling:
either way the probability that the exit's token would be accepted. Confidence is the exit's largest probability.

Shapes: B rows, E candidate exits, T slots of a round, K thresholds, D draft lengths; S is agreed, disagreed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

THRESHOLDS = np.array([0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9])
"""Where tokens per second may stop a draft. In simulation a finer grid gained nothing, a coarser top lost 1 %."""

_LEAST_SIBLING = 0.02
"""Less likely leaves are not worth the work of the host, whatever a forward says that they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitChoice:
    """What the next round drafts.

    Args:
        exit_layer: number of first layers that draft; None: do not speculate.
        length: most tokens to draft, 0 if none are.
        threshold: draft no more after a token whose own confidence (not a product over the draft) is below this; that
            token is kept. 0 never stops.
        sibling: beside the likeliest token draft others, as leaves, whose path has at least this probability; 1 drafts
            none.
    """

    exit_layer: int | None
    length: int
    threshold: float
    sibling: float = 1.0


PLAIN = ExitChoice(exit_layer=None, length=0, threshold=0.0)


class ExitStatistics:
    """Decayed sums over committed tokens, for each row and candidate exit.

    Attributes:
        counts_SBEK: tokens whose confidence was at least THRESHOLDS[k]. k = 0, all tokens, are DEL's M and N.
        confidence_SBE: sum of confidences, DEL's C+ and C-.
    """

    def __init__(self, candidates: Sequence[int], num_rows: int):
        self.candidates = tuple(candidates)
        self.counts_SBEK = np.zeros((2, num_rows, len(candidates), len(THRESHOLDS)))
        self.confidence_SBE = np.zeros((2, num_rows, len(candidates)))

    def decay(self, factor_B: Array) -> None:
        self.counts_SBEK *= factor_B[:, None, None]
        self.confidence_SBE *= factor_B[:, None]

    def add(
        self,
        agreement_BET: ArrayLike,
        confidence_BET: ArrayLike,
        kept_BT: NDArray[np.bool_],
        exits: Sequence[int] | None = None,
    ) -> None:
        """Count the kept slots of these exit layers, of all candidates if None."""
        kept_B1T = kept_BT[:, None]
        agreement_BET = np.where(kept_B1T, agreement_BET, 0.0)
        confidence_BET = np.where(kept_B1T, confidence_BET, 0.0)
        weights_SBET = np.stack([agreement_BET, kept_B1T - agreement_BET])
        reached_BETK = (confidence_BET[..., None] >= THRESHOLDS).astype(float)
        places = slice(None) if exits is None else [self.candidates.index(layer) for layer in exits]
        self.counts_SBEK[:, :, places] += (weights_SBET[..., None, :] @ reached_BETK)[..., 0, :]
        self.confidence_SBE[:, :, places] += (weights_SBET * confidence_BET).sum(-1)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.counts_SBEK = self.counts_SBEK[:, list(rows)]
        self.confidence_SBE = self.confidence_SBE[:, list(rows)]

    @property
    def acceptance_BE(self) -> Array:
        """Share of tokens that each exit would have drafted; 0 where none were seen."""
        agreed_BE, disagreed_BE = self.counts_SBEK[..., 0]
        return _ratio(agreed_BE, agreed_BE + disagreed_BE)

    @property
    def midpoint_E(self) -> Array:
        """DEL's threshold, of all rows together: halfway between the mean confidences of right and of wrong tokens.

        0, which never stops a draft, where there are none of either: the reference's NaN does the same.
        """
        counts_SE = self.counts_SBEK[..., 0].sum(1)
        means_SE = _ratio(self.confidence_SBE.sum(1), counts_SE)
        return np.where((counts_SE > 0).all(0), means_SE.mean(0), 0.0)


class ExitObjective(Protocol):
    """What an exit is chosen for."""

    def choose(self, statistics: ExitStatistics, previous: ExitChoice | None, max_length: int) -> ExitChoice:
        """Choose for all rows together.

        Args:
            previous: what the round before did, None in the first one.
            max_length: most tokens that may be drafted, at least 1.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensPerLayer:
    """DEL's objective: expected tokens of a round over the layers that it runs.

    With acceptance a, exit layer l and length d these are (1 - a^(d+1)) / (1 - a), summed over the rows, over d l + L.
    Ties go to the lowest layer, then to the shortest length. As in the paper's code the maximum sets the exit only: the
    draft ends at the midpoint threshold or at `max_length`, it is never empty, and the first round is one token from
    the first candidate. The paper's candidates are all layers but the last; `ExitControl`'s defaults are the paper's.

    Args:
        num_layers: L, of the target.
        fixed_length: draft the maximum's own length, without a threshold (the paper's ablation); this one may be 0.
        num_lengths: lengths that are compared: 0 ... num_lengths - 1.
    """

    num_layers: int
    fixed_length: bool = False
    num_lengths: int = 18

    def choose(self, statistics: ExitStatistics, previous: ExitChoice | None, max_length: int) -> ExitChoice:
        if previous is None:
            return ExitChoice(exit_layer=statistics.candidates[0], length=1, threshold=0.0)
        rates_ED = self._rates(statistics)
        place, length = divmod(int(rates_ED.argmax()), self.num_lengths)
        exit_layer = statistics.candidates[place]
        if not self.fixed_length:
            threshold = float(statistics.midpoint_E[place])
            return ExitChoice(exit_layer=exit_layer, length=max_length, threshold=threshold)
        if length == 0:
            return PLAIN
        return ExitChoice(exit_layer=exit_layer, length=min(length, max_length), threshold=0.0)

    def _rates(self, statistics: ExitStatistics) -> Array:
        exit_layers_E1 = np.array(statistics.candidates)[:, None]
        layers_ED = np.arange(self.num_lengths) * exit_layers_E1 + self.num_layers
        acceptance_BE = statistics.acceptance_BE
        tokens_DBE = np.ones((self.num_lengths, *acceptance_BE.shape))
        for shorter_BE, tokens_BE in pairwise(tokens_DBE):
            tokens_BE += acceptance_BE * shorter_BE
        return tokens_DBE.sum(1).T / layers_ED


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCosts:
    """Seconds of a round's parts, for the whole batch.

    Args:
        plain: a round that does not speculate.
        draft: for each candidate exit one drafted token: its layers, the head, the work of the host.
        verify: verify[n] is a forward of all layers over n drafted tokens and the root, n = 0, 1, ... Longer drafts are
            not considered.
        saved: for each candidate exit the share of `verify` that the layers below it take. The draft has run them for
            all tokens but its last.
        shadow: gathering the statistics, on average over the rounds.
    """

    plain: float
    draft: Sequence[float]
    verify: Sequence[float]
    saved: Sequence[float]
    shadow: float = 0.0

    def __post_init__(self) -> None:
        if len(self.draft) != len(self.saved):
            raise ValueError(f"draft and saved are one per exit, but there are {len(self.draft)} and {len(self.saved)}")
        if len(self.verify) < 2:
            raise ValueError("verify needs the cost of the root alone and of at least one drafted token")
        if not (self.plain > 0 and min(self.verify) > 0):
            raise ValueError("plain and verify must be positive")


class TokensPerSecond:
    """Expected tokens of a round over its expected seconds, over exits, lengths and thresholds; or plain decoding.

    A draft goes on past a token of confidence c >= threshold. With s = P(accepted and c >= threshold), r = P(c >=
    threshold) and a = P(accepted), all from the statistics of the exit and equal along the draft, token i is drafted
    with probability r^(i-1) and committed with probability s^(i-1) a. So the choice knows that its own threshold
    shortens the draft, which DEL's does not. In a batch the longest row's draft is what takes time.

    Where there are leaves beside the chain, the token after its end may be one of them.

    Args:
        costs: of the candidates.
        rescue: P(a leaf is accepted where the chain's token is not); 0 where no leaves are drafted.
        num_siblings: leaves for each token of a chain, on average. None are drafted if this is 0.
        margin: after a plain round speculation must promise this much more than plain decoding to begin again.
        prior_acceptance: what is believed of an exit before its first token: one number, or one for each candidate.
        prior_tokens: how many observed tokens that belief is worth, more than 0. Confidences are uniform in it.
    """

    def __init__(
        self,
        costs: ExitCosts,
        *,
        rescue: float = 0.0,
        num_siblings: float = 0.0,
        margin: float = 0.05,
        prior_acceptance: float | Sequence[float] = 0.5,
        prior_tokens: float = 1.0,
    ):
        if not prior_tokens > 0:
            raise ValueError(f"prior_tokens must be more than 0, not {prior_tokens}")
        self.costs = costs
        self._margin = margin
        prior_E1 = np.broadcast_to(prior_acceptance, len(costs.draft))[:, None]
        self._prior_counts_S1EK = prior_tokens * (1 - THRESHOLDS) * np.stack([prior_E1, 1 - prior_E1])[:, None]
        verified_once_E1 = 1 - np.array(costs.saved)[:, None]
        self._fixed_seconds = costs.verify[0] + costs.shadow
        self._token_seconds_ED = np.array(costs.draft)[:, None] + verified_once_E1 * np.diff(costs.verify)
        node_seconds = (costs.verify[-1] - costs.verify[0]) / (len(costs.verify) - 1)
        self._token_seconds_ED = self._token_seconds_ED + num_siblings * node_seconds
        self._rescue = rescue
        self._sibling = max(node_seconds / costs.plain, _LEAST_SIBLING) if num_siblings else 1.0

    def choose(self, statistics: ExitStatistics, previous: ExitChoice | None, max_length: int) -> ExitChoice:
        rates_DEK = self._rates(statistics, max_length)
        best = np.unravel_index(rates_DEK.argmax(), rates_DEK.shape)
        was_plain = previous is not None and previous.exit_layer is None
        plain_rate = statistics.counts_SBEK.shape[1] / self.costs.plain
        if rates_DEK[best] <= plain_rate * (1 + self._margin * was_plain):
            return PLAIN
        shorter, place, step = (int(index) for index in best)
        return ExitChoice(
            exit_layer=statistics.candidates[place],
            length=shorter + 1,
            threshold=float(THRESHOLDS[step]),
            sibling=self._sibling,
        )

    def _rates(self, statistics: ExitStatistics, max_length: int) -> Array:
        """Tokens of all rows per second for drafts of 1, 2, ... tokens."""
        agreed_BEK, disagreed_BEK = statistics.counts_SBEK + self._prior_counts_S1EK
        seen_BEK = agreed_BEK + disagreed_BEK
        token_seconds_DE = self._token_seconds_ED.T[:max_length]
        num_lengths = len(token_seconds_DE)

        chances_2BEK = np.stack([agreed_BEK, seen_BEK]) / seen_BEK[..., :1]
        go_on_accepted_DBEK, go_on_DBEK = _powers(chances_2BEK, num_lengths).swapaxes(0, 1)
        accepted_BE1 = chances_2BEK[0, ..., :1]
        committed_DEK = (go_on_accepted_DBEK * (accepted_BE1 + self._rescue * (1 - accepted_BE1))).sum(1)
        drafting_DEK = 1 - (1 - go_on_DBEK).prod(1)

        num_rows = len(seen_BEK)
        tokens_DEK = num_rows + _running_sum(committed_DEK)
        seconds_DEK = self._fixed_seconds + _running_sum(drafting_DEK * token_seconds_DE[..., None])
        return tokens_DEK / seconds_DEK


class ExitControl:
    """Chooses the exit of every round of one `generate()` call.

    Each round: `choose`, then, when it is committed, `observe`; rounds that do not speculate, too.

    Args:
        candidates: exit layers to choose from, increasing.
        num_rows: rows of the batch. Each has its own statistics, the choice is for all.
        objective: may be replaced between rounds, for instance when costs have changed.
        max_length: most tokens to draft in a round.
        decay: what older statistics still count for after another round.
        decay_per_token: decay with every token that a row commits. DEL decays with every round; then rounds of one
            token leave a short memory, and near break-even its noise starts speculation by chance. 0.99 suits it.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        *,
        num_rows: int,
        objective: ExitObjective,
        max_length: int = 18,
        decay: float = 0.95,
        decay_per_token: bool = False,
    ):
        if not candidates or list(candidates) != sorted(set(candidates)):
            raise ValueError(f"candidates must be increasing exit layers, not {list(candidates)}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {decay}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.objective = objective
        self.statistics = ExitStatistics(candidates, num_rows)
        self.choice: ExitChoice | None = None
        self._max_length = max_length
        self._decay = decay
        self._decay_per_token = decay_per_token
        self._is_first_round = True

    def seed(
        self, agreement_BEP: ArrayLike, confidence_BEP: ArrayLike, mask_BP: NDArray[np.bool_] | None = None
    ) -> None:
        """Learn from prompt positions (DEL: the last 32), before the first round. Nothing is cut at a disagreement.

        They count as a part of the first round: the two are not decayed against each other.

        Args:
            mask_BP: which positions are there; the others may hold anything, NaN included.
        """
        agreement_BEP = np.asarray(agreement_BEP, dtype=float)
        num_rows, _, num_positions = agreement_BEP.shape
        mask_BP = np.ones((num_rows, num_positions), dtype=bool) if mask_BP is None else np.asarray(mask_BP)
        self.statistics.add(agreement_BEP, confidence_BEP, mask_BP)

    def observe(
        self,
        agreement_BET: ArrayLike,
        confidence_BET: ArrayLike,
        counts_B: ArrayLike,
        exits: Sequence[int] | None = None,
    ) -> None:
        """Learn from a round.

        Args:
            counts_B: slots of each row up to and including the first one whose draft was refused; all of them if none
                was. That is what the row committed. Later slots may hold anything, NaN included.
            exits: the exit layers of the arrays' second axis, any subset of the candidates; None: all of them. What is
                known of the others ages all the same.
        """
        counts_B = np.asarray(counts_B)
        if not self._is_first_round:
            age_B = counts_B if self._decay_per_token else np.ones(len(counts_B))
            self.statistics.decay(self._decay**age_B)
        self._is_first_round = False
        kept_BT = np.arange(np.shape(agreement_BET)[-1]) < counts_B[:, None]
        self.statistics.add(agreement_BET, confidence_BET, kept_BT, exits)

    def choose(self, max_length: int | None = None) -> ExitChoice:
        """What the next round drafts.

        Args:
            max_length: most tokens that it could use, if that is less than the control's own `max_length`.
        """
        limit = self._max_length if max_length is None else min(max_length, self._max_length)
        self.choice = self.objective.choose(self.statistics, self.choice, limit) if limit > 0 else PLAIN
        return self.choice

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        self.statistics.select_rows(rows)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _powers(base: Array, count: int) -> Array:
    """base^0, base^1, ... along a new first axis."""
    powers = np.ones((count, *base.shape))
    for lower, power in pairwise(powers):
        np.multiply(lower, base, out=power)
    return powers


def _running_sum(terms: Array) -> Array:
    """`cumsum` along the first axis, as a product: five times faster for a few long rows."""
    return np.tensordot(np.tri(len(terms)), terms, 1)
