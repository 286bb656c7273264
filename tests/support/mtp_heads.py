"""Tiny random MTP layers on disk, in every layout, and what they compute, by transformers' own layer.

Shape legend: T positions, C channels, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from specdec.testing import tiny_model
from tests.support.heads import VOCAB_SIZE, Listener, hidden_states
from tests.support.recurrent_models import RECURRENT

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {**EXPERTS, "head_dim": 8, "first_k_dense_replace": 1},
    "deepseek_v3": {**EXPERTS, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
}

DENSE = ("llama", "qwen2", "qwen3")

_MIMO = {
    "enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj", "post_norm": "final_layernorm"
}  # fmt: skip
_QWEN = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
_DEEPSEEK = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
LAYOUTS: dict[str, tuple[str, Mapping[str, str], str]] = {
    "speculators": ("mtp_layers.0.", _MIMO, ""),
    "mimo": ("model.mtp_layers.0.", _MIMO, ""),
    "qwen": ("mtp.", _QWEN, "layers.0."),
    "deepseek": ("model.layers.{N}.", _DEEPSEEK, ""),
    "transformers": ("layers.0.", {name: name for name in _MIMO}, "mtp_block."),
}
"""What names begin with, the parts' names, and what the decoder layer's names go on with."""


class TinyMtp:
    """A target with a random MTP layer.

    Args:
        layout: one of `LAYOUTS`.
        family: of the target.
        dtype: if absent float64, and float32 where recurrences or the choice of experts are computed in it.
        num_layers: each of which drafts a token further ahead.
        settings: of the target.
    """

    def __init__(
        self, layout: str, family: str, dtype: torch.dtype | None = None, num_layers: int = 1, **settings: Any
    ):
        dtype = dtype or (torch.float64 if family in DENSE else torch.float32)
        self.layout = layout
        self.target = mtp_target(family, dtype, **settings)
        self._first_place = self.target.config.num_hidden_layers
        config = copy.deepcopy(self.target.config)
        config.num_mtp_layers = num_layers
        for name, kind in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
            if getattr(config, name, None) is not None:
                setattr(config, f"mtp_{name}", [kind] * num_layers)
        shallow = copy.copy(self.target)
        shallow.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.module = MtpModel(shallow, num_layers).to(dtype).eval()
            for name, weight in self.module.layers.named_parameters():
                torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
        for layer in self.module.layers:
            layer.config.mtp_hidden_states_first = layout == "mimo"

    @property
    def feeds_normed(self) -> bool:
        return self.layout != "deepseek"

    def save(self, folder: Path) -> Path:
        """Beside the model's own weights, in its folder, or alone."""
        begins, parts, block = LAYOUTS[self.layout]
        tensors = {}
        for index, layer in enumerate(self.module.layers):
            prefix = begins.replace("{N}", str(self._first_place + index)).replace(".0.", f".{index}.")
            for name, tensor in unpacked(layer.state_dict()).items():
                part, rest = name.split(".", 1)
                stored = block + rest if part == "mtp_block" else f"{parts[part]}.{rest}"
                tensors[prefix + stored] = tensor.contiguous()
        self.target.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        own = load_file(folder / "model.safetensors")
        if self.layout == "speculators":
            fields, own = {"speculators_model_type": "mtp", "transformer_layer_config": fields}, {}
        elif self.layout == "transformers":
            fields, own = {**fields, "architectures": ["MtpModel"]}, {}
        elif self.layout == "mimo":
            fields |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
        (folder / "config.json").write_text(json.dumps(fields))
        save_file({**own, **tensors}, folder / "model.safetensors", {"format": "pt"})
        return folder

    @torch.no_grad()
    def reference_logits(self, text: Sequence[int], drafted: Sequence[int], first: int = 0) -> Tensor:
        """Logits [V] after a text and drafted tokens, all computed again, without a cache.

        Args:
            first: tokens of the text whose states the layer has not seen.
        """
        if len(self.module.layers) > 1:
            return self._said_by_several(text, drafted, first)
        layer: Any = self.module.layers[0]
        states_1TC, tokens = hidden_states(self.target, tuple(text[:-1]))[-1][:, first:], list(text[first + 1 :])
        for token in (*drafted, None):
            output_1TC, normed_1TC = self._run(layer, tokens, states_1TC, first)
            fed_back_1TC = normed_1TC if self.feeds_normed else output_1TC
            states_1TC = torch.cat([states_1TC, fed_back_1TC[:, -1:]], 1)
            tokens.append(token)
        logits_V: Tensor = self.module.shared_head(normed_1TC[0, -1])
        return logits_V

    def _said_by_several(self, text: Sequence[int], drafted: Sequence[int], first: int) -> Tensor:
        """As `MtpModel.forward`: the next layer reads the states of the one before, and tokens one further on."""
        states_1TC, tokens = hidden_states(self.target, tuple(text[:-1]))[-1][:, first:], [*text[first + 1 :], *drafted]
        for number in range(len(drafted) + 1):
            own = tokens[number : number + states_1TC.shape[1]]
            output_1TC, normed_1TC = self._run(self.module.layers[number], own, states_1TC, first + number)
            states_1TC = normed_1TC if self.feeds_normed else output_1TC
        logits_V: Tensor = self.module.shared_head(normed_1TC[0, -1])
        return logits_V

    def _run(self, layer: Any, tokens: Sequence[int], states_1TC: Tensor, first: int) -> tuple[Tensor, Tensor]:
        embeds_1TC = self.module.embed_tokens(torch.tensor([list(tokens)]))
        positions_1T = first + 1 + torch.arange(len(tokens)).unsqueeze(0)  # as transformers counts them
        seen_TT = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        outputs: list[Tensor] = []
        hook = layer.mtp_block.register_forward_hook(lambda _, __, output: outputs.append(output))
        normed_1TC = layer(
            embeds_1TC,
            states_1TC,
            position_embeddings=self.module.rotary_emb(embeds_1TC, position_ids=positions_1T),
            attention_mask=seen_TT[None, None],
            position_ids=positions_1T,
            past_key_values=None,
        )
        hook.remove()
        return outputs[0], normed_1TC

    def check(self, listener: Listener, bound: float = 1e-5) -> None:
        """What the drafter has said is what the reference says. Of much, samples."""
        for said in listener.sample():
            if len(self.module.layers) > 1 and len(said.drafted) >= len(said.text) - said.first:
                continue  # the row's draft has ended there
            expected_V = self.reference_logits(said.text, said.drafted, said.first)
            error = (said.logits_V - expected_V).abs().max()
            assert error <= bound * (1 + expected_V.abs().max()), f"{error:.2e} after {said.text}, {said.drafted}"


@lru_cache(maxsize=4)
def mtp_target(family: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    usual = {"vocab_size": VOCAB_SIZE, **(SETTINGS.get(family) or RECURRENT.get(family, {}))}
    return tiny_model(family, dtype=dtype, **{**usual, **settings})


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a tensor for each expert, as checkpoints have them."""
    named = {}
    for name, tensor in tensors.items():
        before, is_packed, after = name.partition("experts.")
        if not is_packed or tensor.dim() < 3:
            named[name] = tensor
            continue
        for index, expert in enumerate(tensor):
            parts = {"gate_proj": expert[: len(expert) // 2], "up_proj": expert[len(expert) // 2 :]}
            if after == "down_proj":
                parts = {"down_proj": expert}
            named |= {f"{before}experts.{index}.{part}.weight": weight for part, weight in parts.items()}
    return named
