"""The network of an EAGLE-3 head (Li et al. 2025, section 3).

At a position it reads the token that comes next and, fused into one vector, the target's states there after some of its
layers; where the target has no states yet, its own output takes their place. Its first layer attends with the two side
by side.

Shape legend: B rows, T positions, C channels of the head, X channels of all states of a position, V tokens that it
can draft.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from specdec.drafters.head.network import HeadNetwork, HeadOutput
from specdec.hf import CACHE


class Eagle3(HeadNetwork):
    """An EAGLE-3 head."""

    def _build_layers(self) -> None:
        head_config, eps = self.head_config, self.config.rms_norm_eps
        self.layers = nn.ModuleList(
            _Layer(self.config, index, head_config.norm_before_residual)
            for index in range(self.config.num_hidden_layers)
        )
        self.input_norm = LlamaRMSNorm(self.fc.in_features, eps=eps) if head_config.norm_before_fc else None
        norms = [LlamaRMSNorm(head_config.target_hidden_size, eps=eps) for _ in range(head_config.num_states)]
        self.fc_norm = nn.ModuleList(norms) if head_config.fc_norm else None

    def fuse(self, states_BTX: Tensor) -> Tensor:
        if self.input_norm is not None:
            states_BTX = self.input_norm(states_BTX)
        if self.fc_norm is not None:
            parts = states_BTX.chunk(len(self.fc_norm), -1)
            states_BTX = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(states_BTX)

    def forward(
        self,
        embeds_BTC: Tensor,
        states_BTC: Tensor | None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> HeadOutput:
        """Tokens that come next, beside fused states or what the head has given in the step before."""
        assert states_BTC is not None
        rotation = self.rotary_emb(states_BTC, position_ids)
        for layer in self.layers:
            mask = attention_mask[layer.kind] if isinstance(attention_mask, dict) else attention_mask
            states_BTC = layer(embeds_BTC, states_BTC, rotation, mask, kwargs[CACHE])
        normed_BTC = self.norm(states_BTC)
        return HeadOutput(normed_BTC if self.head_config.norm_output else states_BTC, normed_BTC)


class _Layer(nn.Module):
    """A decoder layer; the first one attends with the embedding beside the state."""

    def __init__(self, config: PreTrainedConfig, index: int, norm_before_residual: bool):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.kind: str = (getattr(config, "layer_types", None) or ["full_attention"] * (index + 1))[index]
        self._norm_before_residual = norm_before_residual
        is_qwen3 = config.model_type == "qwen3"
        self.self_attn = (Qwen3Attention if is_qwen3 else LlamaAttention)(config, index)
        self.mlp = (Qwen3MLP if is_qwen3 else LlamaMLP)(config)
        self.input_layernorm = LlamaRMSNorm(size, eps=eps)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps=eps)
        self.hidden_norm = None
        if index == 0:
            self.hidden_norm = LlamaRMSNorm(size, eps=eps)
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(2 * size, narrow.out_features, bias=narrow.bias is not None))

    def forward(
        self, embeds_BTC: Tensor, states_BTC: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> Tensor:
        residual_BTC = states_BTC
        if self.hidden_norm is None:
            inputs = self.input_layernorm(states_BTC)
        else:
            normed_BTC = self.hidden_norm(states_BTC)
            residual_BTC = normed_BTC if self._norm_before_residual else states_BTC
            inputs = torch.cat([self.input_layernorm(embeds_BTC), normed_BTC], -1)
        attended_BTC, _ = self.self_attn(
            inputs, position_embeddings=rotation, attention_mask=mask, past_key_values=cache
        )
        states_BTC = residual_BTC + attended_BTC
        return states_BTC + self.mlp(self.post_attention_layernorm(states_BTC))
