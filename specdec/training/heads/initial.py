"""What heads start from: weights of the model that they are trained for, as far as these are alike.

Shape legend: V tokens that can be drafted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.fitting import rows_of
from specdec.drafters.head.formats import DSPARK, EAGLE3, MTP, HeadConfig
from specdec.drafters.head.mtp import Mtp
from specdec.drafters.head.network import Head
from specdec.exits.module import final_norm
from specdec.training.heads.corpus import Corpus
from specdec.training.heads.recipes import BlockRecipe, EagleRecipe, MtpRecipe
from specdec.tree_model.layer_views import LayerViews

NUM_FIT_ROWS = 64


def initial_block(
    model: PreTrainedModel, vocab_ids: Tensor, recipe: BlockRecipe, state_layers: tuple[int, ...]
) -> DSpark:
    """A head whose layers are the model's last ones, that reads the last state, and whose LM head is the model's."""
    layers = Qwen3Config(**layer_sizes(model, recipe.num_layers))
    block = {
        "block_size": recipe.reach,
        "mask_token_id": _unused_token(vocab_ids, layers.vocab_size),
        "drafts_at_root": True,
        "markov_rank": recipe.markov_rank,
        "has_confidence": True,
        "confidence_reads_token": recipe.markov_rank > 0,
    }
    with seeded(recipe.seed):
        head = new_head(DSpark, DSPARK, layers, state_layers, model, vocab_ids, **block)
        _read_last_state(head, model)
        own: list[Any] = list(head.layers)
        for mine, theirs in zip(own, LayerViews(model).layers[-len(own) :], strict=False):
            copy_alike(theirs, mine)
            _scale_queries(mine)
        copy_alike(own[0].input_layernorm, head.hidden_norm)
        if head.markov_head is not None:
            head.markov_head.markov_w1.weight.normal_(std=0.1)
            head.markov_head.markov_w2.weight.normal_(std=0.01)
        assert head.confidence_head is not None
        head.confidence_head.proj.weight.zero_()
    return head.to(model.device)


def initial_eagle(model: PreTrainedModel, vocab_ids: Tensor, recipe: EagleRecipe, corpus: Corpus) -> Eagle3:
    """A head of Llama layers, the model's last ones; the first attends with the model's own queries, keys and values of
    the state, and hardly looks at the embedding."""
    layers = LlamaConfig(**layer_sizes(model, recipe.num_layers))
    with seeded(recipe.seed):
        head = new_head(Eagle3, EAGLE3, layers, corpus.layers, model, vocab_ids)
        _read_last_state(head, model)
        own: list[Any] = list(head.layers)
        for mine, theirs in zip(own, LayerViews(model).layers[-len(own) :], strict=False):
            copy_alike(theirs, mine)
        _widen(own[0], LayerViews(model).layers[-len(own)])
    return head.to(model.device)


def initial_mtp(model: PreTrainedModel, recipe: MtpRecipe) -> Mtp:
    """A layer of Qwen3, which speculators reads, like the model's last one; it looks at the state first."""
    layers = Qwen3Config(**layer_sizes(model, recipe.num_layers), dtype=torch.float32)
    with seeded(recipe.seed):
        head = new_head(Mtp, MTP, layers, None, model, norm_output=True)
        for weight in head.block.parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
        _read_last_state(head, model)
        copy_alike(LayerViews(model).layers[-1], head.block)
        _scale_queries(head.block)
    return head.to(model.device)


def linear_fit(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The weights of the best linear map, by least squares, of [B, T, D] to [B, T, C].

    The first two positions of each row are left out: states of attention sinks there, or just before, are a thousand
    times larger than others. Each weight is held small as its input is large, since embeddings are far below states.
    """
    inputs_ND, outputs_NC = inputs[:, 2:].flatten(0, 1), outputs[:, 2:].flatten(0, 1)
    scales_D = inputs_ND.square().sum(0).sqrt().clamp_min(1e-6)
    inputs_ND = inputs_ND / scales_D
    gram_DD = inputs_ND.T @ inputs_ND
    gram_DD.diagonal().add_(1e-4)
    return (torch.linalg.solve(gram_DD, inputs_ND.T @ outputs_NC) / scales_D.unsqueeze(1)).T


def layer_sizes(model: PreTrainedModel, num_layers: int) -> dict[str, Any]:
    """Of layers like the model's."""
    text = model.config.get_text_config(decoder=True)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {
        **{name: getattr(text, name) for name in sizes},
        "max_position_embeddings": text.max_position_embeddings,
        "num_hidden_layers": num_layers,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "rope_parameters": getattr(text, "rope_parameters", None),
        "tie_word_embeddings": False,
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights are drawn from a seed, and no gradients are kept."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def new_head(
    network: type[Head],
    kind: str,
    layers: PreTrainedConfig,
    state_layers: tuple[int, ...] | None,
    model: PreTrainedModel,
    vocab_ids: Tensor | None = None,
    **fields: Any,
) -> Head:
    """A head as wide as the model.

    Args:
        vocab_ids: tokens that it drafts with the model's own rows of the LM head; None: all, with the model's LM head.
        fields: of `HeadConfig`.
    """
    config = HeadConfig(
        kind=kind,
        layers=layers,
        vocab_size=layers.vocab_size,
        draft_vocab_size=layers.vocab_size if vocab_ids is None else len(vocab_ids),
        target_hidden_size=layers.hidden_size,
        state_layers=state_layers,
        **fields,
    )
    if vocab_ids is None:
        return network(config, ())
    head = network(config, ("lm_head.weight", "d2t"))
    head.vocab_ids = vocab_ids.clone()
    head.lm_head = rows_of(model, vocab_ids).float()
    return head


def _read_last_state(head: DSpark | Eagle3 | Mtp, model: PreTrainedModel) -> None:
    """What is read is the last of the states, but for a little; the norm is the model's."""
    size = head.config.hidden_size
    copy_alike(final_norm(model), head.norm)
    head.fc.weight.normal_(std=0.02 / size**0.5)
    head.fc.weight[:, -size:] += torch.eye(size)


def copy_alike(source: nn.Module, target: nn.Module) -> None:
    """Weights of the same name and shape."""
    theirs = source.state_dict()
    for name, weight in target.state_dict().items():
        if name in theirs and theirs[name].shape == weight.shape:
            weight.copy_(theirs[name])


def _scale_queries(layer: Any) -> None:
    """Norms of queries and keys that leave them about as large as they are without."""
    scales, attention = layer.input_layernorm.weight.square(), layer.self_attn
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        norm.weight.fill_(float((projection.weight.square() @ scales).mean().sqrt()))


def _widen(layer: Any, theirs: nn.Module) -> None:
    """The queries, keys and values of a layer's input, of what comes second; the first half says hardly anything."""
    copy_alike(layer.input_layernorm, layer.hidden_norm)
    layer.input_layernorm.weight.fill_(1)
    weights, size = theirs.state_dict(), layer.hidden_norm.weight.shape[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).weight
        weight.normal_(std=0.02 / size**0.5)
        half = weights.get(f"self_attn.{name}.weight")
        if half is not None and half.shape == (weight.shape[0], size):
            weight[:, size:] += half.to(weight.device)


def _unused_token(vocab_ids: Tensor, vocab_size: int) -> int:
    """The last token that is not drafted: it stands for those that are to be."""
    drafted = set(vocab_ids.tolist())
    return next((token for token in reversed(range(vocab_size)) if token not in drafted), vocab_size - 1)
