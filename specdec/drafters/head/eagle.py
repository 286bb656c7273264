"""The network of an EAGLE-3 head (Li et al. 2025, section 3).

At a position it reads the token that comes next and, fused into one vector, the target's states there after some of its
layers; where the target has no states yet, its own output takes their place. Its first layer attends with the two side
by side.

Shape legend: B rows, T positions, C channels of the head, X channels of all states of a position, V tokens that it
can draft.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from specdec.drafters.head.formats import HeadConfig, read_config, read_tensors
from specdec.errors import DraftError
from specdec.hf import CACHE


class HeadOutput(NamedTuple):
    """Of every position: what stands for the target's states in the next step, and what the LM head reads."""

    states_BTC: Tensor
    normed_BTC: Tensor


class Eagle3(PreTrainedModel):
    """An EAGLE-3 head. Embeddings and LM head that it lacks are the target's.

    Attributes:
        head_config: sizes and variants.
        vocab_ids: int64 [V]: the target's token that each output stands for; None where they are the same.
    """

    config_class = PreTrainedConfig
    _supports_sdpa = True

    vocab_ids: Tensor | None

    def __init__(self, head_config: HeadConfig, *, has_embedding: bool, has_lm_head: bool, has_vocab_ids: bool):
        config = head_config.layers
        super().__init__(config)
        self.head_config = head_config
        size, eps = config.hidden_size, config.rms_norm_eps
        num_states = len(head_config.layers_read(1 << 10))
        self.fc = nn.Linear(num_states * head_config.target_hidden_size, size, bias=False)
        self.layers = nn.ModuleList(
            _Layer(config, index, head_config.norm_before_residual) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(size, eps=eps)
        self.input_norm = LlamaRMSNorm(self.fc.in_features, eps=eps) if head_config.norm_before_fc else None
        norms = [LlamaRMSNorm(head_config.target_hidden_size, eps=eps) for _ in range(num_states)]
        self.fc_norm = nn.ModuleList(norms) if head_config.fc_norm else None
        self.embed_tokens = nn.Embedding(head_config.vocab_size, size) if has_embedding else None
        self.lm_head = nn.Linear(size, head_config.draft_vocab_size, bias=False) if has_lm_head else None
        ids = torch.arange(head_config.draft_vocab_size) if has_vocab_ids else None
        self.register_buffer("vocab_ids", ids, persistent=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Eagle3:
        """The head in a folder, in the dtype of its file.

        Raises:
            DraftError: the folder holds no such head, or a damaged one.
        """
        config, tensors = read_config(folder), read_tensors(folder)
        try:
            return _built(config, tensors)
        except (RuntimeError, ValueError) as error:  # a tensor is missing, is one too many, or has another shape
            raise DraftError(f"the head in {os.fspath(folder)} does not fit its config.json: {error}") from error

    def fuse(self, states_BTX: Tensor) -> Tensor:
        """The target's states side by side, as one vector a position, [B, T, C]."""
        if self.input_norm is not None:
            states_BTX = self.input_norm(states_BTX)
        if self.fc_norm is not None:
            parts = states_BTX.chunk(len(self.fc_norm), -1)
            states_BTX = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(states_BTX)

    def forward(
        self,
        embeds_BTC: Tensor,
        states_BTC: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> HeadOutput:
        """
        Args:
            embeds_BTC: of the tokens that come next.
            states_BTC: fused, or what the head has given in the step before.
            attention_mask: as of the models of transformers, 4-D; by kind of layer where there are several.
            kwargs: the cache.
        """
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


def _built(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Eagle3:
    ids = tensors.get("d2t")
    if ids is None and config.draft_vocab_size != config.vocab_size:
        raise ValueError(f"d2t is missing, which says what the {config.draft_vocab_size} tokens are that it can draft")
    if "lm_head.weight" not in tensors and ids is not None:
        raise ValueError("lm_head.weight is missing")
    head = Eagle3(
        config,
        has_embedding="embed_tokens.weight" in tensors,
        has_lm_head="lm_head.weight" in tensors,
        has_vocab_ids=ids is not None,
    )
    head.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "d2t"})
    if ids is not None:
        assert head.vocab_ids is not None
        if ids.shape != head.vocab_ids.shape:
            raise ValueError(f"d2t has {len(ids)} entries for {config.draft_vocab_size} tokens")
        head.vocab_ids += ids
    return head.to(tensors["fc.weight"].dtype)
