"""Writes a trained head in the format of speculators, which vLLM reads and `DraftHead` too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from specdec.drafters.head.dspark import DSpark

_VERSION = "0.9.0"
"""Of speculators, whose fields these are."""


def save_block_head(
    folder: Path, head: DSpark, target: PreTrainedModel, name: str, training: Mapping[str, Any]
) -> None:
    """Write a DSpark head: config.json, model.safetensors in bfloat16, and what was done to train it.

    Args:
        folder: is made.
        name: of the target, a path or hub id.
        training: anything that json takes.
    """
    config = head.head_config
    layers = config.layers.to_dict()
    fields = {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": config.kind,
        "speculators_version": _VERSION,
        "speculators_config": _proposal(config.kind, config.longest_draft or 1, target, name),
        "transformer_layer_config": {key: value for key, value in layers.items() if key not in _NOT_KEPT},
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
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    tensors = {name: weight.detach().cpu().bfloat16().contiguous() for name, weight in head.named_parameters()}
    assert head.vocab_ids is not None
    ids = head.vocab_ids.cpu()
    if len(ids) < config.vocab_size:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(training, indent=2), encoding="utf-8")


_NOT_KEPT = ("architectures", "transformers_version", "_name_or_path", "dtype")


def _proposal(kind: str, length: int, target: PreTrainedModel, name: str) -> dict[str, Any]:
    return {
        "algorithm": kind,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": length}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": name, "architectures": list(target.config.architectures or ())},
    }
