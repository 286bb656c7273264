"""A trained early exit: what it computes, and the file that holds it.

After the first `layer` layers the residual stream of a position is fused with the target's last state of the position
before it, or while drafting with the exit's own; one decoder layer of the model's own class follows, then the model's
own final norm, and a head of the most frequent tokens only. The idea of feeding back the last state is EAGLE's
(Li et al. 2024, section 3); here it is given a few layers of the target's own work, which verification reuses.

Shape legend: B rows, T positions, C channels, V draft vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.errors import DraftError, UnsupportedModelError
from specdec.kernels.model.quantized_linear import QuantizedLinear
from specdec.tree_model.layer_views import LayerViews

FORMAT = "1"


class Exit(nn.Module):
    """An exit after the first `layer` decoder layers (0: after the embeddings).

    Attributes:
        fuse: [h, f] -> C, where h is the residual stream at a position (its token is known) and f the target's last
            layer's output, before the final norm, at the position before it (zeros before the first one).
        block: a decoder layer; keys and values are its own, as layer 0. Its output stands for f at this position.
        norm: the model's final norm, shared.
        head: C -> V, rows of the model's own.
        vocab_ids: int64 [V], increasing: the token that each output stands for.
        window: how many positions back the block was trained to look.
    """

    head: nn.Linear
    vocab_ids: Tensor

    def __init__(self, model: PreTrainedModel, layer: int, vocab_ids: Tensor, window: int):
        super().__init__()
        weight = next(model.parameters())
        channels = model.config.get_text_config(decoder=True).hidden_size
        self.layer = layer
        self.window = window
        self.fuse = nn.Linear(2 * channels, channels, bias=False)
        self.block = _new_block(model)
        self.norm = final_norm(model)
        self.head = restricted_head(model, vocab_ids)
        self.register_buffer("vocab_ids", vocab_ids.to(weight.device), persistent=False)
        for own in (self.fuse, self.block, self.head):
            own.to(weight).requires_grad_(False).eval()


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart by their sizes and the weights of their final norm.

    The same for a model loaded in float32 or bfloat16, prepared or not, and from a GGUF file (which keeps norms exact).
    """
    config = model.config.get_text_config(decoder=True)
    sizes = config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size
    norm, embedding = final_norm(model), model.get_input_embeddings()
    digest = hashlib.sha256(repr(sizes).encode())
    with align_module_device(norm), align_module_device(embedding):  # accelerate may keep them elsewhere
        for weight in list(norm.parameters()) or [embedding.weight[:64]]:
            digest.update(weight.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_exits(
    path: str | os.PathLike[str], exits: Sequence[Exit], model: PreTrainedModel, metadata: Mapping[str, Any]
) -> None:
    """Write exits of one model; a file that was there is replaced at once or not at all.

    Matrices are kept as int8 with one scale for each output, which is what an int8 model uses anyway.

    Args:
        metadata: what is to be remembered about the training; anything that json takes.
    """
    tensors: dict[str, Tensor] = {"vocab_ids": exits[0].vocab_ids.int()}
    for index, exit_ in enumerate(exits):
        for name, weight in own_weights(exit_).items():
            tensors |= _pack(f"{index}.{name}", weight)
    facts = {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "layers": json.dumps([exit_.layer for exit_ in exits]),
        "window": str(exits[0].window),
        "training": json.dumps(metadata),
    }
    unfinished = Path(path).with_name(f"{Path(path).name}.part")
    unfinished.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, facts))
    unfinished.replace(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `save_exits` wrote about a file: format, fingerprint, layers, window and training, each as json.

    Raises:
        DraftError: the file is missing, unreadable, or no file of exits.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DraftError(f"cannot read the exits in {os.fspath(path)}: {error}") from error
    if facts.get("format") != FORMAT:
        raise DraftError(
            f"{os.fspath(path)} holds no exits of format {FORMAT}: give a file written by "
            "`specdec train-head --kind exit`"
        )
    return facts


def load_exits(path: str | os.PathLike[str], model: PreTrainedModel) -> list[Exit]:
    """The exits in a file, for the model that they were trained on, in its dtype and on its device.

    Raises:
        DraftError: the file cannot be read, or was made for another model; or the model's weights are not at hand.
    """
    facts = read_metadata(path)
    if facts.get("fingerprint") != fingerprint(model):
        raise DraftError(
            f"the exits in {os.fspath(path)} were trained on another model (fingerprint {facts.get('fingerprint')}, "
            f"this one has {fingerprint(model)}): train exits for this one with `specdec train-head --kind exit`"
        )
    shared = model.get_input_embeddings(), model.get_output_embeddings(), final_norm(model)
    if any(weights.is_meta for part in shared for weights in part.parameters()):
        raise DraftError(
            "accelerate has offloaded the model's embeddings, head or final norm, which trained exits share: keep them "
            "in memory (device_map=), or draft with the model's own head, EarlyExit(exits=None)"
        )
    try:
        return _read_exits(path, facts, model)
    except Exception as error:  # a damaged file can fail anywhere: a missing tensor, a wrong shape, no number
        raise DraftError(
            f"the exits in {os.fspath(path)} are damaged ({type(error).__name__}: {error}): train them again"
        ) from error


def _read_exits(path: str | os.PathLike[str], facts: Mapping[str, str], model: PreTrainedModel) -> list[Exit]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    exits = []
    for index, layer in enumerate(json.loads(facts["layers"])):
        exit_ = Exit(model, layer, tensors["vocab_ids"].long(), int(facts["window"]))
        weights = {name: _unpack(f"{index}.{name}", tensors) for name in own_weights(exit_)}
        exit_.load_state_dict(weights, strict=False)
        exits.append(exit_)
    return exits


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head.

    Raises:
        UnsupportedModelError: there is none under a known name.
    """
    norm = LayerViews(model).final_norm
    if norm is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no final norm under a known name: it takes no exits")
    return norm


def _new_block(model: PreTrainedModel) -> nn.Module:
    """A layer like the model's last, with weights of its own, that keeps its keys and values as layer 0."""
    config = model.config.get_text_config(decoder=True)
    last = config.num_hidden_layers - 1
    block = type(LayerViews(model).layers[last])(config, layer_idx=last)
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    return block


def restricted_head(model: PreTrainedModel, vocab_ids: Tensor) -> nn.Linear:
    """The model's LM head for some tokens only, in the dtype of torch's default."""
    whole: Any = model.get_output_embeddings()
    restricted = nn.Linear(whole.in_features, len(vocab_ids), bias=whole.bias is not None)
    with torch.no_grad():
        restricted.weight.copy_(_rows(whole, vocab_ids))
        if whole.bias is not None:
            restricted.bias.copy_(whole.bias[vocab_ids])
    return restricted


def _rows(linear: nn.Linear | QuantizedLinear, ids: Tensor) -> Tensor:
    """Rows of a linear's weights; of a quantised one, which does not have them, from its products with unit vectors."""
    if isinstance(linear, nn.Linear):
        return linear.weight[ids]
    bias = 0 if linear.bias is None else linear.bias[ids]
    units = torch.eye(linear.in_features).split(64)
    return torch.cat([(linear(part)[:, ids] - bias).T for part in units], 1)


def own_weights(exit_: Exit) -> dict[str, Tensor]:
    return {name: weight for name, weight in exit_.state_dict().items() if name.startswith(("fuse.", "block."))}


def _pack(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.dim() != 2:
        return {name: weight}
    scale_N1 = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: (weight / scale_N1).round().to(torch.int8), f"{name}.scale": scale_N1}


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    scale_N1 = tensors.get(f"{name}.scale")
    return tensors[name] if scale_N1 is None else tensors[name] * scale_N1
