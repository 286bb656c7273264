"""Whether a head is one of a target, and what it becomes beside it: of its dtype, on its device, prepared like it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.head.formats import MTP
from specdec.drafters.head.network import HeadNetwork
from specdec.errors import DraftError
from specdec.exits.module import restricted_head
from specdec.kernels import prepare_like, prepared
from specdec.kernels.model.profile import profile_of
from specdec.tree_model.model import TreeModel

_PADDING_ROWS = 0.01
"""Vocabularies of one tokenizer may differ in size by this share: rows that pad the embedding to a round number."""


def check_fit(head: HeadNetwork, target: TreeModel, layers: Sequence[int]) -> None:
    """Raise `DraftError` if the head cannot be one of the target."""
    config = head.head_config
    model_config = target.model.config.get_text_config(decoder=True)
    if config.target_hidden_size != model_config.hidden_size:
        raise DraftError(
            f"the draft head reads states of {config.target_hidden_size} channels and the target has "
            f"{model_config.hidden_size}: it was trained for another model; take a head of this one"
        )
    if abs(config.vocab_size - target.vocab_size) > _PADDING_ROWS * max(config.vocab_size, target.vocab_size):
        raise DraftError(
            f"the draft head was trained for a vocabulary of {config.vocab_size} and the target has one of "
            f"{target.vocab_size}: it was trained for another model; take a head of this one"
        )
    if not all(1 <= layer <= target.num_layers for layer in layers):
        raise DraftError(
            f"the draft head reads states after the layers {tuple(layers)} and the target has {target.num_layers}: it "
            "was trained for another model, or DraftHead(state_layers=) has to say which layers are meant"
        )
    if len(layers) != config.num_states:
        raise DraftError(
            f"the draft head reads the states of {config.num_states} layers, and {len(layers)} were named: "
            f"{tuple(layers)}"
        )
    if config.kind == MTP:
        _check_norm(target)
    if head.vocab_ids is not None and int(head.vocab_ids.max()) >= target.vocab_size:
        raise DraftError("the draft head can draft tokens that the target does not have: take a head of this target")
    _check_shared(head, target.model)


def _check_norm(target: TreeModel) -> None:
    """An MTP layer reads normed states."""
    norm = target.views.final_norm
    if norm is None or any(weights.is_meta for weights in norm.parameters()):
        raise DraftError(
            "an MTP layer reads the target's last states, normed, and the target has no final norm under a known name, "
            "or accelerate has offloaded it: keep it in memory (device_map=), or take another drafter"
        )


def _check_shared(head: HeadNetwork, model: PreTrainedModel) -> None:
    """What the head lacks is the target's, and has to be here and of the same width."""
    size = head.config.hidden_size
    shared: list[tuple[str, nn.Module | None, nn.Module | None]] = [
        ("embeddings", head.embed_tokens, model.get_input_embeddings()),
        ("LM head", head.lm_head, model.get_output_embeddings()),
    ]
    for name, own, others in shared:
        if own is not None:
            continue
        if size != head.head_config.target_hidden_size:
            raise DraftError(f"the draft head has no {name} of its own, and its {size} channels are not the target's")
        if others is None or any(weights.is_meta for weights in others.parameters()):
            raise DraftError(
                f"the draft head shares the target's {name}, which accelerate has offloaded: keep them in memory "
                "(device_map=), or take another drafter"
            )


class _Fitted(WeakKeyDictionary[nn.Module, tuple[object, HeadNetwork]]):
    """Copies of heads for a model, with what they were made for."""


def rows_of(model: PreTrainedModel, vocab_ids: Tensor) -> nn.Linear:
    """The model's LM head for what a head drafts, without a bias."""
    rows = restricted_head(model, vocab_ids)
    rows.register_parameter("bias", None)
    return rows.requires_grad_(False)


def fitted(head: HeadNetwork, model: PreTrainedModel) -> HeadNetwork:
    """The head in the dtype and on the device of a target, prepared as that is; itself if it is so already."""
    like, done = next(model.parameters()), prepared(model)
    weight, lacks_rows = head.fc.weight, head.lm_head is None and head.vocab_ids is not None
    if done is None and (weight.dtype, weight.device) == (like.dtype, like.device) and not lacks_rows:
        return head
    profile, made_for = profile_of(model), (done, like.dtype, like.device)
    copies = profile.part(_Fitted)
    with profile.lock:
        if head not in copies or copies[head][0] != made_for:
            made = copy.deepcopy(head)
            if made.lm_head is None and made.vocab_ids is not None:
                made.lm_head = rows_of(model, made.vocab_ids)
            copies[head] = made_for, _prepared_like(made.to(like.device, like.dtype), model)
        return copies[head][1]


def _prepared_like(head: HeadNetwork, model: PreTrainedModel) -> HeadNetwork:
    """What reads the target's states as they are keeps float weights: of one row some are for states in the tens and
    thousands, others for embeddings or earlier layers below one, and a common scale leaves nothing of one of them (the
    demo model's jump head accepted 0.15 tokens a round instead of 0.5)."""
    if prepared(model) is None or head.head_config.kind == MTP:  # whose layers norm what they read
        return prepare_like(head, model)
    fc, head.fc = head.fc, nn.Identity()  # type: ignore[assignment]
    made = prepare_like(head, model)
    made.fc = fc.to(made.norm.weight.dtype)
    return made
