"""Attention of new slots to a cache whose lengths are on the device: committed slots, and the path of each in the tail.

Shape legend: B rows, Q heads of queries, H of keys, W new slots, D head size, S slots of the buffers, K of the tail.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TAIL_SLOTS = 64
"""Bits of an integer: no tail is longer."""


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def can_attend(device: torch.device) -> bool:
    """Whether `tree_attention` is worth calling: on CUDA it needs Triton, as comes with PyTorch on Linux."""
    return device.type != "cuda" or _has_triton()


def tree_attention(
    queries_BQWD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    seen_BW: Tensor,
    *,
    scale: float,
    num_slots: int,
) -> Tensor:
    """Softmax attention, [B, W, Q, D]; scores and sums in float32.

    Args:
        keys_BHSD, values_BHSD: of all slots; every head is that of Q / H heads of queries, side by side.
        starts_B: int64 slots of padding, before the text.
        lengths_B: int64 committed slots, padding included; the tail begins there.
        seen_BW: int64, bit k says that a new slot sees slot k of the tail.
        scale: of the scores.
        num_slots: bound of the longest row's slots, `TAIL_SLOTS` of the tail included.
    """
    if queries_BQWD.is_cuda:
        from specdec.cuda import kernels

        return kernels.tree_attention(
            queries_BQWD, keys_BHSD, values_BHSD, starts_B, lengths_B, seen_BW, scale=scale, num_slots=num_slots
        )
    return reference(
        queries_BQWD, keys_BHSD, values_BHSD, starts_B, lengths_B, seen_BW, scale=scale, num_slots=num_slots
    )


def reference(
    queries_BQWD: Tensor,
    keys_BHSD: Tensor,
    values_BHSD: Tensor,
    starts_B: Tensor,
    lengths_B: Tensor,
    seen_BW: Tensor,
    *,
    scale: float,
    num_slots: int,
) -> Tensor:
    """`tree_attention` by PyTorch's operators, on any device."""
    num_slots = min(num_slots, keys_BHSD.shape[2])
    group = queries_BQWD.shape[1] // keys_BHSD.shape[1]
    keys, values = (
        part[:, :, :num_slots].repeat_interleave(group, 1) if group > 1 else part[:, :, :num_slots]
        for part in (keys_BHSD, values_BHSD)
    )
    slots_S = torch.arange(num_slots, device=keys.device)
    places_BS = slots_S - lengths_B.unsqueeze(1)
    in_tail_BWS = (seen_BW.unsqueeze(2) >> places_BS.clamp(0, TAIL_SLOTS - 1).unsqueeze(1)) & 1 == 1
    in_tail_BWS = in_tail_BWS & (places_BS < TAIL_SLOTS).unsqueeze(1)
    visible_BWS = torch.where((places_BS < 0).unsqueeze(1), True, in_tail_BWS)
    visible_BWS = visible_BWS & (slots_S >= starts_B.unsqueeze(1)).unsqueeze(1)
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries_BQWD, keys, values, attn_mask=visible_BWS.unsqueeze(1), scale=scale
    )
    return attended.transpose(1, 2)


def seen_bits(seen_BTK: Tensor) -> Tensor:
    """int64 [B, T] of bool [B, T, K], K at most `TAIL_SLOTS`: bit k is what was at k."""
    places_K = torch.arange(seen_BTK.shape[2], device=seen_BTK.device)
    return (seen_BTK.long() << places_K).sum(2)
