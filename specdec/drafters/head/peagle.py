"""The network of a P-EAGLE head: an EAGLE-3 head that drafts a block from one forward.

After the newest token and the state before it come masks, each a token and a state that were learnt: what they say
stands for what an EAGLE-3 head would say after tokens that are not drafted yet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdec.drafters.head.eagle import Eagle3


class PEagle(Eagle3):
    """A P-EAGLE head."""

    def _build_layers(self) -> None:
        super()._build_layers()
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, self.head_config.num_inputs))

    def masks(self, num_rows: int) -> Tensor:
        """Fused states of the masks of a block, [B, T, C]."""
        return self.fuse(self.mask_hidden).expand(num_rows, self.head_config.block_size - 1, -1)
