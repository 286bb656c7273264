"""An int8 copy of a model, made again when the model has changed: fine-tuned in place, its adapter merged or switched.

A stale copy would not make the output wrong, but hardly anything that it drafts would be accepted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import RLock
from time import perf_counter
from weakref import ref

from transformers import PreTrainedModel

from specdec.kernels import quantized_copy
from specdec.kernels.model.changes import State, state_of
from specdec.kernels.model.prepare import check_whole
from specdec.kernels.model.profile import profile_of
from specdec.stages import stage

_log = logging.getLogger(__name__)
_making = RLock()
"""Held while a copy is made: threads that want the same one wait for it."""


@dataclass(slots=True)
class _Origin:
    """What a copy was made of."""

    original: ref[PreTrainedModel] | None = None


class Int8Copy:
    """The copy of one model.

    Args:
        original: not kept alive. It is copied when the copy is first asked for.
    """

    def __init__(self, original: PreTrainedModel):
        self._original = ref(original)
        self._state: State | None = None
        self._copy: PreTrainedModel | None = None
        self.seconds = 0.0
        """That making it took, the last time."""

    @property
    def is_current(self) -> bool:
        """Whether the copy has been made, of the model as it is now."""
        original = self._original()
        return self._copy is not None and (original is None or state_of(original) == self._state)

    def current(self) -> PreTrainedModel:
        """The copy of the model as it is now."""
        with _making:
            if self._copy is None or not self.is_current:
                self._copy = self._make(is_first=self._copy is None)
            return self._copy

    def _make(self, *, is_first: bool) -> PreTrainedModel:
        original = self._original()
        assert original is not None, "a copy of a model that is gone is always current"
        if not is_first:
            _log.info("%s has changed since its int8 copy was made: making it again", type(original).__name__)
        check_whole(original)
        self._copy = None  # one copy at most is held
        started = perf_counter()
        self._state = state_of(original)
        with stage("making the int8 copy that drafts"):
            copy = quantized_copy(original)
        self.seconds = perf_counter() - started
        profile_of(copy).part(_Origin).original = ref(original)
        return copy


def original_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that an int8 copy was made of; any other model itself."""
    reference = profile_of(model).part(_Origin).original
    original = None if reference is None else reference()
    return model if original is None else original
