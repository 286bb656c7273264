"""Attention of new slots to a cache whose lengths are on the device: committed slots, and the path of each in the tail.

Shape legend: B rows, Q heads of queries, H of keys, W new slots, D head size, S slots of the buffers, K of the tail.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from specdec.cuda.seen import SPLIT_SLOTS, TAIL_SLOTS, Seen


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def can_attend(device: torch.device) -> bool:
    """Whether `tree_attention` is worth calling: on CUDA it needs Triton, as comes with PyTorch on Linux."""
    return device.type != "cuda" or has_triton()


def tree_attention(
    queries_BQWD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, seen: Seen, *, scale: float, num_slots: int
) -> Tensor:
    """Softmax attention, [B, W, Q, D]; scores and sums in float32.

    Nothing but what a new slot sees changes a bit of what it gets, and where that lies: no row or slot beside it, no
    longer buffer, no other bound (as far as products of one shape are the same bits in all their rows).

    Args:
        keys_BHSD, values_BHSD: of all slots; every head is that of Q / H heads of queries, side by side.
        scale: of the scores.
        num_slots: bound of the longest row's slots, `TAIL_SLOTS` of the tail included.
    """
    if queries_BQWD.is_cuda:
        from specdec.cuda import kernels

        return kernels.tree_attention(queries_BQWD, keys_BHSD, values_BHSD, seen, scale=scale, num_slots=num_slots)
    return reference(queries_BQWD, keys_BHSD, values_BHSD, seen, scale=scale, num_slots=num_slots)


def reference(
    queries_BQWD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, seen: Seen, *, scale: float, num_slots: int
) -> Tensor:
    """`tree_attention` by PyTorch's operators, on any device: split by split, as the kernels do."""
    num_rows, num_heads, num_queries, size = queries_BQWD.shape
    num_key_heads = keys_BHSD.shape[1]
    group = num_heads // num_key_heads
    queries = queries_BQWD.float().reshape(num_rows, num_key_heads, group * num_queries, size)
    highest = queries.new_full((*queries.shape[:3], 1), -torch.inf)
    weight, total = torch.zeros_like(highest), torch.zeros_like(queries)
    for first in range(0, min(num_slots, keys_BHSD.shape[2]), SPLIT_SLOTS):
        keys, values = (part[:, :, first : first + SPLIT_SLOTS].float() for part in (keys_BHSD, values_BHSD))
        hidden_BWS = ~_visible(seen, torch.arange(first, first + keys.shape[2], device=keys.device))
        scores = (queries @ keys.transpose(2, 3)) * scale
        scores = scores.masked_fill(hidden_BWS.repeat(1, group, 1).unsqueeze(1), -torch.inf)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        base = new_highest.masked_fill(new_highest == -torch.inf, 0)  # nothing seen yet: no -inf - -inf
        parts, kept = (scores - base).exp(), (highest - base).exp()
        weight = weight * kept + parts.sum(-1, keepdim=True)
        total = total * kept + parts @ values
        highest = new_highest
    attended = (total / weight).view(num_rows, num_heads, num_queries, size)
    return attended.transpose(1, 2).to(queries_BQWD.dtype)


def _visible(seen: Seen, slots_S: Tensor) -> Tensor:
    """bool [B, W, S]"""
    places_B1S = (slots_S - seen.lengths_B.unsqueeze(1)).unsqueeze(1)
    in_tail_BWS = (seen.bits_BW.unsqueeze(2) >> places_B1S.clamp(0, TAIL_SLOTS - 1)) & 1 == 1
    in_tail_BWS = in_tail_BWS & (places_B1S >= 0) & (places_B1S < TAIL_SLOTS)
    return in_tail_BWS | ((places_B1S < 0) & (slots_S >= seen.firsts_BW.unsqueeze(2)))


def seen_bits(seen_BTK: Tensor) -> Tensor:
    """int64 [B, T] of bool [B, T, K], K at most `TAIL_SLOTS`: bit k is what was at k."""
    places_K = torch.arange(seen_BTK.shape[2], device=seen_BTK.device)
    return (seen_BTK.long() << places_K).sum(2)
