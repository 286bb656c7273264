"""Random choices of a verification: coins, and the token after the accepted path."""

from __future__ import annotations

import torch
from torch import Tensor

from trees.randomness import Randomness, Tape, exponential, uniform
from trees.token_source import CandidateSampler


def bernoulli(chance: Tensor, generator: Randomness) -> Tensor:
    """bool, of the same shape: independent coins that show True with these chances."""
    return uniform(chance.shape, chance.dtype, chance.device, generator) < chance


def sample(weights_BV: Tensor, generator: Randomness) -> Tensor:
    """int64 [B]: one token of each row, drawn by weights that need not sum to one."""
    sampler = CandidateSampler(weights_BV, sample=True, generator=generator)
    token_B1, _ = sampler.take(torch.arange(len(weights_BV), device=weights_BV.device), 1)
    return token_B1.squeeze(1)


def draw(p_BTV: Tensor, generator: Randomness = None) -> Tensor:
    """One token from every distribution: int64 [B, T]. With T = 1 the same draw as in `transformers`."""
    p_FV = p_BTV.flatten(0, 1)
    if p_FV.device.type == "cpu" and not isinstance(generator, Tape):
        return torch.multinomial(p_FV, 1, generator=generator).view(p_BTV.shape[:2])
    # what `torch.multinomial` does, without its two checks, for which the host would wait
    return (p_FV / exponential(p_FV, generator)).argmax(-1).view(p_BTV.shape[:2])


def choose(scores_BTV: Tensor, generator: Randomness) -> Tensor:
    """int64 [B, T] a token from the distribution of every slot's scores; -1 where scores make none."""
    usable_BT, p_BTV = scores_BTV.amax(-1).isfinite(), scores_BTV.softmax(-1)
    if not none(~usable_BT):
        p_BTV = p_BTV.nan_to_num(1.0)
    return torch.where(usable_BT, draw(p_BTV, generator), -1)


def or_else(left_BV: Tensor, p_BV: Tensor) -> Tensor:
    """Weights, or p where there are none (p == q there, and the refusal was a rounding accident)."""
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)


def none(mask: Tensor) -> bool:
    """Whether nothing is True, where that can be known at once: a GPU would have to be waited for."""
    return mask.device.type == "cpu" and not bool(mask.any())
