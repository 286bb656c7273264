"""What jump heads start from: the model's own layers, and the best linear maps before and after them.

Shape legend: B rows, T positions, C channels, D of a state and an embedding, V tokens that can be drafted.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.drafters.head.formats import JUMP
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp_files import block_model
from specdec.errors import UnsupportedModelError
from specdec.exits.module import final_norm
from specdec.training.heads.corpus import Corpus
from specdec.training.heads.initial import NUM_FIT_ROWS, copy_alike, linear_fit, new_head, seeded
from specdec.training.heads.recipes import JumpRecipe
from specdec.tree_model.layer_kinds import layer_kinds
from specdec.tree_model.layer_views import LayerViews

_SLICED = ("layer_types", "mlp_layer_types")


def jump_layers(recipe: JumpRecipe, num_layers: int) -> tuple[int, int]:
    """After how many layers a jump lands, and after how many the state is taken: at 0.7 of the model, as was best for
    Qwen2.5-0.5B with economize.

    Raises:
        ValueError: the model has too few layers.
    """
    start = max(round(0.7 * num_layers), recipe.num_layers + 1)
    if start > num_layers:
        raise ValueError(
            f"{num_layers} layers are too few for a jump with {recipe.num_layers}: give fewer --head-layers"
        )
    return start - recipe.num_layers, start


def check_jump(model: PreTrainedModel, layers: tuple[int, int]) -> None:
    """Raise `UnsupportedModelError` for a model whose layers cannot be called alone, or see no more than a window."""
    config = _config(model, layers)
    decoder: Any = block_model(config).get_decoder()
    names = ("layers", "norm", "rotary_emb")
    can_be_called = all(hasattr(decoder, name) for name in names) and hasattr(config, "rms_norm_eps")
    can_be_called = can_be_called and "layer_type" not in inspect.signature(decoder.rotary_emb.forward).parameters
    can_be_called = can_be_called and all(kind is not None and kind.sees_all for kind in layer_kinds(config))
    theirs = LayerViews(model).layers[slice(*layers)]
    if not (can_be_called and list(map(_shapes, theirs)) == list(map(_shapes, decoder.layers))):
        raise UnsupportedModelError(
            f"the layers {layers[0] + 1} to {layers[1]} of {type(model).__name__} cannot be called alone, with all "
            "that came before in sight, as a jump head calls them: train a head of another kind"
        )


def initial_jump(model: PreTrainedModel, vocab_ids: Tensor, recipe: JumpRecipe, corpus: Corpus) -> Jump:
    """A head that has the model's layers; `check_jump` has passed."""
    landing, start = corpus.layers
    layers = _config(model, (landing, start))
    with seeded(recipe.seed):
        head = new_head(Jump, JUMP, layers, (start,), model, vocab_ids)
        copy_alike(final_norm(model), head.norm)
        for mine, theirs in zip(head.layers, LayerViews(model).layers[landing:start], strict=True):
            mine.load_state_dict(theirs.state_dict())
        batch = corpus.batch(torch.arange(min(NUM_FIT_ROWS, corpus.num_rows)))
        embeds_BTC = F.embedding(batch.tokens_BT, model.get_input_embeddings().weight).float()
        before_BTD = torch.cat([embeds_BTC[:, 1:], batch.hidden[start][:, :-1]], -1)
        head.fc.weight.copy_(linear_fit(before_BTD, batch.hidden[landing][:, 1:]))
        head.readout.weight.copy_(linear_fit(batch.hidden[start], batch.final_BTC))
    return head.to(model.device)


def _config(model: PreTrainedModel, layers: tuple[int, int]) -> PreTrainedConfig:
    """Of a model of these layers alone."""
    text = copy.deepcopy(model.config.get_text_config(decoder=True))
    text.num_hidden_layers, text.tie_word_embeddings, text.dtype = layers[1] - layers[0], False, torch.float32
    for name in _SLICED:
        if getattr(text, name, None) is not None:
            setattr(text, name, getattr(text, name)[slice(*layers)])
    return text


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in layer.state_dict().items()}
