"""A model whose recurrent mixers are stepped token by token, along trees.

A mixer is the module that reads and writes a layer's states. In a *walking* model, a copy that shares all else with the
original, each of them is called once for every level of the nodes of a forward, with the states of the nodes' parents
on the desk (`recurrent.py`) and one token for each node: the model's own code for decoding, so that what comes of it is
what plain decoding says, of chains, trees and ragged batches alike.

What need not be done for every level is done once, and looked at every time (`stepping.py`): the linears of a mixer's
own inputs, and the one that makes its output. A convolution alone has no recurrence: its state is a window of what its
tokens gave it, so all levels are stepped together, twice: to learn what each token gives, and in its true window.

Shape legend: B rows, T new slots, N nodes of a level.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from specdec.kernels.model.quantized_linear import QuantizedLinear
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.levels import Level, Schedule
from specdec.tree_model.module_copies import StandIn, with_modules
from specdec.tree_model.recurrent import Key, StateLayer
from specdec.tree_model.state_owners import owners_of
from specdec.tree_model.stepping import Learned, SharedLinear, Step, Stepping

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def walking(model: PreTrainedModel, cache: TreeCache) -> PreTrainedModel:
    """A copy of a model whose mixers are stepped whenever the cache has a plan; else it is the model.

    Args:
        cache: empty, of the model's layers.

    Raises:
        UnsupportedModelError: states are kept elsewhere than in the cache.
    """
    modules = dict(model.named_modules())
    return with_modules(
        model, {path: _Walked(modules[path], *owned) for path, owned in owners_of(model, cache).items()}
    )


class _Walked(StandIn):
    """A mixer that is stepped.

    Args:
        index: of its layer.
        keys: its states.
    """

    def __init__(self, mixer: nn.Module, index: int, keys: frozenset[Key]):
        super().__init__(mixer)
        self._index, self._keys = index, keys
        self._stepping = Stepping()
        self._learned: Learned | None = None
        linears = {path: part for path, part in mixer.named_modules() if isinstance(part, nn.Linear | QuantizedLinear)}
        # in a list, as there are no further modules to be found here
        self._copy = [with_modules(mixer, {path: SharedLinear(part, self._stepping) for path, part in linears.items()})]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        cache = next((each for each in (*named.values(), *inputs) if isinstance(each, TreeCache)), None)
        if cache is None or cache.states is None or cache.states.plan is None:
            return self.module(*inputs, **named)
        layer, plan = cache.states.layers[self._index], cache.states.plan
        if plan.shape[1] > 1:
            return self._walk(layer, plan, (inputs, named))
        layer.begin_step(plan.levels[0], self._keys)
        output = self.module(*inputs, **named)
        layer.end_step(plan.levels[0], self._keys)
        return output

    def _walk(self, layer: StateLayer, plan: Schedule, inputs: Inputs) -> Any:
        step = self._stepping.step = Step((*inputs[0], *inputs[1].values()), self._learned)
        if self._learned is not None and self._learned.ahead is not None:
            step.look_ahead(self._copy[0], inputs)
        is_together = self._learned is not None and self._learned.slides
        outputs = self._together(layer, plan, step, inputs) if is_together else self._in_turn(layer, plan, step, inputs)
        if step.is_misjudged:
            self._learned = None
            return self._walk(layer, plan, inputs)
        merged = plan.merge(outputs)
        if self._learned is None:
            self._learned = self._learn(layer, plan, step, inputs)
            return merged
        return merged if self._learned.last is None else self._learned.last.module(merged)

    def _in_turn(self, layer: StateLayer, plan: Schedule, step: Step, inputs: Inputs) -> list[Any]:
        """What each level gives."""
        outputs = []
        for level in plan.levels:
            layer.begin_step(level, self._keys)
            outputs.append(self._at(level, step, inputs))
            layer.end_step(level, self._keys)
        return outputs

    def _together(self, layer: StateLayer, plan: Schedule, step: Step, inputs: Inputs) -> list[Any]:
        """What each level gives, of a mixer whose states are windows."""
        layer.begin_step(plan.together, self._keys)
        self._at(plan.together, step, inputs)
        layer.slide(plan.levels, self._keys)
        output = self._at(plan.together, step, inputs)
        if not layer.has_slid(plan.levels, self._keys):
            step.is_misjudged = True
        return list(output.split([len(level.rows) for level in plan.levels]))

    def _at(self, level: Level, step: Step, inputs: Inputs) -> Any:
        own, named = level.take(inputs)
        step.enter(level, (*own, *named.values()))
        return step.leave(self._copy[0](*own, **named))

    def _learn(self, layer: StateLayer, plan: Schedule, step: Step, inputs: Inputs) -> Learned:
        layer.lay_out({})
        slides = step.gives_tensor and all(layer.slides(level, self._keys) for level in plan.levels)
        return Learned(last=step.last, ahead=step.find_ahead(self._copy[0], inputs), slides=slides)
