"""Copies of modules with some descendants replaced. The originals are not touched, and nothing is computed twice."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

from accelerate.hooks import add_hook_to_module
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def with_modules(module: Module, leaves: Mapping[str, nn.Module]) -> Module:
    """A shallow copy of a module with these descendants (by their dotted names), and copies on the way to them."""
    below: defaultdict[str, dict[str, nn.Module]] = defaultdict(dict)
    for path, leaf in leaves.items():
        name, _, rest = path.partition(".")
        below[name][rest] = leaf
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name, replaced in below.items():
        child = module._modules[name]
        assert child is not None
        copied._modules[name] = replaced[""] if "" in replaced else with_modules(child, replaced)
    return _with_hook_of_its_own(copied)


def _with_hook_of_its_own(copied: Module) -> Module:
    """accelerate puts a function in the place of a module's `forward` that calls the module it was made for."""
    hook = copied.__dict__.pop("_hf_hook", None)
    if hook is not None:
        for name in ("forward", "_old_forward"):
            copied.__dict__.pop(name, None)
        add_hook_to_module(copied, hook)
    return copied


class StandIn(nn.Module):
    """Stands for a module, and has its attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)
