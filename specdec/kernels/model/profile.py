"""What has been found out about a model: what its forwards cost, which trials it has passed, how drafters do on it.

Each package keeps a part of its own type. The profile goes when the model does.
"""

from __future__ import annotations

from threading import Lock, RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Part = TypeVar("Part")


class ModelProfile:
    """The parts that are kept of one model.

    Attributes:
        lock: held by who looks at a part and then changes it.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self._parts: dict[type, Any] = {}

    def part(self, kind: type[Part]) -> Part:
        """The model's only `kind`, made without arguments when it is first asked for. It must not hold the model."""
        with self.lock:
            if kind not in self._parts:
                self._parts[kind] = kind()
            return self._parts[kind]


_profiles: WeakKeyDictionary[nn.Module, ModelProfile] = WeakKeyDictionary()
_adding = Lock()


def profile_of(model: nn.Module) -> ModelProfile:
    """The profile of a model, or of another module that something is known of."""
    profile = _profiles.get(model)
    if profile is None:
        with _adding:
            profile = _profiles.setdefault(model, ModelProfile())
    return profile


def all_profiles() -> list[ModelProfile]:
    """Those of all models that are there."""
    with _adding:
        return list(_profiles.values())
