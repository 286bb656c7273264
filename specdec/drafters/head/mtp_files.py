"""Where checkpoints keep layers for multi-token prediction (MTP), and how one is read.

Some models were trained with a layer more, which reads the last state and the next token, and are published with it.
Their own class in transformers leaves it alone. Projects name its parts in several ways; they are told apart by the
names of the tensors, since no field says it reliably. The layer inside is one of the model's own class, whose tensors
transformers renames and packs (experts) as it does the model's.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from specdec.drafters.head.formats import MTP, HeadConfig, read_fields
from specdec.drafters.head.quantised import dequantised
from specdec.errors import DraftError

BLOCK = "block."
_INDEX = "model.safetensors.index.json"
_UNREAD = ("embed_tokens.", "shared_head.head.", "shared_head.weight", "lm_head.", "mtp_block.embed_tokens.")
"""The target's, once more."""

_DEEPSEEK = {"enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "fc.", "shared_head.norm.": "norm."}
_TRANSFORMERS = {"enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "fc.", "post_norm.": "norm."}
_QWEN = {"pre_fc_norm_embedding.": "enorm.", "pre_fc_norm_hidden.": "hnorm.", "fc.": "fc.", "norm.": "norm."}
_MIMO = {"token_layernorm.": "enorm.", "hidden_layernorm.": "hnorm.", "input_proj.": "fc.", "final_layernorm.": "norm."}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How a project names an MTP layer's tensors.

    Args:
        found_by: matches the name of the norm of the state; its group is what the names of all parts begin with.
        parts: what follows there -> our name.
        block: what follows there for the decoder layer inside.
        feeds_normed: whether what is fed back to draft the next token is normed (as vLLM does for such checkpoints).
        hidden_first: whether the projection reads the state before the embedding.
    """

    found_by: str
    parts: Mapping[str, str]
    block: str = ""
    feeds_normed: bool = True
    hidden_first: bool = False


_LAYOUTS = (
    _Layout(found_by=r"(mtp_layers\.\d+\.)hidden_layernorm\.weight", parts=_MIMO),  # speculators
    _Layout(found_by=r"(model\.mtp_layers\.\d+\.)hidden_layernorm\.weight", parts=_MIMO, hidden_first=True),
    _Layout(found_by=r"(.*\bmtp\.)pre_fc_norm_hidden\.weight", parts=_QWEN, block="layers.0."),
    _Layout(found_by=r"(layers\.\d+\.)hnorm\.weight", parts=_TRANSFORMERS, block="mtp_block."),
    _Layout(found_by=r"()pre_fc_norm_hidden\.weight", parts=_QWEN, block="layers.0..)"),  # as 5.23 saves MtpModel
    _Layout(found_by=r"(.*\blayers\.\d+\.)hnorm\.weight", parts=_DEEPSEEK, feeds_normed=False),
)


def holds_mtp(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an MTP layer that can be read, of a model in it or by itself."""
    try:
        return _find(_files_by_name(Path(folder))) is not None
    except DraftError:
        return False


def read_mtp(folder: str | os.PathLike[str]) -> tuple[HeadConfig, list[dict[str, Tensor]]] | None:
    """The configuration of MTP layers, and the tensors of each by the names of `mtp.Mtp`; None if there is none.

    Raises:
        DraftError: it is damaged, or inside a model that transformers does not know.
    """
    files = _files_by_name(Path(folder))
    found = _find(files)
    if found is None:
        return None
    layout, prefixes = found
    names = [_names(files, layout, prefix) for prefix in prefixes]
    fields = read_fields(folder)
    try:
        config = replace(_config(fields, layout, names[0].values()), num_mtp_layers=len(names))
        layers = [dequantised(_read(files, own), fields) for own in names]
        config.layers.dtype = layers[0]["fc.weight"].dtype
        return config, [_converted(config.layers, tensors) for tensors in layers]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DraftError(
            f"the MTP layer in {os.fspath(folder)} cannot be used ({type(error).__name__}: {error})"
        ) from error


def block_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of one layer, the one inside, whose weights have no memory; of its embeddings there is one row."""
    small = copy.deepcopy(config)
    small.vocab_size, small.pad_token_id, small.tie_word_embeddings = 1, None, False
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small)
    return model


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Every tensor's file, without reading any."""
    index = folder / _INDEX
    try:
        if index.exists():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        found: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), path)
        return found
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise DraftError(f"cannot read the head in {folder}: {error}") from error


def _find(names: Collection[str]) -> tuple[_Layout, list[str]] | None:
    """The layout, and what the names of each layer's parts begin with."""
    for layout in _LAYOUTS:
        prefixes = [match[1] for name in names if (match := re.fullmatch(layout.found_by, name))]
        prefixes = [prefix for prefix in prefixes if any(name.startswith(prefix + layout.block) for name in names)]
        if prefixes:
            return layout, sorted(prefixes, key=lambda prefix: ([int(n) for n in re.findall(r"\d+", prefix)], prefix))
    return None


def _names(files: Collection[str], layout: _Layout, prefix: str) -> dict[str, str]:
    """Ours of the tensors of one layer."""
    ours = {stored: _our_name(stored.removeprefix(prefix), layout) for stored in files if stored.startswith(prefix)}
    return {stored: name for stored, name in ours.items() if name is not None}


def _our_name(name: str, layout: _Layout) -> str | None:
    for theirs, ours in layout.parts.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if not name.startswith(layout.block) or name.startswith(_UNREAD) or "rotary_emb." in name:
        return None
    return BLOCK + name.removeprefix(layout.block)


def _config(fields: Mapping[str, Any], layout: _Layout, names: Collection[str]) -> HeadConfig:
    if fields.get("mtp_use_dedicated_embeddings"):
        raise ValueError("it has embeddings of its own, which are not read yet")
    model_fields = dict(fields.get("transformer_layer_config", fields))
    if layout.hidden_first:  # MiMo, whose layers are those of Qwen2
        model_fields["model_type"] = "qwen2"
    ours = {name: value for name, value in model_fields.items() if name not in ("architectures", "auto_map")}
    ours.pop("quantization_config", None)
    whole = type(AutoConfig.for_model(ours["model_type"])).from_dict(ours)
    layers = _of_one_layer(whole.get_text_config(decoder=True), names)
    return HeadConfig(
        kind=MTP,
        layers=layers,
        vocab_size=layers.vocab_size,
        draft_vocab_size=layers.vocab_size,
        target_hidden_size=layers.hidden_size,
        state_layers=None,
        norm_output=layout.feeds_normed,
        hidden_first=layout.hidden_first,
    )


def _of_one_layer(config: PreTrainedConfig, names: Collection[str]) -> PreTrainedConfig:
    """The model's configuration, of one layer: with experts if there are some, and attention to all that came before
    unless it says otherwise."""
    layers, has_experts = copy.deepcopy(config), any(".experts." in name for name in names)
    kinds = {
        "layer_types": getattr(config, "mtp_layer_types", None) or ["full_attention"],
        "mlp_layer_types": ["sparse" if has_experts else "dense"],
        "first_k_dense_replace": 0 if has_experts else 1,
        "mlp_only_layers": [] if has_experts else [0],
        "decoder_sparse_step": 1,
    }
    layers.num_hidden_layers = 1
    for name, value in kinds.items():
        if getattr(config, name, None) is not None:
            setattr(layers, name, value[:1] if isinstance(value, list) else value)
    return layers


def _read(files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted({files[name] for name in names}):
        try:
            with safe_open(path, framework="pt") as opened:
                stored = names.keys() & set(opened.keys())
                tensors |= {names[name]: opened.get_tensor(name) for name in stored}
        except (OSError, SafetensorError) as error:
            raise DraftError(f"cannot read the head in {path}: {error}") from error
    if len(tensors) < len(names):
        raise ValueError(f"{', '.join(sorted(set(names.values()) - tensors.keys()))} is missing")
    return tensors


def _converted(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder layer's tensors as transformers' class has them."""
    inside = block_model(config)
    path = next(name for name, module in inside.named_modules() if module is inside.get_decoder())
    layer = f"{path}.layers.0."
    named = {layer + name.removeprefix(BLOCK): tensor for name, tensor in tensors.items() if name.startswith(BLOCK)}
    others = {name: torch.zeros(weight.shape) for name, weight in inside.state_dict().items() if layer not in name}
    dtype = tensors["fc.weight"].dtype
    with _quiet():
        loaded, info = type(inside).from_pretrained(
            None,
            config=inside.config,
            state_dict={**named, **others},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else only a table says which
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{', '.join(sorted(wrong))} is missing, is one too many, or has another shape")
    block = {BLOCK + name: tensor for name, tensor in loaded.get_decoder().layers[0].state_dict().items()}
    return {**block, **{name: tensor for name, tensor in tensors.items() if not name.startswith(BLOCK)}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and table."""
    enabled, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if enabled:
            hf_logging.enable_progress_bar()
