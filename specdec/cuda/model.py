"""A `TreeModel` that replays graphs of its forwards: transformers' own forward, captured with static inputs.

A graph has so many rows, new slots and slots to attend to; the last two are rounded up. Slots that fill it up see
nothing but themselves, and are written past the tail, where the next forward overwrites them. It is made by the first
way of `captured.py` that fits the model, and is tried against the ordinary forward before it is used.

Shape legend: B rows, T new slots, W their number rounded up, K tail slots, S slots, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda.arena import USES, Arena, Known, StaticTreeCache
from specdec.cuda.attention import can_attend, seen_bits
from specdec.cuda.captured import Inputs, Shape, forward_of
from specdec.cuda.functions import GraphedFunctions
from specdec.cuda.graphs import GraphPool, Outputs, graphs_for
from specdec.cuda.seen import TAIL_SLOTS, Seen
from specdec.hf import home_device, num_processes
from specdec.kernels.model.profile import profile_of
from specdec.tree_model import masks
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.forwards import Forwarded
from specdec.tree_model.layer_kinds import layer_kinds
from specdec.tree_model.layer_views import ALL_LAYERS, Layers
from specdec.tree_model.model import TreeModel
from trees.uploads import upload

_logger = logging.getLogger("specdec")
_MOST_ROWS, _MOST_NEW, _MOST_TOKENS = 16, 64, 256
"""Of a forward that is captured: larger ones are not bound by their launches."""
_FEWEST_SLOTS = 256
_BUCKETS = (1 << 11, 1 << 13, 1 << 15, 1 << 17)
"""Bounds of the slots of a row, for graphs that read those that are used."""
_MOST_PARTS = 1 << 22
"""New slots times bound: each split of a row has sums of its own, which would be half a gigabyte."""
_ROUNDING = (1e-3, 0.05)
"""Share of the logits by which a graph's may differ from the ordinary forward's: in float32, and in 16 bits."""
_ROTATIONS = ("dynamic", "longrope")
"""Rotary embeddings that look at the positions on the host."""
_ATTENDING = ("full_attention", "sliding_attention")


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model's forwards are not captured; None if they are, as far as can be told without trying."""
    if graphs_for(home_device(model)) is None:
        return "it is not on a CUDA device"
    return why_not_captured(model) or profile_of(model).part(Arena).known.refusal


def why_not_captured(model: PreTrainedModel) -> str | None:
    """Why a model's forwards are captured on no device; None if they are where there are graphs."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "it has hooks, which a replay would not call"
    if any(hasattr(module, "active_adapters") for module in model.modules() if not isinstance(module, PreTrainedModel)):
        return "it has adapters, which may be switched"
    if (reason := _why_not_static(model)) is not None:
        return reason
    if has_windows(model) and (reason := reads_all(model)):
        return f"a layer has a window, and {reason}"
    return None


def why_no_static_shape(model: PreTrainedModel) -> str | None:
    """Why a model's forwards cannot read used slots from static inputs; None if they can, captured or not."""
    return _why_not_static(model) or reads_all(model)


def _why_not_static(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if num_processes(model) > 1 or len({weight.device for weight in model.parameters()}) > 1:
        return "it is split over devices"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate moves its inputs or weights"
    if rope.get("rope_type") in _ROTATIONS:
        return "its rotary embedding depends on the length"
    if not all(
        kind is not None and kind.name in _ATTENDING and not kind.num_states and kind.has_slots
        for kind in layer_kinds(config)
    ):
        return "a layer has chunks, a state or a selection"
    return None


def has_windows(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    return any(kind is not None and kind.reach is not None for kind in layer_kinds(config))


def reads_all(model: PreTrainedModel) -> str | None:
    """Why the graphs of a model read all slots that they were made for; None if they read those that are used."""
    if model.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
        return "its attention is not PyTorch's"
    if not can_attend(home_device(model)):
        return "Triton is not installed"
    return profile_of(model).part(Arena).known.reads_all


def scratch_of(model: PreTrainedModel) -> TreeModel:
    """A tree model that decodes as others of the model do, but takes nothing that they could need."""
    return TreeModel(model) if why_not(model) else GraphedTreeModel(model, Arena())


def filling_up(model: PreTrainedModel, num_rows: int) -> Callable[[int], int] | None:
    """How many tokens a graph has, by those of all rows that are asked for; None where there are no graphs."""
    if why_not(model) or num_rows > _MOST_ROWS:
        return None

    def filled_up(num_tokens: int) -> int:
        width = 1 << (-(-num_tokens // num_rows) - 1).bit_length()
        return num_rows * width if width <= _MOST_NEW and num_rows * width <= _MOST_TOKENS else num_tokens

    return filled_up


class GraphedTreeModel(TreeModel):
    """Forwards that come again in one shape are replayed, the others run as in a `TreeModel`."""

    def __init__(self, model: PreTrainedModel, arena: Arena | None = None):
        super().__init__(model)
        self._arena = arena or profile_of(model).part(Arena)
        self._run_static = forward_of(model, self._cache_name)
        self._reads_all = reads_all(model)
        reaches = {kind.reach for kind in self.kinds if kind is not None}
        self._reaches = tuple(sorted(reaches, key=lambda reach: reach or 0))
        self._padding: tuple[object, Tensor | None] | None = None
        """The rows and their padding; where each text starts, if that is all there is to say."""
        self._steps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Numbers of new slots in the tail, and their bits."""

    def _new_cache(self, num_rows: int, capacity: int) -> StaticTreeCache:
        room = 1 << (max(_FEWEST_SLOTS, capacity + 2 * _MOST_NEW) - 1).bit_length()
        cache = StaticTreeCache(self.num_layers, num_rows, room, **self._layers)
        cache.arena = self._arena if self._arena.lease(cache, self.model) else None
        return cache

    @property
    def functions(self) -> GraphedFunctions | None:
        """Graphs of what this run makes of its logits; None if another run has them."""
        return self._arena.functions if self._arena.is_owner(self.cache) else None

    def capture(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> None:
        """Forward such tokens, and forget them, until there is a graph if there can be one."""
        for _ in range(USES):
            self.forward(tokens_BT, offsets_BT, seen_BTK)
            self.forget_tail()

    def _forward_layers(
        self,
        layers: Layers,
        tokens_BT: Tensor,
        offsets_BT: Tensor,
        seen_BTK: Tensor | None,
        hidden: Sequence[Tensor] = (),
    ) -> Forwarded:
        ordinary = partial(super()._forward_layers, layers, tokens_BT, offsets_BT, seen_BTK, hidden)
        shape, pool = self._shape(layers, tokens_BT), graphs_for(self.device)
        if shape is None or pool is None or not self._arena.is_worth(shape):
            return ordinary()
        cache = self.cache
        assert isinstance(cache, StaticTreeCache)
        # before anything looks at the buffers: they may be others then
        cache.make_room(max(cache.lengths) + TAIL_SLOTS if shape.reads_used else shape.num_slots)
        filled = self._fill(shape, tokens_BT, offsets_BT, seen_BTK, hidden)
        if not self._arena.has(shape):
            return self._capture(shape, filled, pool, ordinary)
        return self._append(shape, self._replay(shape, filled, pool), offsets_BT)

    def _append(self, shape: Shape, outputs: Outputs, offsets_BT: Tensor) -> Forwarded:
        """Take what has been forwarded for the end of the tail."""
        has_tail = self._tail_of(shape.layers) > 0
        self._offsets_BS = torch.cat([self._offsets_BS, offsets_BT], 1) if has_tail else offsets_BT
        for layer in self.cache.stored_in(*shape.layers):
            layer.append(offsets_BT.shape[1])
        return forwarded(shape, outputs, *offsets_BT.shape)

    def _replay(self, shape: Shape, filled: Inputs, pool: type[GraphPool]) -> Outputs:
        graph, inputs = self._arena.graph(shape, filled, self._run_static, pool)
        inputs.take(filled)
        return graph.replay()

    def _capture(
        self, shape: Shape, filled: Inputs, pool: type[GraphPool], ordinary: Callable[[], Forwarded]
    ) -> Forwarded:
        """The forward, by the way that needs no graph; the graph is kept if it says the same."""
        replayed, error = None, None
        try:
            replayed = self._replay(shape, filled, pool)[0].clone()
        except Exception as raised:  # of PyTorch, Triton or the model: whatever it is, there is another way
            error = f"its forward could not be captured ({type(raised).__name__}: {raised})"
        logits, states = forwarded = ordinary()
        expected = states[shape.kept[0]] if logits is None else logits
        if replayed is not None and not say_the_same(replayed[:, : expected.shape[1]], expected):
            error = f"a captured forward gives other {'states' if logits is None else 'logits'}"
        if error is not None:
            self._refuse(shape, error)
        return forwarded

    def _refuse(self, shape: Shape, error: str) -> None:
        """Take the next way down, with forwards like this one."""
        name, known = type(self.model).__name__, self._known(shape.layers)[-1]
        if not shape.has_all_layers:
            name = f"some layers of {name}"
        if shape.reads_used:
            known.reads_all = error
            _logger.warning("the CUDA graphs of %s read more slots than are used: %s", name, error)
        else:
            known.refusal = error
            _logger.warning("%s: no CUDA graphs, %s", name, error)
        self._arena.forget()

    def _known(self, layers: Layers) -> Sequence[Known]:
        """What may be in the way of graphs of these layers, their own last."""
        arena = self._arena
        return [arena.known] if layers == ALL_LAYERS else [arena.known, arena.known_of_parts]

    def _shape(self, layers: Layers, tokens_BT: Tensor) -> Shape | None:
        """Of the graph for new tokens; None where there is to be none."""
        cache, (num_rows, num_new) = self.cache, tokens_BT.shape
        width = self._width(layers, num_rows, num_new)
        if width is None or len(self._lag_AB) > 1 or not any(cache.lengths):
            return None
        kept, tail = self._kept_of(layers), self._tail_of(layers)
        reads_used = self._reads_all is None and not any(each.reads_all for each in self._known(layers))
        if reads_used and tail + width <= TAIL_SLOTS and self._starts_B is not None:
            bucket = self.bound_of(cache)
            if bucket > _BUCKETS[-1] or num_rows * width * bucket > _MOST_PARTS:
                return None
            return Shape(num_rows, width, bucket, self._reaches, kept, layers)
        if self._reaches != (None,):
            return None
        num_slots = max(_FEWEST_SLOTS, 1 << (max(cache.lengths) + tail + width - 1).bit_length())
        return Shape(num_rows, width, num_slots, kept=kept, layers=layers)

    def _width(self, layers: Layers, num_rows: int, num_new: int) -> int | None:
        """New slots of the graph for so many; None where there is to be none."""
        width = 1 << (num_new - 1).bit_length()
        if any(each.refusal for each in self._known(layers)) or not self._arena.is_owner(self.cache):
            return None
        fits = num_rows <= _MOST_ROWS and width <= _MOST_NEW and num_rows * width <= _MOST_TOKENS
        return width if fits else None

    def _kept_of(self, layers: Layers) -> tuple[int, ...]:
        """After how many layers states are returned; those after the last of them come first, where no head follows."""
        start, stop = layers
        kept = sorted(depth for depth in self._kept if start < depth < (self.num_layers + 1 if stop is None else stop))
        return tuple(kept) if stop is None else (stop, *kept)

    @staticmethod
    def bound_of(cache: TreeCache) -> int:
        """Of the slots of all rows, of a few numbers."""
        needed = max(cache.lengths) + TAIL_SLOTS
        return next((slots for slots in _BUCKETS if needed <= slots), 1 << (needed - 1).bit_length())

    @property
    def _starts_B(self) -> Tensor | None:
        """int64 slots of padding before the text of each row; None where padding is elsewhere too."""
        if self._padding is None or self._padding[0] is not self._padded:
            starts_B: Tensor | None = torch.zeros_like(self._lag_AB[0])
            if self._prompt_BP is not None:
                has_holes = (self._prompt_BP[:, 1:] < self._prompt_BP[:, :-1]).any() | ~self._prompt_BP[:, -1:].all()
                starts_B = None if bool(has_holes) else (~self._prompt_BP).sum(1)
            self._padding = self._padded, starts_B
        return self._padding[1]

    @property
    def _padded(self) -> Tensor:
        """Another one for other rows."""
        return self._lag_AB if self._prompt_BP is None else self._prompt_BP

    def select_rows(self, rows: Sequence[int]) -> None:
        known = self._padding if self._padding is not None and self._padding[0] is self._padded else None
        super().select_rows(rows)
        if known is not None and known[1] is not None:  # to find it anew, the host would wait
            self._padding = self._padded, known[1].index_select(0, upload(list(rows), self.device))

    def _fill(
        self,
        shape: Shape,
        tokens_BT: Tensor,
        offsets_BT: Tensor,
        seen_BTK: Tensor | None,
        hidden: Sequence[Tensor] = (),
    ) -> Inputs:
        """What the graph is to be given."""
        cache = self.cache
        padding = shape.padding(tokens_BT)
        steps_W, _ = self._new_slots(self._tail_of(shape.layers), shape.width)
        lengths_B = filled_up(cache.lengths_on(self.device), padding[2:])
        slots_BW = lengths_B.unsqueeze(1) + steps_W
        positions_BW = filled_up(self.next_positions_B.unsqueeze(1) + offsets_BT, padding)
        if shape.reads_used:
            seen = tuple(chain.from_iterable(self._seen(shape, offsets_BT, seen_BTK, lengths_B)))
        else:
            seen = (self._bias(shape, seen_BTK, slots_BW),)
        filled = tuple(filled_up(hidden_BTC, (0, 0, *padding)) for hidden_BTC in hidden)
        return Inputs(filled_up(tokens_BT, padding), positions_BW, slots_BW, seen, filled)

    def _seen(self, shape: Shape, offsets_BT: Tensor, seen_BTK: Tensor | None, lengths_B: Tensor) -> Iterator[Seen]:
        """A `Seen` for each of the reaches."""
        first, padding, starts_B = self._tail_of(shape.layers), shape.padding(offsets_BT), self._starts_B
        assert starts_B is not None, "the shape says so"
        starts_BW = filled_up(starts_B, padding[2:]).unsqueeze(1).expand(-1, shape.width)
        own_W, offsets_BK = self._new_slots(first, shape.width)[1], offsets_BT
        if first:
            offsets_BK = torch.cat([self._offsets_BS, offsets_BT], 1)
        for reach in shape.reaches:
            firsts_BW, seen = starts_BW, seen_BTK
            if reach is not None:
                ends_BT = self.cache.lengths_on(self.device).unsqueeze(1) + offsets_BT + 1
                firsts_BW = torch.maximum(starts_BW, filled_up(ends_BT - reach, padding))
                is_near_BTK = offsets_BT.unsqueeze(2) - offsets_BK.unsqueeze(1) < reach
                seen = is_near_BTK if seen is None else seen & is_near_BTK
            # one that sees the whole tail needs no bit to be looked at
            bits_BW = own_W | (filled_up(seen_bits(seen), padding) if seen is not None else (1 << first) - 1)
            yield Seen(firsts_BW, lengths_B, bits_BW.expand_as(starts_BW))

    def _new_slots(self, first: int, width: int) -> tuple[Tensor, Tensor]:
        if (first, width) not in self._steps:
            steps_W = torch.arange(first, first + width, device=self.device)
            self._steps[first, width] = steps_W, torch.ones_like(steps_W) << steps_W
        return self._steps[first, width]

    def _bias(self, shape: Shape, seen_BTK: Tensor | None, slots_BW: Tensor) -> Tensor:
        """[B, 1, W, S] in the model's dtype."""
        if seen_BTK is None:
            num_tail = self._tail_of(shape.layers) + 1
            seen_BTK = slots_BW.new_ones((shape.num_rows, 1, num_tail), dtype=torch.bool)
        visible_BTS = masks.visible_slots(seen_BTK, self.cache.lengths, self._prompt_BP)
        _, num_new, num_visible = visible_BTS.shape
        lowest, size = torch.finfo(self.model.dtype).min, (shape.num_rows, 1, shape.width, shape.num_slots)
        bias_B1WS = torch.full(size, lowest, dtype=self.model.dtype, device=self.device)
        bias_B1WS[:, 0, :num_new, :num_visible].masked_fill_(visible_BTS, 0)
        return bias_B1WS.scatter_(3, slots_BW[:, None, :, None], 0)  # each sees itself


def filled_up(part: Tensor, padding: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(part, padding) if any(padding) else part


def forwarded(shape: Shape, outputs: Outputs, num_rows: int, num_new: int) -> Forwarded:
    """What a graph has given for so many rows and slots, copied."""
    parts = [part[:num_rows, :num_new].clone() for part in outputs]
    logits = parts.pop(0) if shape.layers.stop is None else None
    return logits, dict(zip(shape.kept, parts, strict=True))


def say_the_same(logits: Tensor, expected: Tensor) -> bool:
    """As far as rounding allows; a slot too many or too few in an attention shows."""
    expected = expected.float()
    distance = (logits.float() - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()
    return bool(distance <= _ROUNDING[logits.element_size() < 4])
