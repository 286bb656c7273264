"""Tokens taken out of distributions one after the other: drawn without replacement, or the likeliest first.

A token is found in two steps, its block of the vocabulary and then its place in the block. After one pass over the
distributions a token costs O(sqrt V), where drawing by noise on every entry (as `torch.multinomial` does) costs O(V)
random numbers.

Shape legend: M slots, N of them, K tokens taken of each, V vocabulary, C blocks, W tokens of a block.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


class Urn:
    """What is left of M distributions.

    Args:
        q_MV: float, non-negative. Tokens that have been taken become 0 in it, until `refill`.
        sample: draw tokens in proportion to what is left; False takes the likeliest.
        generator: source of randomness, None for torch's global one.
    """

    def __init__(self, q_MV: Tensor, *, sample: bool, generator: torch.Generator | None = None):
        self._q_MV = q_MV
        self._sample = sample
        self._generator = generator
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_removed = 0
        vocab_size = q_MV.shape[1]
        width = max(1, isqrt(vocab_size))
        whole = vocab_size - vocab_size % width
        self._offsets_W = torch.arange(width, device=q_MV.device)
        self._blocks_MC = self._weigh(q_MV[:, :whole].unflatten(1, (-1, width)))
        if whole < vocab_size:
            self._blocks_MC = torch.cat([self._blocks_MC, self._weigh(q_MV[:, None, whole:])], 1)

    @property
    def device(self) -> torch.device:
        return self._q_MV.device

    @property
    def promise_M(self) -> Tensor:
        """What is known of the next token of each slot before it is taken.

        A draw is from this mass, what earlier tokens of the slot have left; the likeliest token has this probability.
        """
        self._remove_taken()
        return self._weigh(self._blocks_MC)

    def take(self, slots_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Take the next tokens of some slots: int64 tokens and their q, both [N, K], in order.

        Some of the K tokens are no tokens: they have probability 0. (Several draws may show the same token; those after
        the first do not count. To draw until enough have been seen is to draw without replacement.)
        """
        self._remove_taken()
        ids_NKW, weights_NKW = self._candidates(slots_N, count)
        if self._sample:
            place_NK1 = draw_index(weights_NKW.flatten(0, 1), 1, self._generator).view(*ids_NKW.shape[:2], 1)
            token_NK, prob_NK = (x.gather(2, place_NK1)[:, :, 0] for x in (ids_NKW, weights_NKW))
            prob_NK = prob_NK.masked_fill(_seen_before(token_NK), 0)
        else:
            prob_NK, place_NK = weights_NKW.flatten(1).topk(min(count, weights_NKW[0].numel()))
            token_NK = ids_NKW.flatten(1).gather(1, place_NK)
        self._taken.append((slots_N, token_NK, prob_NK))
        return token_NK, prob_NK

    def refill(self) -> None:
        """Put everything back."""
        for slots_N, token_NK, prob_NK in self._taken[: self._num_removed]:
            self._add(slots_N, token_NK, prob_NK)
        self._taken.clear()
        self._num_removed = 0

    def _candidates(self, slots_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Ids and weights [N, K, W] of the blocks that hold the next tokens."""
        blocks_NC = self._blocks_MC[slots_N]
        if self._sample:
            block_NK = draw_index(blocks_NC, count, self._generator)
        else:
            block_NK = blocks_NC.topk(min(count, blocks_NC.shape[1])).indices
        return self._block(slots_N, block_NK)

    def _block(self, slots_N: Tensor, block_NK: Tensor) -> tuple[Tensor, Tensor]:
        ids_NKW = block_NK[:, :, None] * len(self._offsets_W) + self._offsets_W
        outside_NKW = ids_NKW >= self._q_MV.shape[1]
        ids_NKW = ids_NKW.masked_fill_(outside_NKW, 0)
        weights_NKW = self._q_MV[slots_N[:, None, None], ids_NKW].masked_fill_(outside_NKW, 0)
        return ids_NKW, weights_NKW

    def _remove_taken(self) -> None:
        for slots_N, token_NK, prob_NK in self._taken[self._num_removed :]:
            self._add(slots_N, token_NK, -prob_NK)
            block_NK = token_NK // len(self._offsets_W)
            self._blocks_MC[slots_N[:, None], block_NK] = self._weigh(self._block(slots_N, block_NK)[1])
        self._num_removed = len(self._taken)

    def _add(self, slots_N: Tensor, token_NK: Tensor, amount_NK: Tensor) -> None:
        self._q_MV.index_put_((slots_N[:, None], token_NK), amount_NK, accumulate=True)

    def _weigh(self, weights: Tensor) -> Tensor:
        return weights.sum(-1) if self._sample else weights.amax(-1)


def draw_index(weights_NW: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Independent indices of each row in proportion to its weights: int64 [N, count]."""
    exact = torch.float32 if weights_NW.device.type == "mps" else torch.float64
    cumulative_NW = weights_NW.cumsum(-1, dtype=exact)
    coins_NK = torch.rand((len(weights_NW), count), dtype=exact, generator=generator, device=weights_NW.device)
    points_NK = coins_NK.mul_(cumulative_NW[:, -1:])
    return torch.searchsorted(cumulative_NW, points_NK, right=True).clamp_max_(weights_NW.shape[1] - 1)


def _seen_before(token_NK: Tensor) -> Tensor:
    """bool: whether the row shows the same token earlier."""
    return (token_NK[:, :, None] == token_NK[:, None]).tril(-1).any(-1)
