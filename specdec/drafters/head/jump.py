"""The network of a jump head: from one of the target's states to a later token's, past the layers between.

A linear map predicts the state of the next token where the target's layer m ends, from the state of this token where
layer u > m ends and the embedding of the next one. Copies of the target's layers m + 1 to u go on from there. So their
output stands for the state after layer u at the next token, and is read out as one: through a linear map to what the
target's last layer would give, its norm and rows of its LM head. (Self-speculation by jumping over lower layers, as in
the economize package, with its own copy of the block.)

Shape legend: B rows, T positions, C channels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.head.mtp_files import block_model
from specdec.drafters.head.network import HeadNetwork, HeadOutput, HeadRun
from specdec.hf import CACHE
from specdec.kernels.model.head_step import HeadStep
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

    def for_run(self, target: PreTrainedModel) -> HeadRun:
        return _FusedJump(self, target) if all(map(is_fused, self.layers)) else HeadRun(self, target)

    @cached_property
    def narrow_fc_NK(self) -> Tensor:
        """The weights of `fc`, in two bytes where these hold them: as the files of heads mostly have them."""
        weight_NK = self.fc.weight.detach()
        narrow_NK = weight_NK.bfloat16()
        return narrow_NK if torch.equal(narrow_NK.to(weight_NK.dtype), weight_NK) else weight_NK


class _FusedJump(HeadRun):
    """A prepared head, whose layers are one native call, and mostly with all that is before and after them."""

    def __init__(self, head: Jump, target: PreTrainedModel):
        super().__init__(head, target)
        self._jump = head
        self._rotations = Rotations(head.rotary_emb, head.config)
        self._layers = FusedLayers(head.layers)
        parts: dict[str, Any] = {"layers": head.layers, "last": head.readout, "norm": head.norm}
        parts |= {"lm_head": head.lm_head, "embeddings": self.embeddings}
        self._step = None
        if HeadStep.covers(first=head.fc, **parts):
            self._step = HeadStep(first_NK=head.narrow_fc_NK, rotations=self._rotations, **parts)

    def __call__(self, *, input_ids: Tensor, states_BTC: Tensor | None, **inputs: Any) -> HeadOutput:
        assert states_BTC is not None
        output_BTC = None
        positions, mask, cache = inputs["position_ids"], inputs["attention_mask"], inputs[CACHE]
        if self._step is not None:
            output_BTC = self._step.states(input_ids, states_BTC, positions, mask, cache)
        if output_BTC is None:
            landed_BTC = self._jump.land(self.embed(input_ids), states_BTC)
            rotation = self._rotations(landed_BTC, positions)
            output_BTC = self._layers(landed_BTC, mask, cache, rotation, use_cache=inputs["use_cache"])
        return HeadOutput(output_BTC, output_BTC)

    def logits(self, normed_BTC: Tensor) -> Tensor:
        """Of what the layers have left."""
        logits_BTV = None if self._step is None else self._step.logits(normed_BTC)
        return super().logits(self._jump.read_out(normed_BTC).normed_BTC) if logits_BTV is None else logits_BTV
