"""Which cache slots a forward's tokens see: the committed ones that are no padding, and their path in the tail.

Shape legend: B rows, P prompt, S slots, T new slots, K tail slots (old and new).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.trees import masks
from specdec.tree_model.layer_kinds import LayerKind
from trees.uploads import upload

_INDEXED = "indexed_attention"
"""Layers of this kind select by their mask what to attend to, and need one where all is visible."""
_ATTENDS_AS = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
"""By which some models take the masks of layers that have states too."""
_UNMASKED: dict[str, Any] = {"linear_attention": None, "conv": None}
"""No padding is stepped."""


def unread(device: torch.device) -> Tensor:
    """For a forward in which nothing attends: without a mask transformers would look whether its positions are those
    of several texts."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def by_kind(
    kinds: Sequence[LayerKind],
    seen_BTK: Tensor | None,
    offsets_BT: Tensor,
    offsets_BK: Tensor,
    lengths: Sequence[int],
    prompt_BP: Tensor | None,
) -> dict[str, Tensor]:
    """What the new tokens see in layers of each kind: bool [B, T, S], the same tensor for kinds that see the same.

    Empty where they see all of it, and no layer needs to be told.

    Args:
        seen_BTK: which tail slots each new token sees; None says that it is one, and sees the whole tail.
        offsets_BT, offsets_BK, lengths, prompt_BP: as below.
    """
    num_tail = offsets_BK.shape[1]
    within = {kind.name: kind.within(max(lengths) + num_tail) for kind in kinds if kind.has_slots}
    if not within:
        return {}
    if seen_BTK is None:
        is_masked = _INDEXED in within or prompt_BP is not None or min(lengths) < max(lengths)
        if not is_masked and all(kind.reach is None for kind in within.values()):
            return {}
        seen_BTK = offsets_BT.new_ones((len(lengths), 1, num_tail), dtype=torch.bool)
    visible_BTS = visible_slots(seen_BTK, lengths, prompt_BP)
    by_reach: dict[int | None, Tensor] = {}
    for kind in within.values():
        if kind.reach is None:
            by_reach[None] = visible_BTS
        elif kind.is_chunked:
            by_reach[kind.reach] = visible_BTS & within_chunk(kind.reach, offsets_BT, offsets_BK, lengths, prompt_BP)
        else:
            by_reach[kind.reach] = visible_BTS & within_window(kind.reach, offsets_BT, offsets_BK, lengths)
    return {name: by_reach[kind.reach] for name, kind in within.items()}


def with_states(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """Masks by the names that models with states have for their layers."""
    attending = {_ATTENDS_AS[name]: mask for name, mask in by_name.items() if name in _ATTENDS_AS}
    return {**by_name, **attending, **_UNMASKED}


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
    starts_B = upload(lengths, offsets_BT.device)
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
    return torch.arange(num_slots, device=device) - upload(lengths, device).unsqueeze(1)
