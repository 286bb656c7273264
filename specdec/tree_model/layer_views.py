"""Views of a model that run only some of its layers.

A view is a shallow copy of the model with another list of decoder layers. Embeddings, masks, rotary embedding, norm
and head are the model's own objects, called by the model's own code; the model itself is not touched. A view that
starts past the first layer is given the hidden states to go on with.

Shape legend: B rows, T slots, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.errors import UnsupportedModelError
from specdec.kernels.model.packed import PackedLayers, can_pack
from specdec.kernels.model.stack import FusedStack, Rotations, is_fused, rotations_of, stacks
from specdec.tree_model.module_copies import with_modules

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
_MAX_VIEWS = 128
"""Views are cheap to make, but those that keep states are many: one for each set of depths."""


class Layers(NamedTuple):
    """Some of a model's layers, one after the other: those from `start` on and before `stop`; None: to the last, with
    final norm and head."""

    start: int = 0
    stop: int | None = None


ALL_LAYERS = Layers()


class _Given(nn.Module):
    """Stands for layers that have already run: its output is what it was given."""

    hidden_BTC: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden_BTC


class _Kept(nn.Module):
    """A layer, or the place before the first missing one, whose output is kept."""

    def __init__(self, layer: nn.Module | None, depth: int, states: dict[int, Tensor]):
        super().__init__()
        self._layer = layer
        self._depth = depth
        self._states = states

    def forward(self, hidden_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._layer is not None:
            hidden_BTC = self._layer(hidden_BTC, *args, **kwargs)
        self._states[self._depth] = hidden_BTC
        return hidden_BTC


@dataclass(frozen=True, eq=False)
class View:
    """A model that runs some of its layers.

    Attributes:
        model: called like the model that it is a view of.
        states: what the last call left: number of layers passed -> hidden states [B, T, C], before the final norm.
        run: gives the same as `model` for tokens that are added to a tail, more cheaply where the layers are fused.
    """

    model: PreTrainedModel
    states: dict[int, Tensor] = field(default_factory=dict)
    _given: _Given | None = None
    _fused: FusedStack | None = None

    @property
    def run(self) -> Callable[..., Any]:
        return self._fused or self.model

    def set_input_states(self, hidden_BTC: Tensor) -> None:
        """The hidden states that the next call starts with."""
        assert self._given is not None, "this view starts with the embeddings"
        self._given.hidden_BTC = hidden_BTC


class LayerViews:
    """Makes views of a model, each once.

    Attributes:
        layers: the model's own decoder layers.

    Raises:
        UnsupportedModelError: the model's decoder layers are not to be found.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        decoder = model.get_decoder()
        self._path = next((name for name, module in model.named_modules() if module is decoder), "").split(".")
        self.num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [
            name
            for name, child in decoder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == self.num_layers
        ]
        if len(lists) != 1 or not self._path[0]:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not keep its decoder layers in one list: it cannot exit early; "
                "take another drafter"
            )
        self._list = lists[0]
        self._norm = next((name for name, _ in decoder.named_children() if name in _FINAL_NORMS), None)
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
        self._has_kinds = len(set(kinds)) > 1
        self.layers: list[nn.Module] = list(getattr(decoder, self._list))
        self._views: dict[Any, View] = {}

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last layer and the head, None if there is none under a known name."""
        return None if self._norm is None else getattr(self._model.get_decoder(), self._norm)

    @cached_property
    def uses_fused_layers(self) -> bool:
        """Whether the layers can be called without the model's own forward around them (`kernels/model/stack.py`)."""
        return stacks(self._model, self.layers, self.final_norm)

    @property
    def can_pack(self) -> bool:
        """Whether the tokens of several texts may go through the layers as one list, now (see `packed`)."""
        return self.uses_fused_layers and can_pack(self._model, self.layers)

    @cached_property
    def packed(self) -> PackedLayers:
        """All layers and the head, for packed texts."""
        assert self.final_norm is not None, "`can_pack` asks first"
        return PackedLayers(self._model, self._rotations, self.layers, self.final_norm)

    def whole(self, kept: Iterable[int] = ()) -> View:
        """All layers; the states after `kept` layers (each from 1 on) are kept."""
        return self.some(ALL_LAYERS, kept)

    def some(self, layers: Layers, kept: Iterable[int] = ()) -> View:
        """These layers: from given states if they are not the first ones; what the last one leaves is kept too if there
        are others."""
        return self._view(layers.start, self.num_layers if layers.stop is None else layers.stop, kept)

    def body(self) -> View:
        """All layers without norm and head, if the layers are fused: for tokens that nobody asks about."""
        assert self.uses_fused_layers
        if "body" not in self._views:
            self._views["body"] = View(self._model, _fused=self._fused(self.layers, None, None, has_head=False))
        return self._views["body"]

    def below(self, stop: int) -> View:
        """The first `stop` layers without head; the state after them is kept."""
        return self.some(Layers(0, stop))

    def head(self) -> View:
        """Final norm and head alone, of given states."""
        return self.some(Layers(self.num_layers))

    def block(self, block: nn.Module) -> View:
        """Another layer in the place of all, and the final norm, of given states; the layer's output is kept as 0."""
        key = ("block", id(block))
        if key not in self._views:
            states: dict[int, Tensor] = {}
            given = _Given()
            kept = _Kept(block, 0, states)
            layers = [*[given] * self._place(self.num_layers - 1), kept]
            fused = self._fused([kept], given, self.final_norm, has_head=False) if is_fused(block) else None
            self._views[key] = View(self._with(layers).base_model, states, given, fused)
        return self._views[key]

    def _view(self, start: int, stop: int, kept: Iterable[int]) -> View:
        depths = frozenset(depth for depth in kept if start < depth <= stop)
        key = (start, stop, depths)
        if key not in self._views:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = self._make(start, stop, depths)
        return self._views[key]

    def _make(self, start: int, stop: int, kept: frozenset[int]) -> View:
        states: dict[int, Tensor] = {}
        given = _Given() if start else None
        stand_ins: list[nn.Module] = [] if given is None else [given] * self._place(start if start < stop else 1)
        layers: list[nn.Module] = []
        for index in range(start, stop):
            layer = self.layers[index]
            layers.append(_Kept(layer, index + 1, states) if index + 1 in kept else layer)
        if stop < self.num_layers:
            layers.append(_Kept(None, stop, states))
            fused = self._fused(layers, given, None, has_head=False)
            return View(self._without_norm([*stand_ins, *layers]), states, given, fused)
        fused = self._fused(layers, given, self.final_norm, has_head=True)
        return View(self._with([*stand_ins, *layers]), states, given, fused)

    def _fused(
        self, layers: Sequence[nn.Module], given: _Given | None, norm: nn.Module | None, *, has_head: bool
    ) -> FusedStack | None:
        if not self.uses_fused_layers:
            return None
        start = None if given is None else lambda: given.hidden_BTC
        return FusedStack(self._model, self._rotations, layers, norm, has_head=has_head, given=start)

    @cached_property
    def _rotations(self) -> Rotations:
        return rotations_of(self._model)

    def _place(self, index: int) -> int:
        """How many stand-ins come before a layer: all, where models take the kind of its mask from its index."""
        return index if self._has_kinds else min(index, 1)

    def _with(self, layers: list[nn.Module]) -> PreTrainedModel:
        """The model with other layers."""
        return with_modules(self._model, {".".join([*self._path, self._list]): nn.ModuleList(layers)})

    def _without_norm(self, layers: list[nn.Module]) -> PreTrainedModel:
        """The model with other layers, and nothing after them: only what they leave is wanted."""
        model = self._with(layers)
        if self._norm is not None:
            model = with_modules(model, {".".join([*self._path, self._norm]): nn.Identity()})
        return model.base_model
