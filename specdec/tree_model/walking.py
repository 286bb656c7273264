"""A model whose recurrent mixers are stepped token by token, along trees.

A mixer is the module that reads and writes a layer's states. In a *walking* model, a copy that shares all else with the
original, each of them is called once for every level of the nodes of a forward, with the states of the nodes' parents
on the desk (`recurrent.py`) and one token for each node: the model's own code for decoding, so that what comes of it is
what plain decoding says, of chains, trees and ragged batches alike.

Weights are not read for each level anew: what a linear makes of the mixer's own inputs is computed for all levels at
once, and so is a linear whose output is the mixer's.

Shape legend: B rows, T new slots, N nodes of a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from specdec.devices import home_device
from specdec.errors import UnsupportedModelError
from specdec.hf import cache_name
from specdec.kernels.model.linear import Int8Linear
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.levels import Level, Schedule
from specdec.tree_model.module_copies import with_modules
from specdec.tree_model.recurrent import Key, StateLayer, states_of

Owners = dict[str, tuple[int, frozenset[Key]]]
"""Path of a mixer -> its layer's index, and its states."""

_owners: WeakKeyDictionary[PreTrainedModel, Owners] = WeakKeyDictionary()
_reads_on: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def walking(model: PreTrainedModel, cache: TreeCache) -> PreTrainedModel:
    """A copy of a model whose mixers are stepped whenever the cache has a plan; else it is the model.

    Args:
        cache: empty, of the model's layers.

    Raises:
        UnsupportedModelError: states are kept elsewhere than in the cache.
    """
    if model not in _owners:
        _owners[model] = _find_owners(model, cache)
    modules = dict(model.named_modules())
    return with_modules(model, {path: _Walked(modules[path], *owned) for path, owned in _owners[model].items()})


def reads_on(model: PreTrainedModel) -> bool:
    """Whether a model's own forward of several tokens goes on from its states: some begin anew (Mamba, Jamba)."""
    if model not in _reads_on:
        _reads_on[model] = _try_reading_on(model)
    return _reads_on[model]


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


class _StandIn(nn.Module):
    """Stands for a module, and has its attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)


class _Walked(_StandIn):
    """A mixer that is stepped.

    Args:
        index: of its layer.
        keys: its states.
    """

    def __init__(self, mixer: nn.Module, index: int, keys: frozenset[Key]):
        super().__init__(mixer)
        self._index, self._keys = index, keys
        self._stepping = _Stepping()
        self._last: _Shared | None = None
        linears = {path: part for path, part in mixer.named_modules() if isinstance(part, nn.Linear | Int8Linear)}
        # in a list, as there are no further modules to be found here
        self._stepped = [with_modules(mixer, {path: _Shared(part, self._stepping) for path, part in linears.items()})]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        cache = next((each for each in (*named.values(), *inputs) if isinstance(each, TreeCache)), None)
        if cache is None or cache.states is None or cache.states.plan is None:
            return self.module(*inputs, **named)
        layer, plan = cache.states.layers[self._index], cache.states.plan
        if plan.shape[1] > 1:
            return self._walk(layer, plan, inputs, named)
        return self._at_level(layer, plan.levels[0], self.module, inputs, named)

    def _walk(self, layer: StateLayer, plan: Schedule, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        step = _Step((*inputs, *named.values()), self._last)
        self._stepping.step, outputs = step, []
        for level in plan.levels:
            own, own_named = level.take(inputs), level.take(named)
            step.enter(level, (*own, *own_named.values()))
            outputs.append(step.leave(self._at_level(layer, level, self._stepped[0], own, own_named)))
        if step.is_misjudged:
            self._last = None
            return self._walk(layer, plan, inputs, named)
        merged = plan.merge(outputs)
        if self._last is not None:
            return self._last.module(merged)
        self._last = step.last
        return merged

    def _at_level(
        self, layer: StateLayer, level: Level, mixer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        layer.begin_step(level, self._keys)
        output = mixer(*inputs, **named)
        layer.end_step(level, self._keys)
        return output


class _Step:
    """What the linears of a mixer have in common while it is stepped through the levels of a forward.

    Args:
        inputs: of the mixer, of all levels.
        deferred: the linear that is not called, because it makes the mixer's output of what it is given; None if that
            is still to be found out.

    Attributes:
        is_misjudged: the mixer's output was not the deferred linear's: it has to be stepped again.
    """

    def __init__(self, inputs: tuple[Any, ...], deferred: _Shared | None):
        self.is_misjudged = False
        self._inputs, self._deferred = inputs, deferred
        self._made: dict[_Shared, Tensor] = {}
        self._candidates: set[_Shared] | None = None

    @property
    def last(self) -> _Shared | None:
        """The one linear whose only output of each level was the mixer's."""
        return next(iter(self._candidates)) if self._candidates else None

    def enter(self, level: Level, parts: tuple[Any, ...]) -> None:
        """A level follows, with these parts of the inputs."""
        self._level = level
        self._calls: list[tuple[_Shared, Tensor, Tensor]] = []
        pairs = list(zip(parts, self._inputs, strict=True))
        self._wholes = [(part, whole) for part, whole in pairs if part is not whole and isinstance(part, Tensor)]

    def call(self, linear: _Shared, x: Tensor) -> Tensor:
        """What a linear makes of the level's tokens."""
        whole = next((whole for part, whole in self._wholes if part is x), None)
        if whole is not None:
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
        if self._deferred is None:
            found = {linear for linear, _, made in self._calls if made is output and self._count(linear) == 1}
            self._candidates = found if self._candidates is None else self._candidates & found
            return output
        given = [(x, made) for linear, x, made in self._calls if linear is self._deferred]
        if len(given) != 1 or given[0][1] is not output:
            self.is_misjudged = True
        return given[0][0] if given else output

    def _count(self, linear: _Shared) -> int:
        return sum(other is linear for other, _, _ in self._calls)


class _Stepping:
    """Where the linears of a mixer find the step under way."""

    step: _Step


class _Shared(_StandIn):
    """A linear of a mixer that is stepped."""

    def __init__(self, linear: nn.Module, stepping: _Stepping):
        super().__init__(linear)
        self._stepping = stepping

    def forward(self, x: Tensor) -> Tensor:
        return self._stepping.step.call(self, x)


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


class _Watching(_StandIn):
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
