"""The drafters that `Auto` does without, because they have raised: for one target, until they are taken back."""

from __future__ import annotations

import logging
from traceback import walk_tb
from weakref import WeakValueDictionary

from transformers import LogitsProcessorList, PreTrainedModel

from specdec.decoding.drafter import Drafter
from specdec.drafters.model.quantized_copy import original_of
from specdec.kernels.model.profile import all_profiles, profile_of

_log = logging.getLogger(__name__)


class _Dropped(WeakValueDictionary[int, object]):
    """Of a target: the drafters, or the models that they draft with, by id: a drafter need not be hashable."""


def is_dropped(target: PreTrainedModel, drafter: Drafter) -> bool:
    """Whether the drafter has raised at work for the target (or for its int8 copy)."""
    identity = _identity(drafter)
    return _dropped_of(target).get(id(identity)) is identity


def drop(target: PreTrainedModel, drafter: Drafter, error: Exception) -> None:
    """Do without the drafter from now on; the first time, say so."""
    if is_dropped(target, drafter):
        return
    target, identity = original_of(target), _identity(drafter)
    _dropped_of(target)[id(identity)] = identity
    _log.warning(
        "%s raised %s: %s. Auto goes on without it for this %s (Auto.reset() takes it back)",
        *(type(drafter).__name__, type(error).__name__, error, type(target).__name__),
    )
    _log.debug("where %s raised", type(drafter).__name__, exc_info=error)


def take_back(drafter: Drafter) -> None:
    """Try it again, for all targets."""
    for profile in all_profiles():
        profile.part(_Dropped).pop(id(_identity(drafter)), None)


def is_the_callers(error: Exception) -> bool:
    """Whether one of the call's own logits processors raised, which drafters ask about their drafts."""
    code = LogitsProcessorList.__call__.__code__
    return any(frame.f_code is code for frame, _ in walk_tb(error.__traceback__))


def _dropped_of(target: PreTrainedModel) -> _Dropped:
    return profile_of(original_of(target)).part(_Dropped)


def _identity(drafter: Drafter) -> object:
    """A `SmallModel` may be made for each call; its model stays."""
    model = getattr(drafter, "model", None)
    return drafter if model is None else model
