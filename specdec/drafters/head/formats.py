"""What the checkpoints of draft heads say of themselves.

Several projects write the same network under different names, and one field, the layers whose states are read, in two
meanings. Here each layout is told apart by its config.json and brought to one description. Weights are read from
safetensors files only: unpickling a checkpoint can run any code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from specdec.errors import DraftError

EAGLE3 = "eagle3"

_LAYOUTS = "EAGLE-3 (as its authors, SpecForge or speculators write it)"
_FROM_SPECULATORS = "speculators_model_type"
_FROM_SPECFORGE = "eagle_config"
_STATE_LAYERS = "eagle_aux_hidden_state_layer_ids"
_RENAMED = {"midlayer.": "layers.0.", "model.": ""}
_UNREAD = ("t2d", "rotary_emb.", "verifier_", "layers.0.self_attn.rotary_emb.")
"""Tensors that say nothing new: which target tokens have a draft id, tables of rotations, parts of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """One head, whoever has written it.

    Args:
        layers: of the head's own decoder layers: sizes, rotation, number.
        vocab_size: of the target that it was trained on.
        draft_vocab_size: tokens that it can draft.
        target_hidden_size: channels of the states that it reads.
        state_layers: after how many of the target's layers those states are taken (1 and more, before the final norm),
            increasing; None: after 2, after half of them, and 3 before the last.
        norm_before_residual: whether the residual stream begins with the normed state.
        norm_before_fc: a norm over all of a position's states; `fc_norm`: one for each of them.
        norm_output: whether what is fed back to draft the next token is normed.
    """

    layers: PreTrainedConfig
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    state_layers: tuple[int, ...] | None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def layers_read(self, num_layers: int) -> tuple[int, ...]:
        """The target's layers whose states it reads, of a target that has so many."""
        return self.state_layers or tuple(sorted((2, num_layers // 2, num_layers - 3)))


def is_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a head, or what calls itself one, rather than a model."""
    try:
        fields = _read_fields(folder)
    except DraftError:
        return False
    return _FROM_SPECULATORS in fields or _kind(fields) is not None


def read_config(folder: str | os.PathLike[str]) -> HeadConfig:
    """What a head's config.json says.

    Raises:
        DraftError: there is none, or it is that of a head of another kind, or it lacks something.
    """
    fields = _read_fields(folder)
    kind = fields.get(_FROM_SPECULATORS) or _kind(fields)
    if kind != EAGLE3:
        what = "is no draft head" if kind is None else f"is a draft head of the kind {kind!r}"
        raise DraftError(f"{os.fspath(folder)} {what}: what can be read is {_LAYOUTS}")
    try:
        return _from_speculators(fields) if _FROM_SPECULATORS in fields else _from_eagle(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DraftError(
            f"the configuration of the head in {os.fspath(folder)} cannot be used ({type(error).__name__}: {error})"
        ) from error


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a head by the names of `eagle.Eagle3`, without those that say nothing new.

    Raises:
        DraftError: there are no safetensors files, or one is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise DraftError(
            f"{os.fspath(folder)} holds no *.safetensors weights, and pickled ones are never read: convert them with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {_renamed(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DraftError(f"cannot read the head in {file}: {error}") from error
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNREAD)}


def _read_fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        fields = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DraftError(f"cannot read the config.json of a head in {os.fspath(folder)}: {error}") from error
    if not isinstance(fields, dict):
        raise DraftError(f"the config.json in {os.fspath(folder)} is no configuration")
    return fields


def _kind(fields: Mapping[str, Any]) -> str | None:
    """Of a head that another project than speculators has written."""
    names = " ".join(map(str, fields.get("architectures") or ())).lower()
    if "eagle3" in names or _FROM_SPECFORGE in fields:
        return EAGLE3
    return next((kind for kind in ("dflash", "dspark", "eagle", "medusa") if kind in names), None)


def _from_speculators(fields: Mapping[str, Any]) -> HeadConfig:
    """Layer L is the state after L layers; a field that is absent has the default of speculators."""
    layers = _layer_config({"model_type": "qwen3", **fields["transformer_layer_config"]})
    return HeadConfig(
        layers=layers,
        vocab_size=layers.vocab_size,
        draft_vocab_size=fields.get("draft_vocab_size") or layers.vocab_size,
        target_hidden_size=fields.get("target_hidden_size") or layers.hidden_size,
        state_layers=_increasing(fields.get(_STATE_LAYERS), 0),
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        norm_before_fc=bool(fields.get("norm_before_fc", False)),
        fc_norm=bool(fields.get("fc_norm", False)),
        norm_output=bool(fields.get("norm_output", False)),
    )


def _from_eagle(fields: Mapping[str, Any]) -> HeadConfig:
    """SpecForge (and SGLang) number layers from 0, by the layer that has just run; others count those that have."""
    settings = fields.get(_FROM_SPECFORGE) or {}
    ids = fields.get(_STATE_LAYERS)
    if settings.get(_STATE_LAYERS) is not None:
        state_layers = _increasing(settings[_STATE_LAYERS], 1)
    else:
        state_layers = _increasing(ids, 0)
    family = "qwen3" if fields.get("model_type") == "qwen3" else "llama"
    layers = _layer_config({"num_hidden_layers": 1, **fields, "model_type": family})
    return HeadConfig(
        layers=layers,
        vocab_size=layers.vocab_size,
        draft_vocab_size=fields.get("draft_vocab_size") or layers.vocab_size,
        target_hidden_size=fields.get("target_hidden_size") or layers.hidden_size,
        state_layers=state_layers,
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        norm_before_fc=bool(fields.get("norm_before_fc", settings.get("norm_before_fc", False))),
        fc_norm=bool(fields.get("fc_norm", settings.get("fc_norm", False))),
        norm_output=bool(fields.get("norm_output", settings.get("norm_output", False))),
    )


def _layer_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    ours = {name: value for name, value in fields.items() if name not in ("architectures", "auto_map", "torch_dtype")}
    config = type(AutoConfig.for_model(ours["model_type"])).from_dict(ours)
    if not 1 <= config.num_hidden_layers <= 16:
        raise ValueError(f"a head of {config.num_hidden_layers} layers")
    return config


def _increasing(ids: Any, offset: int) -> tuple[int, ...] | None:
    if ids is None:
        return None
    layers = tuple(sorted(int(layer) + offset for layer in ids))
    if not layers or layers[0] < 1 or len(set(layers)) < len(layers):
        raise ValueError(f"states after the layers {layers} of the target")
    return layers


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
