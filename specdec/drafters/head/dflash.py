"""The network of a DFlash head (arXiv 2602.06036): a block of tokens from one forward.

Its layers attend to keys and values that they make of the target's fused states, and to a block of the newest token and
masks, whose positions see each other. What it says of each position does not depend on what is drafted before it.

Shape legend: B rows, T positions, C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from specdec.drafters.head.network import HeadNetwork, HeadOutput
from specdec.hf import CACHE


class DFlash(HeadNetwork):
    """A DFlash head, whose layers are those of Qwen3."""

    def _build_layers(self) -> None:
        size, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.hidden_norm = LlamaRMSNorm(size, eps=eps)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(self.config, index) for index in range(self.config.num_hidden_layers)
        )

    def fuse(self, states_BTX: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(states_BTX))

    def read(self, fused_BTC: Tensor, position_ids: Tensor, cache: Any) -> None:
        """Append to the cache what the layers will attend to of T positions."""
        cos_BTD, sin_BTD = self.rotary_emb(fused_BTC, position_ids)
        for index, layer in enumerate(self.layers):
            attention: Any = layer.self_attn
            shape = (*fused_BTC.shape[:2], -1, attention.head_dim)
            keys_BHTD = attention.k_norm(attention.k_proj(fused_BTC).view(shape)).transpose(1, 2)
            values_BHTD = attention.v_proj(fused_BTC).view(shape).transpose(1, 2)
            keys_BHTD = keys_BHTD * cos_BTD.unsqueeze(1) + rotate_half(keys_BHTD) * sin_BTD.unsqueeze(1)
            cache.update(keys_BHTD, values_BHTD, index)

    def forward(
        self,
        embeds_BTC: Tensor,
        states_BTC: Tensor | None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> HeadOutput:
        """Tokens of a block; it has read the states that it attends to."""
        rotation = self.rotary_emb(embeds_BTC, position_ids)
        states_BTC = embeds_BTC
        for layer in self.layers:
            states_BTC = layer(
                states_BTC,
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=rotation,
                **{CACHE: kwargs[CACHE]},
            )
        return HeadOutput(states_BTC, self.norm(states_BTC))
