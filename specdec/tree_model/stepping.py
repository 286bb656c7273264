"""What the linears of a mixer have in common while it is stepped through the levels of one forward.

Shape legend: N nodes of a level, K inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.tree_model.levels import Level
from specdec.tree_model.module_copies import StandIn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What the first walk of a mixer has shown. It saves work, and is looked at in every walk.

    Args:
        last: the linear whose only output of each level is the mixer's.
        ahead: the linear that is given the mixer's inputs after some arithmetic that needs no state.
        slides: whether the states are windows that move by a token.
    """

    last: SharedLinear | None
    ahead: SharedLinear | None
    slides: bool


class _Enough(Exception):
    """What a look ahead was made for has been seen."""


class Step:
    """One walk.

    Args:
        inputs: of the mixer, of all levels.
        learned: None in the first walk.

    Attributes:
        is_misjudged: the mixer is not as it was learned: it has to be walked again.
        gives_tensor: whether what it gave of the last level is a tensor.
    """

    def __init__(self, inputs: Sequence[Any], learned: Learned | None):
        self.is_misjudged = self.gives_tensor = False
        self._inputs = inputs
        self._deferred = None if learned is None else learned.last
        self._ahead = None if learned is None else learned.ahead
        self._is_learning = learned is None
        self._level: Level | None = None
        self._made: dict[SharedLinear, Tensor] = {}
        self._given_ahead: Tensor | None = None
        self._candidates: set[SharedLinear] | None = None
        self._history: list[tuple[Level, list[tuple[SharedLinear, Tensor, Tensor]]]] = []

    def enter(self, level: Level, parts: Sequence[Any]) -> None:
        """A level follows, with these parts of the inputs."""
        self._level = level
        self._calls: list[tuple[SharedLinear, Tensor, Tensor]] = []
        pairs = list(zip(parts, self._inputs, strict=True))
        self._wholes = [(part, whole) for part, whole in pairs if part is not whole and isinstance(part, Tensor)]

    def call(self, linear: SharedLinear, x: Tensor) -> Tensor:
        """What a linear makes of the level's tokens."""
        if self._level is None:
            return self._call_ahead(linear, x)
        if (whole := self._whole_of(linear, x)) is not None:
            if linear not in self._made:
                self._made[linear] = linear.module(whole)
            made: Tensor = self._level.take(self._made[linear])
            return made
        is_deferred = linear is self._deferred
        output = x.new_empty((*x.shape[:-1], linear.out_features)) if is_deferred else linear.module(x)
        self._calls.append((linear, x, output))
        return output

    def leave(self, output: Any) -> Any:
        """The mixer's output of a level; what the deferred linear was given, if there is one."""
        self.gives_tensor = isinstance(output, Tensor)
        if self._is_learning:
            assert self._level is not None
            self._history.append((self._level, self._calls))
            counts = Counter(linear for linear, _, _ in self._calls)
            found = {linear for linear, _, made in self._calls if made is output and counts[linear] == 1}
            self._candidates = found if self._candidates is None else self._candidates & found
            return output
        if self._deferred is None:
            return output
        given = [(x, made) for linear, x, made in self._calls if linear is self._deferred]
        if len(given) != 1 or given[0][1] is not output:
            self.is_misjudged = True
        return given[0][0] if given else output

    def look_ahead(self, mixer: nn.Module, inputs: tuple[Sequence[Any], dict[str, Any]]) -> None:
        """Find out what the linear ahead is given of all levels, by calling the mixer until it comes to it."""
        self._level = None
        with suppress(_Enough):
            mixer(*inputs[0], **inputs[1])

    @property
    def last(self) -> SharedLinear | None:
        """The one linear whose only output of each level was the mixer's."""
        return next(iter(self._candidates)) if self._candidates else None

    def find_ahead(self, mixer: nn.Module, inputs: tuple[Sequence[Any], dict[str, Any]]) -> SharedLinear | None:
        """The first linear of each level, if none takes the mixer's inputs as they are, and a look ahead tells its."""
        first = {calls[0][0] for _, calls in self._history if calls}
        if self._made or len(first) != 1 or self.last in first:
            return None
        self._ahead = first.pop()
        self.look_ahead(mixer, inputs)
        if (given := self._given_ahead) is None:
            return None
        is_told = all(torch.equal(calls[0][1], level.take(given)) for level, calls in self._history)
        return self._ahead if is_told else None

    def _call_ahead(self, linear: SharedLinear, x: Tensor) -> Tensor:
        if linear is self._ahead:
            self._given_ahead = x
            raise _Enough
        return linear.module(x)

    def _whole_of(self, linear: SharedLinear, x: Tensor) -> Tensor | None:
        """What the linear is given of all levels, if x is this level's part of it."""
        whole = next((whole for part, whole in self._wholes if part is x), None)
        if whole is None and linear is self._ahead and self._given_ahead is not None:
            assert self._level is not None
            whole = self._given_ahead if torch.equal(x, self._level.take(self._given_ahead)) else None
        return whole


class Stepping:
    """Where the linears of a mixer find the walk under way."""

    step: Step


class SharedLinear(StandIn):
    """A linear of a mixer that is stepped."""

    def __init__(self, linear: nn.Module, stepping: Stepping):
        super().__init__(linear)
        self._stepping = stepping

    def forward(self, x: Tensor) -> Tensor:
        return self._stepping.step.call(self, x)
