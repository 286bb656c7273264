"""Writes a trained head in the format of speculators, where it has one, which vLLM reads and `DraftHead` too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.formats import DSPARK, EAGLE3, FROM_SPECDEC, JUMP, MTP, HeadConfig
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp import Mtp
from specdec.drafters.head.quantised import SCALE

_VERSION = "0.9.0"
"""Of speculators, whose fields these are."""


def save_head(
    folder: Path,
    head: DSpark | Eagle3 | Mtp | Jump,
    target: PreTrainedModel,
    name: str,
    training: Mapping[str, Any],
    length: int,
    *,
    quantize: bool = False,
) -> None:
    """Write a head: config.json, model.safetensors in bfloat16, and what was done to train it. The LM head of a jump
    head is the target's own rows, which need not be written.

    Args:
        quantize: weights of layers have 8 bits and a scale for each row, as they are run beside a prepared target: a
            half of the size. What reads the target's states keeps its bits, and only specdec reads such a file.
        folder: is made.
        name: of the target, a path or hub id.
        training: anything that json takes.
        length: tokens that it is to draft.
    """
    config = head.head_config
    layers = {key: value for key, value in config.layers.to_dict().items() if key not in _NOT_KEPT}
    fields = {
        **_proposal(config.kind, length, target, name),
        "transformer_layer_config": layers,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        **_FIELDS[config.kind](config, target),
    }
    named = {stored_name(part, config.kind): weight for part, weight in head.named_parameters()}
    if config.kind == JUMP:
        named.pop("lm_head.weight", None)
    tensors = {part: weight.detach().cpu().bfloat16().contiguous() for part, weight in named.items()}
    if quantize:
        for part in [part for part, weight in tensors.items() if weight.dim() == 2 and not part.startswith(_KEPT)]:
            tensors[part], tensors[f"{part}{SCALE}"] = _quantized(named[part])
    if head.vocab_ids is not None and len(ids := head.vocab_ids.cpu()) < config.vocab_size:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(training, indent=2), encoding="utf-8")


_KEPT = ("fc.", "lm_head.", "embed_tokens.")


def _quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K], and float32 scales [N, 1]."""
    weight_NK = weight_NK.detach().cpu().float()
    scale_N1 = weight_NK.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight_NK / scale_N1).round().to(torch.int8), scale_N1


def _block_fields(config: HeadConfig, target: PreTrainedModel) -> dict[str, Any]:
    return {
        "architectures": ["DSparkSpeculator"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "aux_hidden_state_layer_ids": list(config.state_layers or ()),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.drafts_at_root,
        "markov_rank": config.markov_rank,
        "markov_head_type": "gated" if config.markov_is_gated else "vanilla",
        "enable_confidence_head": config.has_confidence,
        "confidence_head_with_markov": config.confidence_reads_token,
    }


def _eagle_fields(config: HeadConfig, target: PreTrainedModel) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.state_layers or ()),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }


def _mtp_fields(config: HeadConfig, target: PreTrainedModel) -> dict[str, Any]:
    """The state that is read is told by the number of the target's layers."""
    layers = {key: value for key, value in config.layers.to_dict().items() if key not in _NOT_KEPT}
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    layers |= {"num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    return {"architectures": ["MTPDraftModel"], "transformer_layer_config": layers, "num_nextn_predict_layers": 1}


def _jump_fields(config: HeadConfig, target: PreTrainedModel) -> dict[str, Any]:
    (layer,) = config.state_layers or ()
    return {
        "architectures": ["JumpHead"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "state_layer": layer,
    }


_FIELDS = {DSPARK: _block_fields, EAGLE3: _eagle_fields, MTP: _mtp_fields, JUMP: _jump_fields}
_MTP_PARTS = {
    "enorm.": "token_layernorm.",
    "hnorm.": "hidden_layernorm.",
    "fc.": "input_proj.",
    "norm.": "final_layernorm.",
    "block.": "",
}


def stored_name(part: str, kind: str) -> str:
    """The name of a head's tensor in the file."""
    if kind != MTP:
        return part
    ours = next(ours for ours in _MTP_PARTS if part.startswith(ours))
    return f"mtp_layers.0.{_MTP_PARTS[ours]}{part.removeprefix(ours)}"


_NOT_KEPT = ("architectures", "transformers_version", "_name_or_path", "dtype")


def _proposal(kind: str, length: int, target: PreTrainedModel, name: str) -> dict[str, Any]:
    """What speculators says of every head; it has no jump heads."""
    if kind == JUMP:
        return {FROM_SPECDEC: kind, "target": name}
    proposal = {
        "algorithm": kind,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": length}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": name, "architectures": list(target.config.architectures or ())},
    }
    return {"speculators_model_type": kind, "speculators_version": _VERSION, "speculators_config": proposal}
