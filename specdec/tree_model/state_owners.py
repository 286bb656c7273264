"""Which modules of a model read and write its layers' states, and whether its own forward goes on from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from specdec.errors import UnsupportedModelError
from specdec.hf import cache_name, home_device
from specdec.kernels.model.profile import profile_of
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.module_copies import StandIn, with_modules
from specdec.tree_model.recurrent import Key, states_of

Owners = dict[str, tuple[int, frozenset[Key]]]
"""Path of a mixer -> its layer's index, and its states."""


@dataclass(slots=True)
class _Found:
    """What is known of a model; None of what has not been asked for."""

    owners: Owners | None = None
    reads_on: bool | None = None


def owners_of(model: PreTrainedModel, like: TreeCache) -> Owners:
    """The modules that read and write a model's states.

    Args:
        like: a cache of the model's layers.

    Raises:
        UnsupportedModelError: states are kept elsewhere than in the cache.
    """
    found = profile_of(model).part(_Found)
    if found.owners is None:
        found.owners = _find_owners(model, like)
    return found.owners


def reads_on(model: PreTrainedModel) -> bool:
    """Whether a model's own forward of several tokens goes on from its states: some begin anew (Mamba, Jamba)."""
    found = profile_of(model).part(_Found)
    if found.reads_on is None:
        found.reads_on = _try_reading_on(model)
    return found.reads_on


@torch.no_grad()
def _try_reading_on(model: PreTrainedModel) -> bool:
    """Whether nine tokens leave the same states if they are read in two parts."""
    size = model.config.get_text_config(decoder=True).vocab_size
    places_19 = torch.arange(9, device=home_device(model)).unsqueeze(0)

    def states_after(*sizes: int) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        for part in places_19.split(sizes, 1):
            named = {"position_ids": part, cache_name(model): cache}
            model(input_ids=(1 + part) * 7919 % size, use_cache=True, **named)
        layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
        return [state for layer in layers for state in states_of(layer).values()]

    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    pairs = zip(states_after(9), states_after(5, 4), strict=True)
    return all(bool((whole - parts).abs().max() <= tolerance * whole.abs().max()) for whole, parts in pairs)


@torch.no_grad()
def _find_owners(model: PreTrainedModel, like: TreeCache) -> Owners:
    """Which modules read and write states, found out by a forward of two tokens."""
    cache = _WatchedCache(len(like.layers), 1, without=like.without, recurrent=like.recurrent)
    place = model.config.get_text_config(decoder=True).vocab_size // 2
    ids_12 = torch.tensor([[place, place - 1]], device=home_device(model))
    inputs = {"input_ids": ids_12, "position_ids": torch.arange(2, device=ids_12.device).unsqueeze(0)}
    _watching(model, "", cache.callers)(**inputs, use_cache=True, **{cache_name(model): cache})
    owners = dict(_outermost(cache.found))
    if {index for index, _ in owners.values()} != set(like.recurrent):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps states of its layers elsewhere than in its cache: use model.generate()"
        )
    return owners


def _outermost(found: Mapping[tuple[str, int], set[Key]]) -> Iterator[tuple[str, tuple[int, frozenset[Key]]]]:
    """Callers that lie in no other one, with the states of all that lie in them."""
    paths = [path for path, _ in found]
    for path, index in found:
        if not any(path.startswith(f"{other}.") for other in paths):
            inside = [keys for (other, _), keys in found.items() if other == path or other.startswith(f"{path}.")]
            yield path, (index, frozenset().union(*inside))


def _watching(module: nn.Module, path: str, callers: list[str]) -> nn.Module:
    """A copy of a module in which those that belong to a layer say when they are at work."""
    children = {
        name: _watching(child, f"{path}.{name}".lstrip("."), callers) for name, child in module.named_children()
    }
    copied = with_modules(module, children)
    return _Watching(copied, path, callers) if isinstance(getattr(module, "layer_idx", None), int) else copied


class _Watching(StandIn):
    def __init__(self, module: nn.Module, path: str, callers: list[str]):
        super().__init__(module)
        self._path, self._callers = path, callers

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not any(isinstance(each, TreeCache) for each in (*inputs, *named.values())):
            return self.module(*inputs, **named)
        self._callers.append(self._path)
        output = self.module(*inputs, **named)
        self._callers.pop()
        return output


class _WatchedCache(TreeCache):
    """Notes which module at work asks for which states.

    Attributes:
        callers: modules at work, the innermost last.
        found: module and layer -> states.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.callers: list[str] = []
        self.found: defaultdict[tuple[str, int], set[Key]] = defaultdict(set)

    def _note(self, name: str, layer_idx: int, state_idx: int) -> None:
        if self.callers:
            self.found[self.callers[-1], layer_idx].add((name, state_idx))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._note("conv", layer_idx, state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **named: Any) -> Tensor:
        self._note("conv", layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **named)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._note("recurrent", layer_idx, state_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **named: Any
    ) -> Tensor:
        self._note("recurrent", layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **named)
