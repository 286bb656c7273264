"""Fused layers called one after the other, without the model's own forward around them.

That forward makes masks, positions and outputs for every case there is: half a millisecond a call, as much as five
layers of a small model. Drafting from early layers calls it several times for every token, with masks and positions
that are known. So where all layers are fused and nothing else is special, they are called directly; the model's own
embedding, rotary embedding, norm and head are. Whether that gives the model's own states, to the last bit, is tried
once for a model.

Shape legend: B rows, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from specdec.hf import CACHE
from specdec.kernels.model.layer import FusedLayer
from specdec.kernels.model.layer_run import LayerRun
from specdec.kernels.model.prepared import prepared
from specdec.kernels.model.profile import profile_of

_STATIC = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding whose angles depend on nothing but the position."""


Layer: TypeAlias = Callable[..., Tensor]


class _Tried(dict[object, bool]):
    """By how the model is prepared: whether its layers, called directly, give the same."""


class Outputs(NamedTuple):
    """What is read of a model's outputs. logits: None without a head; last_hidden_state: after the norm, if any."""

    last_hidden_state: Tensor
    logits: Tensor | None


class Rotations:
    """A model's rotary embedding, computed once for each position: looking it up takes a tenth of the time.

    Where angles depend on more than the position it is computed every time.

    Args:
        rotary_emb: takes states and positions [B, T], and returns cos and sin.
        config: of the model.
    """

    def __init__(self, rotary_emb: Callable[..., Any], config: PreTrainedConfig):
        rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
        self._rotate = rotary_emb
        self._is_static = rope.get("rope_type", "default") in _STATIC
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden_BTC: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, T, head size]."""
        tables = self.tables(hidden_BTC, int(position_ids.max()) + 1)
        if tables is None:
            cos, sin = self._rotate(hidden_BTC, position_ids)
            return cos, sin
        cos, sin = tables
        return cos[position_ids], sin[position_ids]

    def tables(self, hidden_BTC: Tensor, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin of so many positions and more, each [positions, head size]; None where positions do not say it.

        Args:
            hidden_BTC: of the dtype and on the device that they are to have; any states.
        """
        if not self._is_static:
            return None
        if self._tables is None or len(self._tables[0]) < num_positions:
            positions = torch.arange(num_positions + max(256, num_positions // 2), device=hidden_BTC.device)
            cos_1ND, sin_1ND = self._rotate(hidden_BTC[:1], positions.unsqueeze(0))
            self._tables = cos_1ND[0], sin_1ND[0]
        return self._tables


def rotations_of(model: PreTrainedModel) -> Rotations:
    return Rotations(model.get_decoder().rotary_emb, model.config)


class FusedLayers:
    """Some layers one after the other, those that `prepare` has fused in one native call; for one run.

    Args:
        layers: each takes and returns states [B, T, C].
    """

    def __init__(self, layers: Sequence[Layer]):
        self._parts = list(_parts(layers))
        self._is_checked = False

    def __call__(
        self, hidden_BTC: Tensor, mask: Tensor | None, cache: Any, rotation: tuple[Tensor, Tensor], *, use_cache: bool
    ) -> Tensor:
        for run, layers in self._parts:
            if run is not None:
                done_BTC = run(hidden_BTC, mask, cache, rotation, is_checked=self._is_checked)
                if done_BTC is not None:
                    hidden_BTC = done_BTC
                    continue
            for layer in layers:
                hidden_BTC = layer(
                    hidden_BTC,
                    attention_mask=mask,
                    **{CACHE: cache},
                    use_cache=use_cache,
                    position_embeddings=rotation,
                    is_checked=self._is_checked,
                )
        self._is_checked = True  # until the next run, which has layers of its own: looking takes a tenth of a forward
        return hidden_BTC


class FusedStack:
    """Called like a model, with the arguments that a `TreeModel` gives; it is for one run.

    Args:
        model: whose embedding and head are used.
        rotations: of the model.
        layers: some layers; each takes and returns states [B, T, C].
        norm: after them, None for none.
        has_head: whether logits are wanted.
        given: returns the states to start with; None for the embeddings of `input_ids`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: Rotations,
        layers: Sequence[Layer],
        norm: nn.Module | None,
        *,
        has_head: bool,
        given: Callable[[], Tensor] | None = None,
    ):
        self._embed = model.get_decoder().embed_tokens
        self._rotations = rotations
        self._layers = FusedLayers(layers) if layers else None
        self._norm = norm
        self._head = model.get_output_embeddings() if has_head else None
        self._given = given

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Outputs:
        cache = past_key_values if cache is None else cache
        hidden_BTC = self._embed(input_ids) if self._given is None else self._given()
        if self._layers is not None:
            rotation = self._rotations(hidden_BTC, position_ids)
            hidden_BTC = self._layers(hidden_BTC, attention_mask, cache, rotation, use_cache=use_cache)
        if self._norm is not None:
            hidden_BTC = self._norm(hidden_BTC)
        return Outputs(hidden_BTC, None if self._head is None else self._head(hidden_BTC[:, -logits_to_keep:]))


def is_fused(layer: object) -> bool:
    """Whether `prepare` has fused the layer."""
    return isinstance(layer, nn.Module) and isinstance(layer.__dict__.get("forward"), FusedLayer)


def _parts(layers: Sequence[Layer]) -> Iterator[tuple[LayerRun | None, Sequence[Layer]]]:
    """Fused layers that follow one another, and all others."""
    for fused, group in groupby(layers, is_fused):
        own = list(group)
        yield LayerRun([layer for layer in own if isinstance(layer, nn.Module)]) if fused else None, own


def stacks(model: PreTrainedModel, layers: Sequence[nn.Module], norm: nn.Module | None) -> bool:
    """Whether all layers of a model may be called this way: now, for hooks on the model would not run."""
    decoder = model.get_decoder()
    config = model.config.get_text_config(decoder=True)
    is_plain = all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb")) and norm is not None
    if not is_plain or len(set(getattr(config, "layer_types", None) or ())) > 1 or not all(map(is_fused, layers)):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (model, decoder)):
        return False
    known, state = profile_of(model).part(_Tried), prepared(model)
    if state not in known:
        known[state] = _gives_the_same(model, FusedStack(model, rotations_of(model), layers, norm, has_head=True))
    return known[state]


@torch.no_grad()
def _gives_the_same(model: PreTrainedModel, stack: FusedStack) -> bool:
    """Both forward a few tokens, then one more."""
    cache, past = DynamicCache(), DynamicCache()
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    position_ids = torch.arange(5).unsqueeze(0)
    input_ids = (position_ids + 1) * 7919 % vocab_size
    mask_11TT = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    for part, mask in ((slice(0, 4), mask_11TT), (slice(4, 5), None)):
        inputs = {"input_ids": input_ids[:, part], "position_ids": position_ids[:, part], "attention_mask": mask}
        expected = model(**inputs, **{CACHE: past}, use_cache=True).logits
        logits = stack(**inputs, **{CACHE: cache}).logits
        if logits is None or not torch.equal(logits, expected):
            return False
    return True
