"""What the checkpoints of draft heads say of themselves.

Several projects write the same network under different names, and one field, the layers whose states are read, in two
meanings. Here each layout is told apart by its config.json and brought to one description. Weights are read from
safetensors files only: unpickling a checkpoint can run any code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from specdec.drafters.head.quantised import dequantised
from specdec.errors import DraftError

EAGLE3 = "eagle3"
PEAGLE = "peagle"
DFLASH = "dflash"
DSPARK = "dspark"
MTP = "mtp"
JUMP = "jump"

_LAYOUTS = (
    "EAGLE-3 (as its authors, SpecForge or speculators write it), P-EAGLE (speculators), DFlash and DSpark (their "
    "authors, speculators), MTP layers, jump heads of specdec"
)
_FROM_SPECULATORS = "speculators_model_type"
FROM_SPECDEC = "specdec_head"
_FROM_SPECFORGE = "eagle_config"
_DFLASH_SETTINGS = "dflash_config"
_MARKOV_RANK = 256
_PEAGLE_DEPTHS = 8
_STATE_LAYERS = "eagle_aux_hidden_state_layer_ids"
_RENAMED = {"midlayer.": "layers.0.", "model.": ""}
_UNREAD = ("t2d", "rotary_emb.", "verifier_", "layers.0.self_attn.rotary_emb.")
"""Tensors that say nothing new: which target tokens have a draft id, tables of rotations, parts of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """One head, whoever has written it.

    Args:
        kind: `EAGLE3`, `PEAGLE`, `DFLASH`, `DSPARK`, `MTP` or `JUMP`.
        layers: of the head's own decoder layers: sizes, rotation, number.
        vocab_size: of the target that it was trained on.
        draft_vocab_size: tokens that it can draft.
        target_hidden_size: channels of the states that it reads.
        state_layers: after how many of the target's layers those states are taken (1 and more, before the final norm),
            increasing; None: where heads of its kind take them.
        norm_before_residual: whether the residual stream begins with the normed state.
        norm_before_fc: a norm over all of a position's states; `fc_norm`: one for each of them.
        norm_output: whether what is fed back to draft the next token is normed.
        hidden_first: whether an MTP layer's projection reads the state before the embedding.
        num_mtp_layers: of which each drafts one token, if there are several.
        block_size: of a head that drafts blocks, the newest token included; `mask_token_id` fills it up.
        is_causal: whether the positions of a block see only those before them.
        drafts_at_root: whether the newest token's own position drafts too.
        markov_rank: of what a DSpark head makes of the token before; 0: it makes nothing of it.
        markov_is_gated: whether that depends on the slot.
        has_confidence: whether it says how likely its tokens are accepted; `confidence_reads_token`: from the token
            before, too.
    """

    kind: str
    layers: PreTrainedConfig
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    state_layers: tuple[int, ...] | None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    hidden_first: bool = False
    num_mtp_layers: int = 1
    block_size: int = 0
    mask_token_id: int = 0
    is_causal: bool = False
    drafts_at_root: bool = False
    markov_rank: int = 0
    markov_is_gated: bool = False
    has_confidence: bool = False
    confidence_reads_token: bool = False

    @property
    def num_states(self) -> int:
        """Of a position, of so many layers."""
        if self.state_layers is not None:
            return len(self.state_layers)
        return {EAGLE3: 3, PEAGLE: 3, MTP: 1}.get(self.kind, self.layers.num_hidden_layers)

    @property
    def num_inputs(self) -> int:
        """Channels that its first projection reads: of the states, and beside them of the embedding in some."""
        return self.num_states * self.target_hidden_size + (self.layers.hidden_size if self.kind in (MTP, JUMP) else 0)

    @property
    def longest_draft(self) -> int | None:
        """Tokens that it can draft in a row; None: any number."""
        if self.num_mtp_layers > 1:
            return self.num_mtp_layers
        return self.block_size - 1 + self.drafts_at_root if self.block_size else None

    def layers_read(self, num_layers: int) -> tuple[int, ...]:
        """The target's layers whose states it reads, of a target that has so many."""
        if self.state_layers is not None:
            return self.state_layers
        if self.kind in (EAGLE3, PEAGLE):
            return tuple(sorted((2, num_layers // 2, num_layers - 3)))
        if self.kind == MTP:
            return (num_layers,)
        gaps = max(self.num_states - 1, 1)
        return tuple(2 + round(index * (num_layers - 4) / gaps) for index in range(self.num_states))


def is_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a head, or what calls itself one, rather than a model."""
    try:
        fields = read_fields(folder)
    except DraftError:
        return False
    return _FROM_SPECULATORS in fields or _kind(fields) is not None


def read_config(folder: str | os.PathLike[str]) -> HeadConfig:
    """What a head's config.json says.

    Raises:
        DraftError: there is none, or it is that of a head of another kind, or it lacks something.
    """
    fields = read_fields(folder)
    kind = fields.get(_FROM_SPECULATORS) or _kind(fields)
    if kind not in _READERS:
        what = "is no draft head" if kind is None else f"is a draft head of the kind {kind!r}"
        raise DraftError(f"{os.fspath(folder)} {what}: what can be read is {_LAYOUTS}")
    try:
        return _READERS[kind](fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DraftError(
            f"the configuration of the head in {os.fspath(folder)} cannot be used ({type(error).__name__}: {error})"
        ) from error


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a head by the names of the networks, without those that say nothing new; such as are stored in 8
    bits are float again.

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
    read = {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNREAD)}
    try:
        return dequantised(read, read_fields(folder))
    except ValueError as error:
        raise DraftError(f"the weights of the head in {os.fspath(folder)} cannot be used: {error}") from error


def read_fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json says; raises `DraftError` if there is none."""
    try:
        fields = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DraftError(
            f"cannot read the config.json of a head in {os.fspath(folder)}: {error}. Give a folder, or the id of a "
            "head on the hub (check the name and the network)"
        ) from error
    if not isinstance(fields, dict):
        raise DraftError(f"the config.json in {os.fspath(folder)} is no configuration")
    return fields


def _kind(fields: Mapping[str, Any]) -> str | None:
    """Of a head that another project than speculators has written."""
    if FROM_SPECDEC in fields:
        return str(fields[FROM_SPECDEC])
    names = " ".join(map(str, fields.get("architectures") or ())).lower()
    if "eagle3" in names or _FROM_SPECFORGE in fields:
        return EAGLE3
    if DSPARK in names:
        return DSPARK
    if "mtpmodel" in names:
        return MTP
    if _DFLASH_SETTINGS in fields:
        return DFLASH
    return next((kind for kind in ("dflash", "eagle", "medusa") if kind in names), None)


def _eagle3(fields: Mapping[str, Any]) -> HeadConfig:
    return _from_speculators(fields) if _FROM_SPECULATORS in fields else _from_eagle(fields)


def _sizes(kind: str, fields: Mapping[str, Any], layers: PreTrainedConfig) -> dict[str, Any]:
    return {
        "kind": kind,
        "layers": layers,
        "vocab_size": layers.vocab_size,
        "draft_vocab_size": fields.get("draft_vocab_size") or layers.vocab_size,
        "target_hidden_size": fields.get("target_hidden_size") or layers.hidden_size,
    }


def _dflash(fields: Mapping[str, Any]) -> HeadConfig:
    return HeadConfig(**_sizes(DFLASH, fields, _qwen3(fields)), **_block(fields, drafts_at_root=False))


def _dspark(fields: Mapping[str, Any]) -> HeadConfig:
    rank = int(fields.get("markov_rank", _MARKOV_RANK) or 0)
    family = fields.get("markov_head_type", "vanilla")
    has_confidence = bool(fields.get("enable_confidence_head", True))
    reads_token = has_confidence and bool(fields.get("confidence_head_with_markov", True))
    if family not in ("vanilla", "gated"):
        raise ValueError(f"a Markov head of the kind {family!r}, which is not read yet")
    if reads_token and not rank:
        raise ValueError("a confidence head that reads a Markov head, and there is none")
    return HeadConfig(
        **_sizes(DSPARK, fields, _qwen3(fields)),
        **_block(fields, drafts_at_root=True),
        markov_rank=rank,
        markov_is_gated=family == "gated",
        has_confidence=has_confidence,
        confidence_reads_token=reads_token,
    )


def _block(fields: Mapping[str, Any], drafts_at_root: bool) -> dict[str, Any]:
    """Authors number layers from 0, by the layer that has just run; speculators counts those that have.

    Args:
        drafts_at_root: whether the newest token's position drafts where nothing is said about it.
    """
    if _FROM_SPECULATORS in fields:
        settings, state_layers = fields, _increasing(fields.get("aux_hidden_state_layer_ids"), 0)
    else:
        settings = {**fields, **(fields.get(_DFLASH_SETTINGS) or {})}
        state_layers = _increasing(settings.get("target_layer_ids"), 1)
    if settings.get("use_swa") or "sliding_attention" in (_qwen3(fields).layer_types or ()):
        raise ValueError("its layers have sliding windows, which are not read yet")
    if int(settings["block_size"]) < 2:
        raise ValueError(f"a block of {settings['block_size']}")
    return {
        "state_layers": state_layers,
        "block_size": int(settings["block_size"]),
        "mask_token_id": int(settings["mask_token_id"]),
        "is_causal": bool(settings.get("causal", False)),
        "drafts_at_root": bool(settings.get("sample_from_anchor", drafts_at_root)),
    }


def _qwen3(fields: Mapping[str, Any]) -> PreTrainedConfig:
    return _layer_config({**fields.get("transformer_layer_config", fields), "model_type": "qwen3"})


def _peagle(fields: Mapping[str, Any]) -> HeadConfig:
    """Of speculators; blocks are as long as those that it proposes to draft."""
    proposals = (fields.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return replace(
        _from_speculators(fields),
        kind=PEAGLE,
        block_size=int(proposals[0].get("speculative_tokens") or _PEAGLE_DEPTHS),
        mask_token_id=int(fields["mask_token_id"]),
        drafts_at_root=True,
    )


def _from_speculators(fields: Mapping[str, Any]) -> HeadConfig:
    """Layer L is the state after L layers; a field that is absent has the default of speculators."""
    layers = _layer_config({"model_type": "qwen3", **fields["transformer_layer_config"]})
    return HeadConfig(
        **_sizes(EAGLE3, fields, layers),
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
        **_sizes(EAGLE3, fields, layers),
        state_layers=state_layers,
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        norm_before_fc=bool(fields.get("norm_before_fc", settings.get("norm_before_fc", False))),
        fc_norm=bool(fields.get("fc_norm", settings.get("fc_norm", False))),
        norm_output=bool(fields.get("norm_output", settings.get("norm_output", False))),
    )


def _jump(fields: Mapping[str, Any]) -> HeadConfig:
    layers = _layer_config(fields["transformer_layer_config"])
    return HeadConfig(**_sizes(JUMP, fields, layers), state_layers=_increasing([fields["state_layer"]], 0))


_READERS = {EAGLE3: _eagle3, PEAGLE: _peagle, DFLASH: _dflash, DSPARK: _dspark, JUMP: _jump}


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
