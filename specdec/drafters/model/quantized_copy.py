"""A copy of a model with weights of 8 or 4 bits, made again when the model has changed: fine-tuned in place, its
adapter merged or switched.

A stale copy would not make the output wrong, but hardly anything that it drafts would be accepted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import RLock
from time import perf_counter
from typing import get_args
from weakref import ref

from transformers import PreTrainedModel

from specdec.kernels import quantized_copy
from specdec.kernels.model.changes import State, state_of
from specdec.kernels.model.prepare import check_whole
from specdec.kernels.model.profile import profile_of
from specdec.model_options import QuantizedWeights
from specdec.stages import stage

_log = logging.getLogger(__name__)
_making = RLock()
"""Held while a copy is made: threads that want the same one wait for it."""


@dataclass(slots=True)
class _Origin:
    """What a copy was made of."""

    original: ref[PreTrainedModel] | None = None


class QuantizedCopy:
    """The copy of one model.

    Args:
        original: not kept alive. It is copied when the copy is first asked for.
        weights: of the copy.
    """

    def __init__(self, original: PreTrainedModel, weights: QuantizedWeights):
        self._original = ref(original)
        self._weights: QuantizedWeights = weights
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
            name = type(original).__name__
            _log.info("%s has changed since its %s copy was made: making it again", name, self._weights)
        check_whole(original)
        self._copy = None  # one copy at most is held
        started = perf_counter()
        self._state = state_of(original)
        with stage(f"making an {self._weights} copy"):
            copy = quantized_copy(original, self._weights)
        self.seconds = perf_counter() - started
        profile_of(copy).part(_Origin).original = ref(original)
        return copy


def original_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a quantised copy was made of; any other model itself."""
    reference = profile_of(model).part(_Origin).original
    original = None if reference is None else reference()
    return model if original is None else original


def check_quantized_weights(drafter: str, weights: str) -> None:
    """Raise `ValueError` for weights that there are no copies of."""
    known = get_args(QuantizedWeights)
    if weights not in known:
        raise ValueError(f"{drafter}(weights={weights!r}): weights is {' or '.join(map(repr, known))}")
