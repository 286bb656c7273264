"""A `TreeModel` that replays graphs of its forwards: transformers' own forward, captured with static inputs.

A graph has so many rows, new slots and slots to attend to; the last two are rounded up. Slots that fill it up see
nothing but themselves, and are written past the tail, where the next forward overwrites them.

Shape legend: B rows, T new slots, W their number rounded up, K tail slots, S slots, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from specdec.cuda.arena import Arena, Inputs, Shape, StaticTreeCache
from specdec.cuda.graphs import graphs_for
from specdec.hf import home_device, num_processes
from specdec.kernels.model.profile import profile_of
from specdec.tree_model import masks
from specdec.tree_model.layer_kinds import layer_kinds
from specdec.tree_model.model import TreeModel

_logger = logging.getLogger("specdec")
_MOST_ROWS, _MOST_NEW, _MOST_TOKENS = 8, 64, 256
"""Of a forward that is captured: larger ones are not bound by their launches."""
_FEWEST_SLOTS = 256
_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings that look at the positions on the host."""


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model's forwards are not captured; None if they are, as far as can be told without trying."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if graphs_for(home_device(model)) is None:
        return "it is not on a CUDA device"
    if num_processes(model) > 1 or len({weight.device for weight in model.parameters()}) > 1:
        return "it is split over devices"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate moves its inputs or weights"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "it has hooks, which a replay would not call"
    if any(hasattr(module, "active_adapters") for module in model.modules() if not isinstance(module, PreTrainedModel)):
        return "it has adapters, which may be switched"
    if rope.get("rope_type") in _ROTATIONS:
        return "its rotary embedding depends on the length"
    if not all(kind is not None and kind.sees_all for kind in layer_kinds(config)):
        return "a layer has a window, a state or a selection"
    return profile_of(model).part(Arena).refusal


class GraphedTreeModel(TreeModel):
    """Forwards that come again in one shape are replayed, the others run as in a `TreeModel`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._arena = profile_of(model).part(Arena)
        self._run_static = _forward_of(model, self._cache_name)

    def _new_cache(self, num_rows: int, capacity: int) -> StaticTreeCache:
        room = 1 << (max(_FEWEST_SLOTS, capacity + 2 * _MOST_NEW) - 1).bit_length()
        cache = StaticTreeCache(self.num_layers, num_rows, room, **self._layers)
        cache.arena = self._arena if self._arena.lease(cache, self.model) else None
        return cache

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        shape, pool = self._shape(tokens_BT), graphs_for(self.device)
        if shape is None or pool is None or not self._arena.is_worth(shape):
            return super().forward(tokens_BT, offsets_BT, seen_BTK)
        cache = self.cache
        assert isinstance(cache, StaticTreeCache)
        cache.make_room(shape.num_slots)  # before anything looks at the buffers: they may be others then
        filled: list[Tensor] = self._fill(shape, tokens_BT, offsets_BT, seen_BTK)
        try:
            graph, inputs = self._arena.graph(
                shape, lambda: Inputs(*(part.clone() for part in filled)), self._run_static, pool
            )
        except RuntimeError as error:
            self._arena.refusal = f"its forward could not be captured ({type(error).__name__}: {error})"
            _logger.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, self._arena.refusal)
            return super().forward(tokens_BT, offsets_BT, seen_BTK)
        for static, part in zip(inputs, filled, strict=True):
            static.copy_(part)
        logits_BTV = graph.replay()[:, : tokens_BT.shape[1]].clone()
        self._offsets_BS = torch.cat([self._offsets_BS, offsets_BT], 1) if cache.tail else offsets_BT
        for layer in cache.stored.values():
            layer.append(tokens_BT.shape[1])
        self.states = {}
        self.num_forwards += 1
        return logits_BTV

    def _shape(self, tokens_BT: Tensor) -> Shape | None:
        """Of the graph for new tokens; None where there is to be none."""
        cache, (num_rows, num_new) = self.cache, tokens_BT.shape
        if self._kept or self._arena.refusal is not None or len(self._lag_AB) > 1:
            return None
        if not isinstance(cache, StaticTreeCache) or not self._arena.is_owner(cache) or not any(cache.lengths):
            return None
        width = 1 << (num_new - 1).bit_length()
        if num_rows > _MOST_ROWS or width > _MOST_NEW or num_rows * width > _MOST_TOKENS:
            return None
        num_slots = max(cache.lengths) + cache.tail + width
        return Shape(num_rows, width, max(_FEWEST_SLOTS, 1 << (num_slots - 1).bit_length()))

    def _fill(self, shape: Shape, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> list[Tensor]:
        """What the graph is to be given."""
        cache, (num_rows, num_new) = self.cache, tokens_BT.shape
        first, padding = cache.tail, (0, shape.width - num_new)
        if seen_BTK is None:
            seen_BTK = offsets_BT.new_ones((num_rows, 1, first + 1), dtype=torch.bool)
        visible_BTS = masks.visible_slots(seen_BTK, cache.lengths, self._prompt_BP)
        steps_W = torch.arange(first, first + shape.width, device=self.device)
        slots_BW = cache.lengths_on(self.device).unsqueeze(1) + steps_W
        lowest = torch.finfo(self.model.dtype).min
        bias_B1WS = torch.full((num_rows, 1, *shape[1:]), lowest, dtype=self.model.dtype, device=self.device)
        bias_B1WS[:, 0, :num_new, : visible_BTS.shape[2]].masked_fill_(visible_BTS, 0)
        bias_B1WS.scatter_(3, slots_BW[:, None, :, None], 0)  # each sees itself
        positions_BT = self.next_positions_B.unsqueeze(1) + offsets_BT
        pad = torch.nn.functional.pad
        return [pad(tokens_BT, padding), pad(positions_BT, padding), slots_BW, bias_B1WS]


def _forward_of(model: PreTrainedModel, cache_name: str) -> Callable[[Inputs, Cache], Tensor]:
    """What is captured. It does not keep the model, to which the arena belongs."""
    known = weakref.ref(model)

    def run(inputs: Inputs, cache: Cache) -> Tensor:
        captured = known()
        assert captured is not None, "the arena has outlived its model"
        given: dict[str, Any] = {
            "input_ids": inputs.tokens_BW,
            "attention_mask": inputs.bias_B1WS,
            "position_ids": inputs.positions_BW,
            cache_name: cache,
            "use_cache": True,
        }
        logits: Tensor = captured(**given).logits
        return logits

    return run
