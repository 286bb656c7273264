"""Which cases of a product always run: so few that each value of each axis comes up, taking turns with the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest


def in_rotation(case: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a case, given by its index on each axis, is one of the few: as many as the longest axis has values.

    The longest axis counts and every other one turns with it. From the third on an axis moves on whenever the second
    has gone round, so that they do not keep step with each other.
    """
    longest, *others = sorted(range(len(sizes)), key=lambda axis: -sizes[axis])
    count = case[longest]
    rounds = count // sizes[others[0]] if others else 0
    return all(case[axis] == (count + place * rounds) % sizes[axis] for place, axis in enumerate(others))


def is_left_out(test: pytest.Function) -> bool:
    """Whether a test of a `rotated` product is none of the few; each `parametrize` on it is an axis."""
    axes = [mark.args[:2] for mark in test.iter_markers("parametrize")]
    case = [_place(test.callspec.params, names, values) for names, values in axes]
    return not in_rotation(case, [len(values) for _, values in axes])


def _place(params: Mapping[str, object], names: str | Sequence[str], values: Collection[object]) -> int:
    """Which of an axis' values a test has; as the objects that they are, for tensors do not compare to one truth."""
    if isinstance(names, str):
        return next(place for place, value in enumerate(values) if params[names] is value)
    rows = (zip(names, row, strict=True) for row in values)
    return next(place for place, row in enumerate(rows) if all(params[name] is value for name, value in row))
