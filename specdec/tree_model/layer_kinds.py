"""What the layers of a model keep and see, by its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from specdec.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerKind:
    """What a layer's tokens see.

    Args:
        name: the kind's name in `config.layer_types`, by which models take its mask.
        reach: a window, or the size of chunks; None if a token sees all that came before it.
        num_states: states of recurrences and convolutions that each token overwrites.
        has_slots: whether the layer attends to keys and values.
    """

    name: str
    reach: int | None = None
    num_states: int = 0
    has_slots: bool = True

    @property
    def sees_all(self) -> bool:
        """Whether there is nothing but keys and values, and each token sees all of those before it."""
        return self.name == "full_attention" and self.has_slots and self.reach is None and not self.num_states

    @property
    def is_chunked(self) -> bool:
        return self.name == "chunked_attention"

    def within(self, num_slots: int) -> LayerKind:
        """The same among so few slots that all may be visible."""
        return self if self.reach is None or self.reach < num_slots else replace(self, reach=None)


_ATTENDING = (
    *(DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
)


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind | None]:
    """The kind of each layer; None for one that stores nothing, such as one that takes an earlier layer's keys.

    Raises:
        UnsupportedModelError: a layer keeps what cannot take back drafted tokens, or two kinds have one mask.
    """
    text = config.get_text_config(decoder=True)
    names, _ = get_layer_types_and_kwargs(text)
    kinds: list[LayerKind | None] = []
    for index, (name, layer) in enumerate(zip(names, DynamicCache(config=text).layers, strict=True)):
        num_states = getattr(layer, "number_of_states", 0)
        if type(layer) is DummyLayer:
            kinds.append(None)
        elif type(layer) is LinearAttentionLayer:
            kinds.append(LayerKind(name, num_states=num_states, has_slots=False))
        elif type(layer) in _ATTENDING:
            kinds.append(LayerKind(name, getattr(layer, "sliding_window", None), num_states))
        else:
            raise UnsupportedModelError(
                f"layer {index} of this {config.model_type!r} model keeps a {type(layer).__name__}, which cannot "
                "take back drafted tokens; specdec decodes models whose layers attend to keys and values, in full "
                "or in windows or chunks, or keep a state: use model.generate()"
            )
    if len({kind.name for kind in kinds if kind is not None}) < len({kind for kind in kinds if kind is not None}):
        raise UnsupportedModelError(
            f"layers of one type have windows of different sizes in this {config.model_type!r} model, and models take "
            "one mask a type: use model.generate()"
        )
    return kinds


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether a layer has a state that each token overwrites: what has been read cannot be taken back then."""
    return any(kind is not None and kind.num_states for kind in layer_kinds(config))
