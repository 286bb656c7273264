"""What a graph is made of: transformers' own forward, given static inputs, in one of two ways.

* *Reading used slots*: a copy of the model has another attention by name (`attention.py`), which is told each row's
  length and what its new slots see. Names without a mask function make transformers build no mask.
* *Biased*: the model's own attention, over as many slots as the graph was made for, with a bias [B, 1, W, S].

Shape legend: B rows, W new slots, S slots, D head size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.cuda.attention import tree_attention
from specdec.cuda.graphs import Outputs
from specdec.cuda.seen import Seen
from specdec.tree_model import masks
from specdec.tree_model.layer_views import ALL_LAYERS, Layers, LayerViews, View

Model = TypeVar("Model", bound=PreTrainedModel)
_ATTENTION = "specdec_tree_attention"
_NOT_TAKEN = ("softcap", "s_aux", "position_bias")
"""Of what models give to an attention function: what would change its result."""


class Shape(NamedTuple):
    """Of a graph: rows, new slots, bound of the slots of a row (0 where nothing attends), what its layers see (windows,
    None for all; nothing where they are biased), the depths whose states it returns, and the layers that it runs."""

    num_rows: int
    width: int
    num_slots: int
    reaches: tuple[int | None, ...] = ()
    kept: tuple[int, ...] = ()
    layers: Layers = ALL_LAYERS

    @property
    def reads_used(self) -> bool:
        """Whether it reads the slots that are used, no others."""
        return bool(self.reaches)

    @property
    def has_all_layers(self) -> bool:
        return self.layers == ALL_LAYERS

    def padding(self, part_BT: Tensor) -> tuple[int, int, int, int]:
        """What is missing, as `pad` takes it."""
        return 0, self.width - part_BT.shape[1], 0, self.num_rows - len(part_BT)


class Inputs(NamedTuple):
    """Of a graph. `slots` are written; what is seen is a bias, or the parts of a `Seen` for each of the reaches;
    `hidden` are states [B, W, C] that it begins with, where it does not begin with tokens."""

    tokens_BW: Tensor
    positions_BW: Tensor
    slots_BW: Tensor
    seen: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self[:3], *self.seen, *self.hidden)

    def clone(self) -> Inputs:
        seen, hidden = (tuple(part.clone() for part in parts) for parts in (self.seen, self.hidden))
        return Inputs(self.tokens_BW.clone(), self.positions_BW.clone(), self.slots_BW.clone(), seen, hidden)

    def take(self, filled: Inputs) -> None:
        """Copy others into these: in one launch what is of one dtype."""
        torch._foreach_copy_(self[:3] + self.seen, filled[:3] + filled.seen)
        for own, part in zip(self.hidden, filled.hidden, strict=True):
            own.copy_(part)


class WrittenCache(Cache):
    """What a captured forward takes for its cache: it writes the new slots where its inputs say."""

    def __init__(self, buffers: Mapping[int, Sequence[Tensor]], inputs: Inputs, shape: Shape):
        rows_B1 = torch.arange(shape.num_rows, device=inputs.slots_BW.device).unsqueeze(1)
        rows_BW = rows_B1.expand_as(inputs.slots_BW)
        places = (rows_BW, inputs.slots_BW)
        super().__init__(layers=[_WrittenLayer(buffers[index], places, shape) for index in sorted(buffers)])


class _WrittenLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, buffers: Sequence[Tensor], places: tuple[Tensor, Tensor], shape: Shape):
        super().__init__()
        (self.keys, self.values), self._places, self._shape = buffers, places, shape
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows_BW, slots_BW = self._places
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows_BW, :, slots_BW] = states.transpose(1, 2)
        rows, slots = slice(self._shape.num_rows), slice(self._shape.num_slots)
        return self.keys[rows, :, slots], self.values[rows, :, slots]

    def get_seq_length(self) -> int:
        return self._shape.num_slots - self._shape.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._shape.num_slots, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(slots=True)
class _Reads:
    """What the attention of the forward under way is told, by its reach, and how often it was called."""

    seen: dict[int | None, Seen]
    num_slots: int
    num_calls: int = 0


_under_way: ContextVar[_Reads] = ContextVar("reads_under_way")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    reads, reach = _under_way.get(), options.get("sliding_window")
    given = [name for name in _NOT_TAKEN if options.get(name) is not None]
    if given or attention_mask is not None or value.shape[3] != query.shape[3]:
        raise RuntimeError(f"its attention takes {', '.join(given) or 'a mask, or values of another size'}")
    if reach not in reads.seen:
        raise RuntimeError(f"its attention has a window of {reach}, of which its configuration says nothing")
    reads.num_calls += 1
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return tree_attention(query, key, value, reads.seen[reach], scale=scale, num_slots=reads.num_slots), None


class Copies(dict[tuple[Layers, tuple[int, ...]], View]):
    """Views of a model, or of a copy that has our attention, by their layers and by what they keep."""


def forward_of(
    model: PreTrainedModel, cache_name: str, copies: Copies | None = None
) -> Callable[[Inputs, Cache, Shape], Outputs]:
    """Logits [B, W, V] if a shape has the head, and the states [B, W, C] that it asks for. It does not keep the model,
    which graphs belong to, nor a copy of it.

    Args:
        copies: where copies are kept, for forwards that are run and not captured; they keep the model.
    """
    known = weakref.ref(model)

    def run(inputs: Inputs, cache: Cache, shape: Shape) -> Outputs:
        model = known()
        assert model is not None, "the graphs have outlived their model"
        key = shape.layers, shape.kept
        view = (None if copies is None else copies.get(key)) or _view(model, shape)
        if copies is not None:
            copies[key] = view
        for hidden_BWC in inputs.hidden:
            view.set_input_states(hidden_BWC)
        given: dict[str, Any] = {"input_ids": inputs.tokens_BW, "position_ids": inputs.positions_BW}
        given |= {cache_name: cache, "use_cache": True} if shape.num_slots else {"use_cache": False}
        num_layers = len(range(len(cache.layers))[slice(*shape.layers)])
        outputs = run_static(view.model, given, inputs, shape, num_layers)
        states = tuple(view.states[depth] for depth in shape.kept)
        return (outputs.logits, *states) if shape.layers.stop is None else states

    return run


def run_static(model: PreTrainedModel, given: Mapping[str, Any], inputs: Inputs, shape: Shape, num_layers: int) -> Any:
    """What a model makes of static inputs.

    Args:
        model: as `attending` gives it.
        given: to it besides a mask.
        num_layers: that attend.
    """
    if shape.reads_used:
        return _read_used(model, given, _Reads(_by_reach(inputs, shape), shape.num_slots), num_layers)
    mask = inputs.seen[0] if shape.num_slots else masks.unread(inputs.tokens_BW.device)
    return model(**given, attention_mask=mask)


def _view(model: PreTrainedModel, shape: Shape) -> View:
    runs = attending(model, shape)
    if shape.has_all_layers and not shape.kept:  # there need not be a list of layers
        return View(runs)
    return LayerViews(runs).some(shape.layers, shape.kept)


def _by_reach(inputs: Inputs, shape: Shape) -> dict[int | None, Seen]:
    parts = iter(inputs.seen)
    return {reach: Seen(*islice(parts, len(Seen._fields))) for reach in shape.reaches}


def _read_used(model: PreTrainedModel, given: Mapping[str, Any], reads: _Reads, num_layers: int) -> Any:
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
    token = _under_way.set(reads)
    try:
        outputs = model(**given, attention_mask=None)
    finally:
        _under_way.reset(token)
    if reads.num_calls != num_layers:
        raise RuntimeError("not all of its layers call the attention that its configuration names")
    return outputs


def attending(model: Model, shape: Shape) -> Model:
    """A copy of the modules, with the same weights, whose configurations name our attention; the model itself where it
    is given a bias."""
    if not shape.reads_used:
        return model
    copies: dict[int, Any] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            twin = copies[id(module)] = copy.copy(module)
            twin._modules = {name: None if child is None else copied(child) for name, child in module._modules.items()}
            config = twin.__dict__.get("config")
            if hasattr(config, "_attn_implementation_internal"):
                if id(config) not in copies:
                    copies[id(config)] = copy.copy(config)
                    copies[id(config)]._attn_implementation_internal = _ATTENTION
                twin.config = copies[id(config)]
        return copies[id(module)]

    return cast(Model, copied(model))
