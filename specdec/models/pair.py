"""A target and its draft, loaded and prepared: what commands, benches and workers begin with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from specdec import models
from specdec.drafters.head.loading import drafts_as_head, load_head
from specdec.errors import DraftError, UnsupportedModelError
from specdec.kernels import prepare
from specdec.model_options import ModelOptions

if TYPE_CHECKING:
    from specdec.drafters import Drafter
    from specdec.specs import DrafterSpec

_log = logging.getLogger(__name__)


class LoadedPair(NamedTuple):
    """A target, and the model or the head that drafts for it if there is one."""

    target: models.LoadedModel
    draft: models.LoadedModel | None = None

    def build(self, spec: DrafterSpec) -> Drafter | str:
        """The drafter that was asked for: what `specdec.generate` takes."""
        if self.draft is None:
            return spec.build()
        return spec.build(self.draft.model, tokenizers=(self.draft.tokenizer, self.target.tokenizer))


def load_pair(
    model: str, draft: str | None, options: ModelOptions, *, translates: bool = False, to_chat: bool = False
) -> LoadedPair:
    """Load a target, and a draft model if one is named, and make their forwards cheap as `options.weights` says.

    Args:
        translates: whether the draft may have another tokenizer (`DrafterSpec.translates`).
        to_chat: whether the target needs a chat template.

    Raises:
        ModelError: a model cannot be found, fetched or read.
        DraftError: the draft's tokenizer gives a token another id than the target's does, or a head cannot be read.
    """
    target = load_target(model, options, to_chat=to_chat)
    return LoadedPair(target, None if draft is None else load_draft(draft, target, options, translates=translates))


def load_target(model: str, options: ModelOptions, *, to_chat: bool = False) -> models.LoadedModel:
    """The first half of `load_pair`."""
    return _prepared(_load(model, options, threads=options.threads, to_chat=to_chat), options)


def load_draft(
    draft: str, target: models.LoadedModel, options: ModelOptions, *, translates: bool = False
) -> models.LoadedModel:
    """The second half of `load_pair`; a head is fitted to the target by its drafter."""
    if drafts_as_head(draft, target.model.name_or_path):
        return models.LoadedModel(load_head(draft), target.tokenizer, Path(draft).resolve().name)
    small = _load(draft, options)
    if not translates:
        _check_same_ids(target.tokenizer, small.tokenizer)
    return _prepared(small, options)


def have_same_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> bool:
    """Whether every token of both tokenizers has one id."""
    return next(_conflicts(target, draft), None) is None


def _check_same_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    for token, target_id, draft_id in _conflicts(target, draft):
        raise DraftError(
            f"the draft model has another tokenizer: {token!r} is token {draft_id} there and {target_id} in "
            "the target. Take a draft of the target's own family, or the drafter foreign-model, which translates"
        )


def _conflicts(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> Iterator[tuple[str, int, int]]:
    """Tokens with their ids in the target and in the draft, which differ."""
    target_ids = target.get_vocab()
    for token, draft_id in draft.get_vocab().items():
        target_id = target_ids.get(token, draft_id)
        if target_id != draft_id:
            yield token, target_id, draft_id


def _load(
    source: str, options: ModelOptions, threads: int | None = None, *, to_chat: bool = False
) -> models.LoadedModel:
    return models.load(
        source,
        dtype=options.dtype,
        device=options.device,
        threads=threads,
        trust_remote_code=options.trust_remote_code,
        to_chat=to_chat,
        weights=options.weights,
    )


def _prepared(loaded: models.LoadedModel, options: ModelOptions) -> models.LoadedModel:
    """`float` is what commands do where they can, and changes no output: a model that it is not for goes without."""
    model = loaded.model
    if options.weights == "float":
        if model.device.type == "cpu" and model.dtype == torch.float32:
            try:
                prepare(model)
            except UnsupportedModelError as error:
                _log.info("%s stays as it was loaded: %s", loaded.name, error)
    elif options.weights not in ("stock", "gguf"):
        prepare(model, weights=options.weights)
    return loaded
