"""A head at work on a run: its network with a cache of its own, and what it shares with the target.

Shape legend: B rows, T new slots, K tail slots (old and new), C channels, X channels of all states of a position,
V tokens that the head can draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.head.dflash import DFlash
from specdec.drafters.head.formats import MTP
from specdec.drafters.head.network import HeadNetwork, HeadOutput
from specdec.drafters.head.peagle import PEagle
from specdec.tree_model.forwards import Forwarded
from specdec.tree_model.layer_views import ALL_LAYERS, Layers
from specdec.tree_model.model import TreeModel
from trees.uploads import upload

FED_BACK = 0
"""Among the states of a step: what stands for the target's in the next one."""


class HeadRunner(TreeModel):
    """Its positions are the target's: that of a token is where the state stands that it is read with, one before."""

    def __init__(self, head: HeadNetwork, target: TreeModel):
        super().__init__(head)
        self.head = head
        self._target_vocab_size = target.vocab_size
        self._final_norm = target.views.final_norm if head.head_config.kind == MTP else None
        self._forward = head.for_run(target.model)
        self.begin()

    def begin_rows(self, first: Sequence[int]) -> None:
        """Rows that hold nothing.

        Args:
            first: position of the first token that each of them will read.
        """
        self.begin(len(first))
        self._lag_AB = -torch.tensor([list(first)], device=self.device)

    def join_row(self, first: int) -> None:
        """A row more, at the end."""
        self.join()
        self._lag_AB[:, -1] = -first

    def read_pairs(self, tokens_BW: Tensor, states_BWX: Tensor, sizes: Sequence[int]) -> HeadOutput:
        """Commit the first `sizes` pairs of each row; the output at the last of them, [B, 1, C].

        Args:
            states_BWX: the target's.
        """
        output = self.append_pairs(tokens_BW, self.fused(states_BWX), sizes)
        last_B = upload(list(sizes), self.device) - 1
        rows_B = torch.arange(len(sizes), device=self.device)
        return HeadOutput(*(part[rows_B, last_B].unsqueeze(1) for part in output))

    def append_pairs(self, tokens_BW: Tensor, states_BWC: Tensor, sizes: Sequence[int]) -> HeadOutput:
        """Commit the first `sizes` pairs of each row; the output at all of them, [B, W, C].

        Args:
            states_BWC: as `HeadNetwork.forward` takes them.
        """
        offsets_BW = torch.arange(tokens_BW.shape[1], device=self.device).expand_as(tokens_BW)
        seen_BWW = None
        if tokens_BW.shape[1] > 1:
            seen_BWW = (offsets_BW[:, :, None] >= offsets_BW[:, None]).contiguous()
        output = self.run_head(tokens_BW, states_BWC, offsets_BW, seen_BWW)
        self.commit([range(size) for size in sizes])
        return output

    def read_states(self, states_BWX: Tensor, sizes: Sequence[int]) -> None:
        """Commit the first `sizes` states of each row, of a head that makes keys and values of nothing else."""
        assert isinstance(self.head, DFlash)
        offsets_BW = torch.arange(states_BWX.shape[1], device=self.device).expand(states_BWX.shape[:2])
        positions_BW = self.next_positions_B.unsqueeze(1) + offsets_BW
        self.head.read(self.fused(states_BWX), positions_BW, self.cache)
        self.commit([range(size) for size in sizes])

    def read_block(self, tokens_BW: Tensor, states_BWX: Tensor, sizes: Sequence[int]) -> Tensor:
        """Commit the first `sizes` pairs of each row; what the LM head reads [B, T, C] of the last and of the masks.

        Args:
            states_BWX: the target's.
        """
        assert isinstance(self.head, PEagle)
        (num_rows, width), sizes_B1 = tokens_BW.shape, upload(list(sizes), self.device).unsqueeze(1)
        masks_BMC = self.head.masks(num_rows)
        num_masks = masks_BMC.shape[1]
        places_T = torch.arange(width + num_masks, device=self.device)
        offsets_BT = torch.where(places_T < width, places_T, places_T - width + sizes_B1)
        is_real_BT = (places_T < sizes_B1) | (places_T >= width)  # the others only make rows as long as each other
        seen_BTT = (places_T[:, None] >= places_T) & (is_real_BT[:, None] | (places_T[:, None] == places_T))
        masked_BM = tokens_BW.new_full((num_rows, num_masks), self.head.head_config.mask_token_id)
        states_BTC = torch.cat([self.fused(states_BWX), masks_BMC], 1)
        output = self.run_head(torch.cat([tokens_BW, masked_BM], 1), states_BTC, offsets_BT, seen_BTT)
        self.commit([range(size) for size in sizes])
        slots_BS = torch.cat([sizes_B1 - 1, places_T[width:].expand(num_rows, -1)], 1)
        return output.normed_BTC[torch.arange(num_rows, device=self.device).unsqueeze(1), slots_BS]

    def run_block(self, roots_B1: Tensor) -> Tensor:
        """What the LM head reads [B, T, C] of the slots after each row's newest token, all at once.

        Nothing of it is kept.
        """
        config = self.head.head_config
        masks = roots_B1.new_full((len(roots_B1), config.block_size - 1), config.mask_token_id)
        tokens_BT = torch.cat([roots_B1, masks], 1).to(self.device)
        seen_BTT = torch.ones((*tokens_BT.shape, tokens_BT.shape[1]), dtype=torch.bool, device=self.device)
        offsets_BT = torch.arange(tokens_BT.shape[1], device=self.device).expand_as(tokens_BT)
        output = self.run_head(tokens_BT, None, offsets_BT, seen_BTT.tril() if config.is_causal else seen_BTT)
        self.forget_tail()
        return output.normed_BTC[:, 0 if config.drafts_at_root else 1 :]

    def run_head(
        self, tokens_BT: Tensor, states_BTC: Tensor | None, offsets_BT: Tensor, seen_BTK: Tensor | None
    ) -> HeadOutput:
        """Append T slots to the tail; arguments as of `TreeModel.forward`.

        Args:
            states_BTC: as `HeadNetwork.forward` takes them.
        """
        hidden = [] if states_BTC is None else [states_BTC]
        normed_BTC, states = self._forward_layers(ALL_LAYERS, tokens_BT, offsets_BT, seen_BTK, hidden)
        self.num_forwards += 1
        assert normed_BTC is not None
        return HeadOutput(states[FED_BACK], normed_BTC)

    def _run_layers(self, layers: Layers, inputs: dict[str, Any], hidden: Sequence[Tensor]) -> Forwarded:
        """What the LM head reads, in the place of logits, and what is fed back."""
        output = self._forward(states_BTC=hidden[0] if hidden else None, **inputs)
        return output.normed_BTC, {FED_BACK: output.states_BTC}

    def fused(self, states_BTX: Tensor) -> Tensor:
        """The target's states as the head's layers take them."""
        if self._final_norm is not None:
            weight = next(self._final_norm.parameters(), states_BTX)
            states_BTX = self._final_norm(states_BTX.to(weight.device)).to(self.device)
        return self.head.fuse(states_BTX)

    def logits(self, normed_BTC: Tensor) -> Tensor:
        """Over what the head can draft."""
        logits_BTV = self._forward.logits(normed_BTC)
        return logits_BTV if self.head.vocab_ids is not None else logits_BTV[..., : self._target_vocab_size]
