"""The network of a jump head: from one of the target's states to a later token's, past the layers between.

A linear map predicts the state of the next token where the target's layer m ends, from the state of this token where
layer u > m ends and the embedding of the next one. Copies of the target's layers m + 1 to u go on from there. So their
output stands for the state after layer u at the next token, and is read out as one: through a linear map to what the
target's last layer would give, its norm and rows of its LM head. (Self-speculation by jumping over lower layers, as in
the economize package, with its own copy of the block.)

Shape legend: B rows, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.head.mtp_files import block_model
from specdec.drafters.head.network import HeadNetwork, HeadOutput
from specdec.hf import CACHE
from specdec.kernels.model.stack import FusedLayers, Rotations, is_fused


class Jump(HeadNetwork):
    """A jump head."""

    def _build_layers(self) -> None:
        decoder: Any = block_model(self.config).get_decoder()
        size = self.config.hidden_size
        self.norm = type(decoder.norm)(size, eps=self.config.rms_norm_eps)
        self.rotary_emb = type(decoder.rotary_emb)(self.config)
        self.layers = decoder.layers
        self.layers.to(self.config.dtype or torch.float32).to_empty(device="cpu")
        self.readout = nn.Linear(size, size, bias=False)

    def forward(
        self,
        embeds_BTC: Tensor,
        states_BTC: Tensor | None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> HeadOutput:
        """Tokens that come next, beside the target's states or what the head has given in the step before."""
        landed_BTC = self.land(embeds_BTC, states_BTC)
        rotation = self.rotary_emb(landed_BTC, position_ids)
        for layer in self.layers:
            landed_BTC = layer(
                landed_BTC,
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=rotation,
                **{CACHE: kwargs[CACHE]},
            )
        return self.read_out(landed_BTC)

    def land(self, embeds_BTC: Tensor, states_BTC: Tensor | None) -> Tensor:
        """What the first layer reads."""
        assert states_BTC is not None
        landed_BTC: Tensor = self.fc(torch.cat([embeds_BTC, states_BTC], -1))
        return landed_BTC

    def read_out(self, states_BTC: Tensor) -> HeadOutput:
        """What the last layer leaves, and what the LM head reads of it."""
        return HeadOutput(states_BTC, self.norm(self.readout(states_BTC)))

    def for_run(self) -> Callable[..., HeadOutput]:
        return _FusedJump(self) if all(map(is_fused, self.layers)) else self


class _FusedJump:
    """All layers of a prepared head in one native call, and angles that are looked up."""

    def __init__(self, head: Jump):
        self._head = head
        self._rotations = Rotations(head.rotary_emb, head.config)
        self._layers = FusedLayers(head.layers)

    def __call__(
        self,
        *,
        embeds_BTC: Tensor,
        states_BTC: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        use_cache: bool,
        **kwargs: Any,
    ) -> HeadOutput:
        landed_BTC = self._head.land(embeds_BTC, states_BTC)
        rotation = self._rotations(landed_BTC, position_ids)
        output_BTC = self._layers(landed_BTC, attention_mask, kwargs[CACHE], rotation, use_cache=use_cache)
        return self._head.read_out(output_BTC)
