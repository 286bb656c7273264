"""What `/set` changes: how replies are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from specdec.cli.options import Sampling

DEFAULT = "default"
"""Typed for a value: the model's own, or for the length of a reply, ours."""
MAX_NEW_TOKENS = 512


class _Kind(NamedTuple):
    """What a setting takes, in words and as a check; `read` turns what was typed into a value."""

    meaning: str
    read: Callable[[str], Any]
    allows: Callable[[Any], bool]


def _is_whole(lowest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= lowest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_KINDS = {
    "max_new_tokens": _Kind("a positive whole number", int, _is_whole(1)),
    "sample": _Kind("on or off", {"on": True, "off": False}.__getitem__, lambda value: type(value) is bool),
    "temperature": _Kind("a number above 0", float, lambda value: _is_number(value) and 0 < value < float("inf")),
    "top_p": _Kind("a number above 0, at most 1", float, lambda value: _is_number(value) and 0 < value <= 1),
    "top_k": _Kind("a positive whole number", int, _is_whole(1)),
    "seed": _Kind("a whole number, 0 or more", int, _is_whole(0)),
}

NAMES = tuple(_KINDS)
_SAMPLING = tuple(each.name for each in fields(Sampling))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How replies are decoded. Raises `ValueError` for a value that is not allowed."""

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            if value is not None:
                _check(name, value)

    def values(self) -> dict[str, Any]:
        """name -> value; None is the model's own."""
        return {"max_new_tokens": self.max_new_tokens, **asdict(self.sampling)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Settings:
        """The opposite of `values`. Raises `ValueError` for an unknown name or a wrong value."""
        for name in values:
            _check_name(name)
        given = {name: value for name, value in values.items() if value is not None}
        sampling = Sampling(**{name: given.pop(name) for name in _SAMPLING if name in given})
        return cls(**given, sampling=sampling)

    def changed(self, name: str, text: str) -> Settings:
        """With one value as it was typed. Turning sampling off takes back what only sampling has.

        Raises:
            ValueError: an unknown name, a wrong value, or one that would have no effect.
        """
        _check_name(name)
        value = _read(name, text)
        if name == "max_new_tokens":
            return replace(self, max_new_tokens=value or MAX_NEW_TOKENS)
        if name == "sample":
            return replace(self, sampling=replace(self.sampling, sample=True) if value else Sampling())
        if value is not None and not self.sampling.sample:
            raise ValueError(f"{name} has no effect on greedy decoding: /set sample on first")
        return replace(self, sampling=replace(self.sampling, **{name: value}))


def describe(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return DEFAULT
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _read(name: str, text: str) -> Any:
    if text == DEFAULT:
        return None
    try:
        value = _KINDS[name].read(text)
    except (ValueError, KeyError):
        value = text
    _check(name, value)
    return value


def _check(name: str, value: Any) -> None:
    kind = _KINDS[name]
    if not kind.allows(value):
        raise ValueError(f"{name} is {kind.meaning}, got {value!r}")


def _check_name(name: str) -> None:
    if name not in _KINDS:
        raise ValueError(f"there is no setting {name!r}; choose from: {', '.join(NAMES)}")
