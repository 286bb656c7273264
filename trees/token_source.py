"""Tokens taken out of distributions one after the other: drawn without replacement, or the likeliest first.

A token is found in two steps, its block of the vocabulary and then its place in the block. After one pass over the
distributions a token costs O(sqrt V), where drawing by noise on every entry (as `torch.multinomial` does) costs O(V)
random numbers.

Shape legend: M slots, N of them, K tokens taken of each, V vocabulary, C blocks, W tokens of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from trees.blocks import block_width, read_blocks, reduce_blocks
from trees.randomness import Randomness, uniform
from trees.uploads import upload


class TokenSource(ABC):
    """Where the children of a layer's slots come from, given the layer's scores [M, V]."""

    @abstractmethod
    def take(self, slots: Sequence[int], count: int) -> tuple[list[list[int]], list[list[float]]]:
        """Take the next tokens of some slots: token ids and their q, a row of `count` for each slot, in order.

        Tokens of probability 0 are none: the slot has no more. A token that shows again does not count.
        """


class CandidateSampler:
    """What is left of M distributions.

    Args:
        q_MV: float, non-negative. Tokens that have been taken become 0 in it, until `refill`.
        sample: draw tokens in proportion to what is left; False takes the likeliest.
        generator: source of randomness, None for torch's global one.
    """

    def __init__(self, q_MV: Tensor, *, sample: bool, generator: Randomness = None):
        self._q_MV = q_MV
        self._sample = sample
        self._generator = generator
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_removed = 0
        self._width = block_width(q_MV.shape[1])
        self._blocks_MC = reduce_blocks(q_MV, self._weigh)

    @property
    def device(self) -> torch.device:
        return self._q_MV.device

    def take(self, slots_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Take the next tokens of some slots: int64 tokens and their q, both [N, K], in order.

        Tokens of probability 0 are none: the slot has no more. Several draws may show the same token, and those after
        the first do not count: to draw until enough have been seen is to draw without replacement.
        """
        self._remove_taken()
        blocks_NC = self._blocks_MC[slots_N]
        if self._sample:
            block_NK = draw_index(blocks_NC, count, self._generator)
        else:
            block_NK = blocks_NC.topk(min(count, blocks_NC.shape[1])).indices
        first_NK, weights_NKW = self._block(slots_N, block_NK)
        if self._sample:
            place_NK = draw_index(weights_NKW.flatten(0, 1), 1, self._generator).view_as(block_NK)
            token_NK = first_NK + place_NK
            prob_NK = weights_NKW.gather(2, place_NK.unsqueeze(2)).squeeze(2)
        else:
            prob_NK, place_NK = weights_NKW.flatten(1).topk(min(count, weights_NKW[0].numel()))
            token_NK = first_NK.gather(1, place_NK // self._width) + place_NK % self._width
        self._taken.append((slots_N[:, None], token_NK, prob_NK))
        return token_NK, prob_NK

    def refill(self) -> None:
        """Put everything back."""
        for slots_N1, token_NK, prob_NK in reversed(self._taken[: self._num_removed]):
            self._q_MV[slots_N1, token_NK] = prob_NK
        self._taken.clear()
        self._num_removed = 0

    def _block(self, slots_N: Tensor, block_NK: Tensor) -> tuple[Tensor, Tensor]:
        """First tokens [N, K] and weights [N, K, W] of some blocks; tokens of other blocks weigh 0."""
        first_NK, weights_NKW = read_blocks(self._q_MV, slots_N[:, None], block_NK)
        num_foreign = self._blocks_MC.shape[1] * self._width - self._q_MV.shape[1]
        if num_foreign:
            is_whole_NK = block_NK < self._blocks_MC.shape[1] - 1
            weights_NKW[:, :, :num_foreign] *= is_whole_NK.to(weights_NKW.dtype).unsqueeze(2)
        return first_NK, weights_NKW

    def _remove_taken(self) -> None:
        for slots_N1, token_NK, _ in self._taken[self._num_removed :]:
            self._q_MV[slots_N1, token_NK] = 0
            block_NK = token_NK // self._width
            self._blocks_MC[slots_N1, block_NK] = self._weigh(self._block(slots_N1[:, 0], block_NK)[1])
        self._num_removed = len(self._taken)

    def _weigh(self, weights: Tensor) -> Tensor:
        return weights.sum(-1) if self._sample else weights.amax(-1)


class TorchSource(TokenSource):
    """On any device, in any dtype."""

    def __init__(self, scores_MV: Tensor, *, sample: bool, generator: torch.Generator | None):
        self._sampler = CandidateSampler(scores_MV.softmax(-1), sample=sample, generator=generator)

    def take(self, slots: Sequence[int], count: int) -> tuple[list[list[int]], list[list[float]]]:
        tokens_NK, probs_NK = self._sampler.take(upload(slots, self._sampler.device), count)
        # one copy for both: their bits, as float64 holds every float32
        bits_NK = probs_NK.double().view(torch.int64)
        told_2NK = torch.stack([tokens_NK, bits_NK]).cpu()
        return told_2NK[0].tolist(), told_2NK[1].view(torch.float64).tolist()


def draw_index(weights_NW: Tensor, count: int, generator: Randomness) -> Tensor:
    """Independent indices of each row in proportion to its weights: int64 [N, count]."""
    exact = torch.float32 if weights_NW.device.type == "mps" else torch.float64
    cumulative_NW = weights_NW.cumsum(-1, dtype=exact)
    coins_NK = uniform((len(weights_NW), count), exact, weights_NW.device, generator)
    points_NK = coins_NK * cumulative_NW[:, -1:]
    return torch.searchsorted(cumulative_NW, points_NK, right=True).clamp_max_(weights_NW.shape[1] - 1)
