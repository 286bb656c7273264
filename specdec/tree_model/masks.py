"""Which cache slots a forward's tokens see: the committed ones that are no padding, and their path in the tail.

Shape legend: B rows, P prompt, S slots, T new slots, K tail slots (old and new).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.trees import masks


def visible_slots(seen_BTK: Tensor, lengths: Sequence[int], prompt_BP: Tensor | None) -> Tensor:
    """bool [B, T, S] with S = the longest row's slots and the tail.

    Args:
        seen_BTK: bool, which tail slots each new token sees.
        lengths: committed slots of each row; its tail begins there.
        prompt_BP: bool, False where a prompt slot is padding; None if none is.
    """
    if masks.can_write(seen_BTK):
        return masks.write(seen_BTK, lengths, prompt_BP)
    num_rows, num_new, num_tail = seen_BTK.shape
    num_slots = max(lengths) + num_tail
    if min(lengths) == max(lengths):
        visible_BTS = torch.nn.functional.pad(seen_BTK, (lengths[0], 0), value=True)
    else:
        tail_BS = _tail_index(lengths, num_slots, seen_BTK.device)
        index_BTS = tail_BS.clamp(0, num_tail - 1)[:, None].expand(num_rows, num_new, num_slots)
        in_tail_BTS = seen_BTK.gather(2, index_BTS) & (tail_BS < num_tail)[:, None]
        visible_BTS = torch.where((tail_BS < 0)[:, None], True, in_tail_BTS)
    if prompt_BP is not None:
        visible_BTS[:, :, : prompt_BP.shape[1]] &= prompt_BP[:, None, :num_slots]
    return visible_BTS


def within_window(window: int, offsets_BT: Tensor, offsets_BK: Tensor, lengths: Sequence[int]) -> Tensor:
    """bool [B, T, S]: slots fewer than `window` positions behind each new token.

    Args:
        offsets_BT: distance of each new token from its row's first uncommitted position.
        offsets_BK: the same for every slot of the tail.
    """
    return offsets_BT[:, :, None] - _slot_offsets(offsets_BK, lengths)[:, None] < window


def within_chunk(
    size: int, offsets_BT: Tensor, offsets_BK: Tensor, lengths: Sequence[int], prompt_BP: Tensor | None
) -> Tensor:
    """bool [B, T, S]: slots of the chunk of `size` positions that each new token is in; padding has no position.

    Args: as of `within_window` and `visible_slots`.
    """
    starts_B = torch.tensor(lengths, device=offsets_BT.device)
    if prompt_BP is not None:
        starts_B = starts_B - (~prompt_BP).sum(1)
    chunks_BT, chunks_BS = (
        (starts_B[:, None] + offsets).div(size, rounding_mode="floor")
        for offsets in (offsets_BT, _slot_offsets(offsets_BK, lengths))
    )
    return chunks_BT[:, :, None] == chunks_BS[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a bias: 0 where visible, the lowest finite number elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _slot_offsets(offsets_BK: Tensor, lengths: Sequence[int]) -> Tensor:
    """int64 [B, S]: distance of each slot from its row's first uncommitted position."""
    num_tail = offsets_BK.shape[1]
    tail_BS = _tail_index(lengths, max(lengths) + num_tail, offsets_BK.device)
    return torch.where(tail_BS < 0, tail_BS, offsets_BK.gather(1, tail_BS.clamp(0, num_tail - 1)))


def _tail_index(lengths: Sequence[int], num_slots: int, device: torch.device) -> Tensor:
    """int64 [B, S]: index of each slot in its row's tail, negative for committed slots."""
    return torch.arange(num_slots, device=device) - torch.tensor(lengths, device=device).unsqueeze(1)
