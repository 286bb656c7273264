"""What graphs read and write: the buffers of a model's cache, which outlive a call, and its graphs.

Graphs hold addresses. So the cache of the next run gets the buffers of the last one, as long as they are large enough;
if they are not, or the weights have moved, the graphs are dropped and captured again. One run at a time has them.

Shape legend: B rows, R rows of the buffers, H heads, S slots, D head size.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer

from specdec.cuda.captured import Inputs, Shape, WrittenCache
from specdec.cuda.functions import GraphedFunctions
from specdec.cuda.graphs import Graph, GraphPool, Outputs
from specdec.cuda.seen import Buffers
from specdec.cuda.slots import MOST_SLOTS, arrange, buffers_of, can_arrange
from specdec.kernels.model.changes import parts_of
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.recurrent import StateLayer
from specdec.tree_model.tree_layer import TreeLayer

USES = 2
"""The forward of a shape that captures it: most shapes of a short run come once."""
_MOST_GRAPHS = 64
"""Of all layers, and of some."""
_KEPT_BYTES, _KEPT_SHARE = 1 << 28, 0.25
"""Of buffers after a run, the second of what the model has: those of a long text are not kept for the next one."""


@dataclass(slots=True)
class Known:
    """What trials have shown of a model's forwards.

    Attributes:
        refusal: why they are not captured.
        reads_all: why their graphs read all slots that they were made for.
    """

    refusal: str | None = None
    reads_all: str | None = None


class Arena:
    """Of one model.

    Attributes:
        known: of forwards of all layers.
        known_of_parts: of those of some layers. If these are not captured the others still are.
        num_replays: of all graphs of forwards so far.
        functions: graphs of what is made of the logits.
    """

    def __init__(self) -> None:
        self.known, self.known_of_parts = Known(), Known()
        self.num_replays = 0
        self.functions = GraphedFunctions()
        self._owner: Callable[[], StaticTreeCache | None] = lambda: None
        self._captured: tuple[object, ...] = ()
        self._lock = Lock()
        self._buffers: dict[int, list[Tensor]] = {}
        self._most_kept = 0.0
        self.forget()

    def forget(self) -> None:
        """Drop all graphs."""
        self._pool: GraphPool | None = None
        self._graphs: dict[Shape, tuple[Graph, Inputs, WrittenCache]] = {}
        self._uses: Counter[Shape] = Counter()

    def lease(self, cache: StaticTreeCache, model: PreTrainedModel) -> bool:
        """Give the buffers to a new cache; False if another run has them, that is, has rows."""
        with self._lock:
            owner = self._owner()
            if owner is not None and owner.num_rows:
                return False
            self._owner = weakref.ref(cache, partial(_trim, weakref.ref(self)))
        captured = _what_is_captured(model)
        if captured != self._captured:
            self._captured = captured
            self.forget()
        num_bytes = sum(part.nbytes for weight in model.parameters() for part in parts_of(weight))
        self._most_kept = max(_KEPT_BYTES, _KEPT_SHARE * num_bytes)
        return True

    def trim(self) -> None:
        """A run is over: let go of buffers that are large beside the model, and of their graphs."""
        owner = self._owner()
        if owner is not None and owner.num_rows:
            return
        if sum(buffer.nbytes for layer in self._buffers.values() for buffer in layer) > self._most_kept:
            self._buffers.clear()
            self.forget()

    def is_owner(self, cache: object) -> bool:
        return self._owner() is cache

    def zeros(self, index: int, states: Sequence[Tensor], num_rows: int, capacity: int) -> list[Tensor]:
        """Buffers of a layer, of so many rows and slots at least; those of the last run if they are large enough."""
        kept = self._buffers.get(index, [])
        fits = len(kept) == len(states) and all(
            (buffer.dtype, buffer.device) == (part.dtype, part.device)
            and (buffer.shape[1], buffer.shape[3]) == (part.shape[-3], part.shape[-1])
            and buffer.shape[0] >= num_rows
            and buffer.shape[2] >= capacity
            for buffer, part in zip(kept, states, strict=True)
        )
        in_use = any(buffer.data_ptr() == part.data_ptr() for buffer in kept for part in states)
        if fits and not in_use:
            return [buffer.zero_() for buffer in kept]
        self.forget()
        self._buffers.pop(index, None)  # the old ones make room
        del kept
        with torch.inference_mode(False):  # or no run outside of it could write to them
            shapes = [(num_rows, part.shape[-3], capacity, part.shape[-1]) for part in states]
            self._buffers[index] = [part.new_zeros(shape) for part, shape in zip(states, shapes, strict=True)]
        return self._buffers[index]

    def is_worth(self, shape: Shape) -> bool:
        """Whether a shape that comes now has a graph, or is to get one."""
        self._uses[shape] += 1
        if shape in self._graphs or self._uses[shape] < USES:
            return shape in self._graphs
        return sum(each.has_all_layers == shape.has_all_layers for each in self._graphs) < _MOST_GRAPHS

    def has(self, shape: Shape) -> bool:
        return shape in self._graphs

    def graph(
        self, shape: Shape, filled: Inputs, run: Callable[[Inputs, Cache, Shape], Outputs], pool: type[GraphPool]
    ) -> tuple[Graph, Inputs]:
        """The graph of a shape and its inputs, captured if there is none.

        Args:
            filled: inputs with which the forward may be tried.
            run: the forward, given its inputs and a cache that writes to the buffers.
        """
        if not self.has(shape):
            self._pool = self._pool or pool()
            with torch.inference_mode(False):  # as the buffers
                inputs = filled.clone()
            cache = WrittenCache(self._buffers, inputs, shape)
            buffers = [buffer for layer in self._buffers.values() for buffer in layer]
            graph = self._pool.capture(lambda: run(inputs, cache, shape), [*inputs.tensors, *buffers])
            self._graphs[shape] = graph, inputs, cache
        self.num_replays += 1
        return self._graphs[shape][:2]

    def run(self, shape: Shape, filled: Inputs, run: Callable[[Inputs, Cache, Shape], Outputs]) -> Outputs:
        """What a graph of the shape would return, without one."""
        return run(filled, WrittenCache(self._buffers, filled, shape), shape)


def _trim(arena: weakref.ref[Arena], _: object) -> None:
    if (found := arena()) is not None:
        found.trim()


class StaticTreeCache(TreeCache):
    """A `TreeCache` whose buffers are those of an arena, if it has got them (see `Arena.lease`).

    Attributes:
        least_rows: that its buffers have.
    """

    arena: Arena | None = None
    least_rows = 0
    _buffers: dict[int, Buffers | None] | None = None
    """Those of so many layers; None if the kernel is not for them."""

    def _new_layer(self, index: int, capacity: int) -> TreeLayer | StateLayer | DummyLayer:
        layer = super()._new_layer(index, capacity)
        return _ArenaLayer(self, index, capacity) if type(layer) is TreeLayer else layer

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        if not rows and self.arena is not None and self.arena.is_owner(self):
            self.arena.trim()

    def buffers_change(self) -> None:
        super().buffers_change()
        self._buffers = None

    def _arrange(self, layers: Sequence[TreeLayer], sources_BK: Tensor) -> None:
        known = self._buffers = self._buffers or {}
        if len(layers) not in known:  # they are always the first ones
            parts = [buffer for layer in layers for buffer in layer.buffers]
            known[len(layers)] = buffers_of(parts) if can_arrange(parts) else None
        buffers = known[len(layers)]
        if buffers is None or sources_BK.shape[1] > MOST_SLOTS:
            super()._arrange(layers, sources_BK)
        else:
            arrange(buffers, self.lengths_on(sources_BK.device), sources_BK)

    def make_room(self, num_slots: int) -> None:
        """For so many slots of the longest row, tail included."""
        for layer in self.stored.values():
            layer._reserve(num_slots)


class _ArenaLayer(TreeLayer):
    def __init__(self, cache: StaticTreeCache, index: int, capacity: int):
        super().__init__(cache, capacity)
        self._index = index
        self._static = weakref.ref(cache)

    def _zeros(self, states: Sequence[Tensor], num_rows: int) -> list[Tensor]:
        cache = self._static()
        assert cache is not None, "a layer is used by its cache"
        arena = cache.arena
        if arena is None or not arena.is_owner(cache):
            return super()._zeros(states, num_rows)
        self._capacity = 1 << (self._capacity - 1).bit_length()
        buffers = arena.zeros(self._index, states, max(num_rows, cache.least_rows), self._capacity)
        self._capacity = buffers[0].shape[2]
        return buffers


def _what_is_captured(model: PreTrainedModel) -> tuple[object, ...]:
    """What a graph depends on besides its inputs and the buffers."""
    tensors = chain(model.parameters(), model.buffers())
    addresses = [part.data_ptr() for tensor in tensors for part in parts_of(tensor)]  # another library's has none
    return (model.training, model.config.get_text_config(decoder=True)._attn_implementation, *addresses)
