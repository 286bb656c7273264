"""Random numbers: of a generator, or of a tape that keeps what was drawn and gives it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_UNIFORM, _EXPONENTIAL = "uniform_", "exponential_"


class Tape:
    """Stands for a generator where the same numbers are asked for time and again, as by a function that is captured.

    The first time it draws, as the generator would. From `rewind` on it gives the same tensors, whatever has been
    written to them since.

    Args:
        generator: None for torch's global source of randomness.

    Attributes:
        numbers: float tensors in the order in which they were asked for; others may take their places.
    """

    def __init__(self, generator: torch.Generator | None):
        self.numbers: list[Tensor] = []
        self._generator = generator
        self._kinds: list[str] = []
        self._next: int | None = None

    def rewind(self) -> None:
        """Give what was drawn from now on, from the first number."""
        self._next = 0
        self._generator = None  # it is the caller's

    def draw(self, generator: torch.Generator | None) -> None:
        """New numbers into the same tensors, in the same order: what the generator would give without a tape."""
        for kind, number in zip(self._kinds, self.numbers, strict=True):
            getattr(number, kind)(generator=generator)

    def take(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._next is None:
            number = getattr(torch.empty(shape, dtype=dtype, device=device), kind)(generator=self._generator)
            self._kinds.append(kind)
            self.numbers.append(number)
            return number
        number, kept = self.numbers[self._next], self._kinds[self._next]
        assert (kind, shape, dtype) == (kept, number.shape, number.dtype), "other numbers than those on the tape"
        self._next += 1
        return number


Randomness = torch.Generator | Tape | None
"""A source of random numbers; None is torch's global one."""


def uniform(shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: Randomness) -> Tensor:
    """Between 0 and 1, without 1. Not to be written to."""
    if isinstance(source, Tape):
        return source.take(_UNIFORM, shape, dtype, device)
    return torch.rand(shape, dtype=dtype, generator=source, device=device)


def exponential(like: Tensor, source: Randomness) -> Tensor:
    """Of mean 1, of a contiguous tensor's shape and dtype. Not to be written to."""
    if isinstance(source, Tape):
        return source.take(_EXPONENTIAL, like.shape, like.dtype, like.device)
    return torch.empty_like(like).exponential_(generator=source)
