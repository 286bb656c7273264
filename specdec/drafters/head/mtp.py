"""The network of a layer for multi-token prediction (MTP; DeepSeek-V3, arXiv 2412.19437, section 2.2).

It reads the token that comes next beside the target's last state, normed, through a decoder layer of the target's own
class. Where the target has no states yet, its own output takes their place: one layer drafts any number of tokens.

Shape legend: B rows, T positions, C channels.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.head.mtp_files import block_model, read_mtp
from specdec.drafters.head.network import HeadNetwork, HeadOutput, built
from specdec.errors import DraftError
from specdec.hf import CACHE


class Mtp(HeadNetwork):
    """An MTP layer."""

    def _build_layers(self) -> None:
        inside: PreTrainedModel = block_model(self.config)
        decoder: Any = inside.get_decoder()
        size, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.norm, self.enorm, self.hnorm = (type(decoder.norm)(size, eps=eps) for _ in range(3))
        self.rotary_emb = type(decoder.rotary_emb)(self.config)
        self.block = decoder.layers[0]
        self.block.to(self.config.dtype or torch.float32).to_empty(device="cpu")
        self.later = nn.ModuleList()
        """Further layers, each for a token further ahead."""

    def forward(
        self,
        embeds_BTC: Tensor,
        states_BTC: Tensor | None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> HeadOutput:
        """Tokens that come next, beside the target's normed states or what the layer has given in the step before."""
        assert states_BTC is not None
        parts = [self.enorm(embeds_BTC), self.hnorm(states_BTC)]
        if self.head_config.hidden_first:
            parts.reverse()
        output_BTC = self.block(
            self.fc(torch.cat(parts, -1)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(embeds_BTC, position_ids),
            **{CACHE: kwargs[CACHE]},
        )
        normed_BTC = self.norm(output_BTC)
        return HeadOutput(normed_BTC if self.head_config.norm_output else output_BTC, normed_BTC)


def load_mtp(folder: str | os.PathLike[str]) -> Mtp | None:
    """The MTP layers in a folder, in the dtype of its file, the first with the others in it; None if there is none.

    Raises:
        DraftError: it is damaged, or not one that can be read.
    """
    read = read_mtp(folder)
    if read is None:
        return None
    config, layers = read
    try:
        first, *others = (built(Mtp, config, tensors) for tensors in layers)
        first.later.extend(others)
        return first
    except (RuntimeError, ValueError) as error:
        raise DraftError(f"the MTP layer in {os.fspath(folder)} does not fit its config.json: {error}") from error
