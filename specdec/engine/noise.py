"""Sampling as a greedy problem: the greatest of score + noise is an exact sample.

If G_v are independent standard Gumbel variables, argmax_v(log p_v + G_v) has distribution p (the Gumbel-max trick).
Here the noise of a token at a position is a function of (seed, position, token) alone. So a request's output does not
depend on who shares its batch or on what is drafted, every rule for greedy decoding applies as it is, and a drafter
that looks at its own scores with the same noise tends to draft what the target will take.

The function is SplitMix64 (Steele, Lea and Flood 2014): a counter with a key, whose outputs pass as independent.

Shape legend: K slots, V vocabulary, N tokens that are possible.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_KEPT = 128
"""Vectors of noise over whole vocabularies: drafts of a round, and the target after them, ask for the same ones."""


class GumbelNoise:
    """Adds noise to processed scores; keeps the vectors that were asked for last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int, int, str], Tensor] = OrderedDict()

    def add(self, scores_KV: Tensor, seed: int, positions: Sequence[int]) -> None:
        """Add each slot's noise, in place, to logarithms of probabilities that need not be normalised.

        Args:
            scores_KV: float32; -inf where a token is impossible.
            seed: of the request.
            positions: of the token that each slot's scores are for.
        """
        for scores_V, position in zip(scores_KV, positions, strict=True):
            possible_N = scores_V.isfinite().nonzero()[:, 0]
            scores_V -= scores_V.amax()  # near 0 the sum is rounded least
            if len(possible_N) > len(scores_V) // 4:
                scores_V += self._of_all(seed, position, scores_V)
            else:
                scores_V[possible_N] += gumbel(seed, position, possible_N).to(scores_V.dtype)

    def _of_all(self, seed: int, position: int, scores_V: Tensor) -> Tensor:
        key = (seed, position, len(scores_V), str(scores_V.device))
        if key not in self._kept:
            tokens_V = torch.arange(len(scores_V), device=scores_V.device)
            self._kept[key] = gumbel(seed, position, tokens_V).to(scores_V.dtype)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def gumbel(seed: int, position: int, tokens_N: Tensor) -> Tensor:
    """Standard Gumbel variables, float64 [N], of these int64 tokens."""
    key = _mix(_mix(seed & _MASK) + position * _GAMMA)
    bits_N = tokens_N + 1
    bits_N = bits_N * _signed(_GAMMA) + _signed(key)
    bits_N = (bits_N ^ _shifted(bits_N, 30)) * _signed(_FIRST)
    bits_N = (bits_N ^ _shifted(bits_N, 27)) * _signed(_SECOND)
    bits_N = bits_N ^ _shifted(bits_N, 31)
    uniform_N = (_shifted(bits_N, 11).double() + 0.5) * 2.0**-53
    return -(-uniform_N.log()).log()


def _mix(number: int) -> int:
    """SplitMix64's output function, of a Python integer."""
    number &= _MASK
    number = (number ^ (number >> 30)) * _FIRST & _MASK
    number = (number ^ (number >> 27)) * _SECOND & _MASK
    return number ^ (number >> 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
