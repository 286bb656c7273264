"""Random choices of a verification: coins, and the token after the accepted path."""

from __future__ import annotations

import torch
from torch import Tensor

from trees.token_source import CandidateSampler


def bernoulli(chance: Tensor, generator: torch.Generator | None) -> Tensor:
    """bool, of the same shape: independent coins that show True with these chances."""
    return torch.rand(chance.shape, dtype=chance.dtype, generator=generator, device=chance.device) < chance


def sample(weights_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """int64 [B]: one token of each row, drawn by weights that need not sum to one."""
    sampler = CandidateSampler(weights_BV, sample=True, generator=generator)
    token_B1, _ = sampler.take(torch.arange(len(weights_BV), device=weights_BV.device), 1)
    return token_B1.squeeze(1)


def draw(p_BTV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token from every distribution: int64 [B, T]. With T = 1 the same draw as in `transformers`."""
    p_FV = p_BTV.flatten(0, 1)
    if p_FV.device.type == "cpu":
        return torch.multinomial(p_FV, 1, generator=generator).view(p_BTV.shape[:2])
    # what `torch.multinomial` does, without its two checks, for which the host would wait
    return (p_FV / torch.empty_like(p_FV).exponential_(generator=generator)).argmax(-1).view(p_BTV.shape[:2])


def or_else(left_BV: Tensor, p_BV: Tensor) -> Tensor:
    """Weights, or p where there are none (p == q there, and the refusal was a rounding accident)."""
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)


def none(mask: Tensor) -> bool:
    """Whether nothing is True, where that can be known at once: a GPU would have to be waited for."""
    return mask.device.type == "cpu" and not bool(mask.any())
