"""Tiny random EAGLE-3 heads on disk, in the layouts of three projects, and what such a head computes, written plainly.

Shape legend: T positions, C channels, X channels of all states, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from specdec.drafters.head.drafter import _EagleSession
from specdec.testing import tiny_model
from trees import GrowingTrees

NUM_LAYERS, VOCAB_SIZE = 7, 12
LAYERS = (1, 2, 4)
EPS = 1e-6
MOST_CHECKED = 150
BLOCK_SIZE = 5


@lru_cache(maxsize=4)
def small_vocab_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """With so few tokens a head that has learnt nothing is often right by chance."""
    if family == "gemma3_text":
        overrides["layer_types"] = ["full_attention", *["sliding_attention"] * (NUM_LAYERS - 1)]
    return tiny_model(family, seed=seed, vocab_size=VOCAB_SIZE, num_hidden_layers=NUM_LAYERS, **overrides)


@dataclass(frozen=True, kw_only=True)
class TinyHead:
    """What varies between heads.

    Args:
        channels: of the head, and of the target if it shares that one's embeddings.
        drafts: the target's tokens that it can draft; None for all.
        is_parallel: whether it is a P-EAGLE head.
    """

    channels: int = 32
    target_channels: int = 32
    vocab_size: int = VOCAB_SIZE
    drafts: Sequence[int] | None = (0, 2, 3, 4, 5, 7, 8, 11)
    layers: Sequence[int] = LAYERS
    num_layers: int = 1
    has_embedding: bool = True
    has_lm_head: bool = True
    has_head_norms: bool = False
    has_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    is_parallel: bool = False
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """By the names of speculators."""

    num_heads, num_kv_heads, head_dim = 4, 2, 8

    def __post_init__(self) -> None:
        if not self.tensors:
            self.tensors.update(self._draw())

    def variant(self, **changes: Any) -> TinyHead:
        return replace(self, tensors={}, **changes)

    def _draw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        size, wide = self.channels, len(self.layers) * self.target_channels
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        num_drafts = len(self.drafts) if self.drafts is not None else self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (size, wide), "norm.weight": (size,)}
        for index in range(self.num_layers):
            inputs, layer = (2 if index == 0 else 1) * size, f"layers.{index}"
            projections = {"q": (q_size, inputs), "k": (kv_size, inputs), "v": (kv_size, inputs), "o": (size, q_size)}
            for name, shape in projections.items():
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
                if self.has_bias:
                    shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
            norms = ["input_layernorm", "post_attention_layernorm", *["hidden_norm"] * (index == 0)]
            shapes |= {f"{layer}.{name}.weight": (size,) for name in norms}
            if self.has_head_norms:
                shapes |= {f"{layer}.self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
            shapes |= {f"{layer}.mlp.{name}_proj.weight": (48, size) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.weight"] = (size, 48)
        if self.is_parallel:
            shapes["mask_hidden"] = (1, 1, wide)
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (wide,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{index}.weight": (self.target_channels,) for index in range(len(self.layers))}
        if self.has_embedding:
            shapes["embed_tokens.weight"] = (self.vocab_size, size)
        if self.has_lm_head:
            shapes["lm_head.weight"] = (num_drafts, size)
        tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors |= {name: 1 + tensor for name, tensor in tensors.items() if tensor.dim() == 1 and "norm" in name}
        if self.drafts is not None:
            ids = torch.tensor(self.drafts)
            tensors["d2t"] = ids - torch.arange(len(ids))
            tensors["t2d"] = torch.zeros(self.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        return tensors

    @property
    def layer_fields(self) -> dict[str, Any]:
        """As of a Llama or Qwen3 configuration."""
        return {
            "model_type": "qwen3" if self.has_head_norms else "llama",
            "hidden_size": self.channels,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": EPS,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "attention_bias": self.has_bias,
            "vocab_size": self.vocab_size,
        }

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size if self.drafts is None else len(self.drafts)


def save_speculators(folder: Path, head: TinyHead) -> Path:
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    fields = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": head.layer_fields,
        "draft_vocab_size": head.draft_vocab_size,
        "target_hidden_size": head.target_channels,
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        **{name: getattr(head, name) for name in names},
    }
    return _save(folder, fields, head.tensors)


def save_parallel(folder: Path, head: TinyHead, mask: int) -> Path:
    """As speculators writes a P-EAGLE head, of blocks of `BLOCK_SIZE`."""
    save_speculators(folder, head)
    fields = json.loads((folder / "config.json").read_text())
    proposals = [{"proposal_type": "greedy", "speculative_tokens": BLOCK_SIZE}]
    fields |= {"architectures": ["PEagleSpeculator"], "speculators_model_type": "peagle", "mask_token_id": mask}
    return _save(folder, {**fields, "speculators_config": {"proposal_methods": proposals}}, head.tensors)


def save_original(folder: Path, head: TinyHead, **more: Any) -> Path:
    """As EAGLE's authors do: no layers are named."""
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **head.layer_fields,
        "draft_vocab_size": head.draft_vocab_size,
        "target_hidden_size": head.target_channels,
        **more,
    }
    names = {name: name.replace("layers.0.", "midlayer.") for name in head.tensors}
    return _save(folder, fields, {names[name]: tensor for name, tensor in head.tensors.items()})


def save_specforge(folder: Path, head: TinyHead) -> Path:
    """Layers are numbered from 0."""
    ids = [layer - 1 for layer in head.layers]
    settings = {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}
    return save_original(folder, head, eagle_config=settings)


LAYOUTS = {"original": save_original, "speculators": save_speculators, "specforge": save_specforge}


def _save(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


# What a head computes, from nothing but its tensors


def reference_logits(
    head: TinyHead, target: PreTrainedModel, text: Sequence[int], drafted: Sequence[int], first: int = 0
) -> Tensor:
    """Logits [V] over what the head can draft after a text and drafted tokens, all computed again, without a cache.

    Args:
        first: tokens of the text whose states the head has not seen.
    """
    states_TC, tokens = _fused(head, _states(head, target, text, first)), list(text[first + 1 :])
    for token in (*drafted, None):
        output_TC = _layers(head, target, tokens, states_TC, first)
        normed_TC = _norm(head, "norm", output_TC)
        fed_back_TC = normed_TC if head.norm_output else output_TC
        states_TC = torch.cat([states_TC, fed_back_TC[-1:]])
        tokens.append(token)
    return normed_TC[-1] @ _table(head, target).T


def reference_slots(head: TinyHead, target: PreTrainedModel, text: Sequence[int], first: int, mask: int) -> Tensor:
    """Logits [S, V] of the slots of a P-EAGLE head after a text: of the last token, and of masks."""
    states_TX = _states(head, target, text, first)
    masks_MX = head.tensors["mask_hidden"][0].expand(BLOCK_SIZE - 1, -1)
    tokens = [*text[first + 1 :], *[mask] * len(masks_MX)]
    output_TC = _layers(head, target, tokens, _fused(head, torch.cat([states_TX, masks_MX])), first)
    return _norm(head, "norm", output_TC)[-BLOCK_SIZE:] @ _table(head, target).T


def _states(head: TinyHead, target: PreTrainedModel, text: Sequence[int], first: int) -> Tensor:
    hidden = hidden_states(target, tuple(text[:-1]))
    return torch.cat([hidden[layer][0, first:] for layer in sorted(head.layers)], -1)


def _table(head: TinyHead, target: PreTrainedModel) -> Tensor:
    return head.tensors.get("lm_head.weight", target.get_output_embeddings().weight)


def _fused(head: TinyHead, states_TX: Tensor) -> Tensor:
    if head.norm_before_fc:
        states_TX = _norm(head, "input_norm", states_TX)
    if head.fc_norm:
        parts = states_TX.split(head.target_channels, -1)
        states_TX = torch.cat([_norm(head, f"fc_norm.{index}", part) for index, part in enumerate(parts)], -1)
    return states_TX @ head.tensors["fc.weight"].T


def _layers(head: TinyHead, target: PreTrainedModel, tokens: Sequence[int], states_TC: Tensor, first: int) -> Tensor:
    table = head.tensors.get("embed_tokens.weight", target.get_input_embeddings().weight)
    embeds_TC = table[torch.tensor(list(tokens))]
    for index in range(head.num_layers):
        normed_TC = _norm(head, "layers.0.hidden_norm" if index == 0 else f"layers.{index}.input_layernorm", states_TC)
        if index == 0:
            inputs = torch.cat([_norm(head, "layers.0.input_layernorm", embeds_TC), normed_TC], -1)
            states_TC = normed_TC if head.norm_before_residual else states_TC
        else:
            inputs = normed_TC
        states_TC = states_TC + _attention(head, f"layers.{index}.self_attn", inputs, first)
        inputs = _norm(head, f"layers.{index}.post_attention_layernorm", states_TC)
        gate, up, down = (head.tensors[f"layers.{index}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        states_TC = states_TC + (silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
    return states_TC


def _attention(head: TinyHead, name: str, inputs: Tensor, first: int) -> Tensor:
    def project(part: str, x: Tensor) -> Tensor:
        bias = head.tensors.get(f"{name}.{part}_proj.bias", torch.zeros(()))
        return x @ head.tensors[f"{name}.{part}_proj.weight"].T + bias

    q, k, v = (project(part, inputs).unflatten(-1, (-1, head.head_dim)).transpose(0, 1) for part in "qkv")
    if head.has_head_norms:
        q, k = _norm(head, f"{name}.q_norm", q), _norm(head, f"{name}.k_norm", k)
    positions = first + torch.arange(len(inputs))
    q, k = (_rotate(x, positions, head.head_dim) for x in (q, k))
    k, v = (x.repeat_interleave(head.num_heads // head.num_kv_heads, 0) for x in (k, v))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    return project("o", mixed.transpose(0, 1).flatten(1))


def _rotate(x: Tensor, positions: Tensor, size: int) -> Tensor:
    angles = positions[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _norm(head: TinyHead, name: str, x: Tensor) -> Tensor:
    weight = head.tensors[f"{name}.weight"]
    return rms_norm(x, weight.shape, weight, EPS)


# What a head at work has said


@lru_cache(maxsize=256)
def hidden_states(target: PreTrainedModel, text: tuple[int, ...]) -> Sequence[Tensor]:
    """[1, T, C] after every number of layers, 0 and more; but the last are normed."""
    with torch.no_grad():
        return target(torch.tensor([text]), output_hidden_states=True).hidden_states


@dataclass(frozen=True)
class Said:
    """Logits of a row over the target's vocabulary, after its text and some drafted tokens.

    Args:
        first: tokens of the text whose states the head has not seen.
    """

    text: tuple[int, ...]
    first: int
    drafted: tuple[int, ...]
    logits_V: Tensor


class Listener:
    """Takes down all that heads say, while `monkeypatch` lasts."""

    def __init__(self, monkeypatch: Any):
        self.said: list[Said] = []
        score_root, score_nodes = _EagleSession._score_root, _EagleSession._score_nodes

        def listen_to_root(session: Any) -> Tensor:
            logits_B1V = score_root(session)
            for row, (text, first) in _rows(session):
                self.said.append(Said(text, first, (), logits_B1V[row, 0].clone()))
            return logits_B1V

        def listen_to_nodes(session: Any, grown: GrowingTrees) -> Tensor:
            logits_BMV = score_nodes(session, grown)
            for row, (text, first) in _rows(session):
                tree = grown.single_row(row).row(0)
                for logits_V, slot in zip(logits_BMV[row], grown.newest, strict=True):
                    path = tuple(tree.tokens[node] for node in tree.path(slot - 1))
                    self.said.append(Said(text, first, path, logits_V.clone()))
            return logits_BMV

        monkeypatch.setattr(_EagleSession, "_score_root", listen_to_root)
        monkeypatch.setattr(_EagleSession, "_score_nodes", listen_to_nodes)

    def sample(self) -> list[Said]:
        return self.said[:: max(1, len(self.said) // MOST_CHECKED)]

    def check(self, head: TinyHead, target: PreTrainedModel, bound: float = 1e-5) -> None:
        """It is what the reference says. Of much, samples."""
        exact = replace(head, tensors={name: tensor.to(target.dtype) for name, tensor in head.tensors.items()})
        for said in self.sample():
            expected_V = reference_logits(exact, target, said.text, said.drafted, said.first)
            error = (said.logits_V - expected_V).abs().max()
            assert error <= bound * (1 + expected_V.abs().max()), f"{error:.2e} after {said.text}, {said.drafted}"


def _rows(session: Any) -> Iterator[tuple[int, tuple[tuple[int, ...], int]]]:
    """Text and first position of each row that has been read."""
    firsts = (-session._runner._lag_AB[0]).tolist()
    for row, (text, first) in enumerate(zip(session._run.sequences.tokens, firsts, strict=True)):
        if session._runner.cache.lengths[row]:
            yield row, (tuple(text), first)


def take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every `Auto` choose plain decoding and each of its drafters in turn."""
    turns = itertools.count()

    def choose(auto: Any, context: Any, offer: Any) -> Any:
        rounds = (source._round(source._known.history.mean, context) for source in auto._models)
        plans = [context.plain, *filter(None, [offer]), *rounds]
        return plans[next(turns) % len(plans)] if max(context.max_depths) else context.plain

    monkeypatch.setattr("specdec.drafters.auto.drafter._AutoSession._choose", choose)
