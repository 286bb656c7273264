"""Tiny random DFlash and DSpark heads on disk, in the layouts of two projects, and what such a head computes, written
plainly.

Shape legend: T positions of the context, S slots of a block, M of them, C channels, X channels of all states, R rank,
V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from specdec.drafters.head.drafter import _BlockSession
from tests.support.heads import EPS, VOCAB_SIZE, hidden_states

SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, RANK = 32, 4, 2, 8, 6


@dataclass(frozen=True, kw_only=True)
class TinyBlockHead:
    """What varies between heads.

    Args:
        drafts: the target's tokens that it can draft; None for all, by the target's own LM head.
        markov: of a DSpark head: "vanilla", "gated", or "none" for confidence alone; None: it is a DFlash head.
    """

    block_size: int = 5
    layers: Sequence[int] = (1, 3, 4)
    num_layers: int = 2
    drafts: Sequence[int] | None = None
    is_causal: bool = False
    drafts_at_root: bool = False
    vocab_size: int = VOCAB_SIZE
    mask: int = VOCAB_SIZE - 1
    markov: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.tensors:
            self.tensors.update(self._draw())

    def _draw(self) -> dict[str, Tensor]:
        q_size, kv_size = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"fc": (SIZE, len(self.layers) * SIZE), "hidden_norm": (SIZE,)}
        shapes["norm"] = (SIZE,)
        for index in range(self.num_layers):
            attention = f"layers.{index}.self_attn"
            shapes |= {
                f"{attention}.{name}_proj": (size, SIZE)
                for name, size in zip("qkv", (q_size, kv_size, kv_size), strict=True)
            }
            shapes |= {f"{attention}.o_proj": (SIZE, q_size), f"{attention}.q_norm": (HEAD_DIM,)}
            shapes |= {f"{attention}.k_norm": (HEAD_DIM,)}
            shapes |= {f"layers.{index}.{name}_layernorm": (SIZE,) for name in ("input", "post_attention")}
            shapes |= {f"layers.{index}.mlp.{name}_proj": (48, SIZE) for name in ("gate", "up")}
            shapes[f"layers.{index}.mlp.down_proj"] = (SIZE, 48)
        if self.drafts is not None:
            shapes["lm_head"] = (len(self.drafts), SIZE)
        shapes |= self._dspark_shapes()
        generator = torch.Generator().manual_seed(3)
        tensors = {
            f"{name}.weight": 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in shapes.items()
        }
        for name in [
            name for name in tensors if "proj" in name and name.split(".")[0] in ("markov_head", "confidence_head")
        ]:
            tensors[name.replace("weight", "bias")] = 0.3 * torch.randn(len(tensors[name]), generator=generator)
        if self.drafts is not None:
            tensors["d2t"] = torch.tensor(self.drafts) - torch.arange(len(self.drafts))
        return tensors

    def _dspark_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.markov is None:
            return {}
        if self.markov == "none":
            return {"confidence_head.proj": (1, SIZE)}
        num_drafts = self.vocab_size if self.drafts is None else len(self.drafts)
        shapes = {"markov_w1": (self.vocab_size, RANK), "markov_w2": (num_drafts, RANK)}
        if self.markov == "gated":
            shapes["gate_proj"] = (RANK, SIZE + RANK)
        named = {f"markov_head.{name}": shape for name, shape in shapes.items()}
        return {**named, "confidence_head.proj": (1, SIZE + RANK)}

    @property
    def dspark_fields(self) -> dict[str, Any]:
        """As both projects write them."""
        if self.markov is None:
            return {}
        rank = 0 if self.markov == "none" else RANK
        kind = "gated" if self.markov == "gated" else "vanilla"
        return {"markov_rank": rank, "markov_head_type": kind, "confidence_head_with_markov": rank > 0}

    @property
    def layer_fields(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "hidden_size": SIZE,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": EPS,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "vocab_size": self.vocab_size,
        }


def save_authors(folder: Path, head: TinyBlockHead) -> Path:
    """Layers are numbered from 0."""
    settings = {
        "mask_token_id": head.mask,
        "target_layer_ids": [layer - 1 for layer in head.layers],
        "causal": head.is_causal,
        "sample_from_anchor": head.drafts_at_root,
    }
    fields = {**head.layer_fields, "block_size": head.block_size}
    if head.markov is None:
        fields |= {"architectures": ["DFlashDraftModel"], "dflash_config": settings}
    else:
        fields |= {"architectures": ["Qwen3DSparkModel"], **settings, **head.dspark_fields}
    if head.drafts is not None:
        fields["draft_vocab_size"] = len(head.drafts)
    return _save(folder, fields, head.tensors)


def save_block_speculators(folder: Path, head: TinyBlockHead) -> Path:
    fields = {
        "architectures": ["DFlashSpeculator" if head.markov is None else "DSparkSpeculator"],
        "speculators_model_type": "dflash" if head.markov is None else "dspark",
        **head.dspark_fields,
        "transformer_layer_config": head.layer_fields,
        "draft_vocab_size": head.vocab_size if head.drafts is None else len(head.drafts),
        "aux_hidden_state_layer_ids": list(head.layers),
        "block_size": head.block_size,
        "mask_token_id": head.mask,
        "sample_from_anchor": head.drafts_at_root,
    }
    return _save(folder, fields, head.tensors)


BLOCK_LAYOUTS = {"authors": save_authors, "speculators": save_block_speculators}


def _save(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def reference_block(
    head: TinyBlockHead, target: PreTrainedModel, text: Sequence[int], first: int, depths_M: Tensor, tokens_M: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits [M, V] over what the head can draft after a text, all computed again, without a cache.

    And, of a DSpark head, logits [M] of the chance that they are accepted.

    Args:
        first: tokens of the text whose states the head has not seen.
        depths_M: of slots.
        tokens_M: the token before each of them.
    """
    hidden = hidden_states(target, tuple(text[:-1]))
    states_TX = torch.cat([hidden[layer][0, first:] for layer in head.layers], -1)
    context_TC = _norm(head, "hidden_norm", states_TX @ head.tensors["fc.weight"].T)
    tokens = torch.tensor([text[-1], *[head.mask] * (head.block_size - 1)])
    block_SC = target.get_input_embeddings().weight[tokens]
    for index in range(head.num_layers):
        inputs_SC = _norm(head, f"layers.{index}.input_layernorm", block_SC)
        block_SC = block_SC + _attention(head, f"layers.{index}.self_attn", context_TC, inputs_SC, first)
        inputs_SC = _norm(head, f"layers.{index}.post_attention_layernorm", block_SC)
        gate, up, down = (head.tensors[f"layers.{index}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        block_SC = block_SC + (silu(inputs_SC @ gate.T) * (inputs_SC @ up.T)) @ down.T
    table = head.tensors.get("lm_head.weight", target.get_output_embeddings().weight)
    slots_MC = _norm(head, "norm", block_SC)[0 if head.drafts_at_root else 1 :][depths_M]
    logits_MV = slots_MC @ table.T
    if head.markov is None:
        return logits_MV, None
    inputs = slots_MC
    if head.markov != "none":
        known_MR = head.tensors["markov_head.markov_w1.weight"][tokens_M]
        inputs = torch.cat([slots_MC, known_MR], 1)
        if head.markov == "gated":
            known_MR = known_MR * _linear(head, "markov_head.gate_proj", inputs).sigmoid()
        logits_MV = logits_MV + known_MR @ head.tensors["markov_head.markov_w2.weight"].T
    return logits_MV, _linear(head, "confidence_head.proj", inputs)[:, 0]


def _linear(head: TinyBlockHead, name: str, x: Tensor) -> Tensor:
    return x @ head.tensors[f"{name}.weight"].T + head.tensors[f"{name}.bias"]


def _attention(head: TinyBlockHead, name: str, context_TC: Tensor, inputs_SC: Tensor, first: int) -> Tensor:
    weights = {part: head.tensors[f"{name}.{part}_proj.weight"] for part in "qkvo"}
    keys_KC = torch.cat([context_TC, inputs_SC])
    q = (inputs_SC @ weights["q"].T).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
    k, v = ((keys_KC @ weights[part].T).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for part in "kv")
    positions_K = first + torch.arange(len(keys_KC))
    q = _rotate(_norm(head, f"{name}.q_norm", q), positions_K[len(context_TC) :])
    k = _rotate(_norm(head, f"{name}.k_norm", k), positions_K)
    k, v = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0) for x in (k, v))
    mask_SK = torch.ones(len(inputs_SC), len(keys_KC), dtype=torch.bool)
    if head.is_causal:
        mask_SK = mask_SK.tril(len(context_TC))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_SK).transpose(0, 1).flatten(1) @ weights["o"].T


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _norm(head: TinyBlockHead, name: str, x: Tensor) -> Tensor:
    weight = head.tensors[f"{name}.weight"]
    return rms_norm(x, weight.shape, weight, EPS)


class Said(NamedTuple):
    """What was said of M slots of a row: text, tokens at its beginning that the head has not seen, logits [M, V] of all
    tokens, logits [M] of their acceptance."""

    text: tuple[int, ...]
    first: int
    depths_M: Tensor
    tokens_M: Tensor
    logits_MV: Tensor
    confidence_M: Tensor | None


class BlockListener:
    """Takes down what is said of slots, while `monkeypatch` lasts."""

    def __init__(self, monkeypatch: Any):
        self.said: list[Said] = []
        after = _BlockSession._after

        def listen(session: Any, depths_BM: Tensor, tokens_BM: Tensor) -> Tensor:
            logits_BMV = after(session, depths_BM, tokens_BM)
            firsts, lengths = (-session._runner._lag_AB[0]).tolist(), session._runner.cache.lengths
            for row, text in enumerate(session._run.sequences.tokens):
                if 0 < lengths[row] == len(text) - 1 - firsts[row]:
                    confidence_BM = session.confidence_BM
                    confidence_M = None if confidence_BM is None else confidence_BM[row].clone()
                    parts = (depths_BM[row].clone(), tokens_BM[row].clone(), logits_BMV[row].clone(), confidence_M)
                    self.said.append(Said(tuple(text), firsts[row], *parts))
            return logits_BMV

        monkeypatch.setattr(_BlockSession, "_after", listen)

    def check(self, head: TinyBlockHead, target: PreTrainedModel, bound: float = 1e-5) -> None:
        exact = replace(head, tensors={name: tensor.to(target.dtype) for name, tensor in head.tensors.items()})
        last = head.block_size - (1 if head.drafts_at_root else 2)
        for said in self.said:
            depths_M = said.depths_M.clamp(max=last)
            expected_MV, confidence_M = reference_block(exact, target, *said[:2], depths_M, said.tokens_M)
            pairs = [(said.logits_MV, expected_MV)]
            if confidence_M is not None:
                assert said.confidence_M is not None
                pairs.append((said.confidence_M, confidence_M))
            for actual, expected in pairs:
                error = (actual - expected).abs().max()
                assert error <= bound * (1 + expected.abs().max()), f"{error:.2e} after {said.text}"
