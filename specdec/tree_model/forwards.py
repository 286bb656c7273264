"""One forward of a Hugging Face causal LM over a tree cache: which layers are called, with which positions and masks.

Masks are built once a forward and handed to the model as they are (4-D); positions follow the depth in the tree.

Shape legend: A planes of positions (one for text, several past an image), B rows, P prompt, T new slots, K tail slots
(old and new), S all tail slots, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.errors import UnsupportedModelError
from specdec.hf import cache_name, home_device
from specdec.kernels import prepared
from specdec.tree_model import masks
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.layer_kinds import layer_kinds
from specdec.tree_model.layer_views import ALL_LAYERS, Layers, LayerViews, View
from specdec.tree_model.walking import walking

Forwarded = tuple[Tensor | None, dict[int, Tensor]]
"""Of some layers: logits [B, T, V] if the head is among them; the states that are kept, and those after the last of
them if it is not."""


class Forwards:
    """Forwards a causal LM, whole or some of its layers, over a cache.

    Args:
        model: a decoder-only model that has passed `compatibility.check_model`.

    Attributes:
        states: of the last forward, for every depth asked for with `keep_states`: hidden states after that many layers
            [B, T, C], before the final norm, slot by slot.
        num_forwards: of all layers so far.
    """

    cache: TreeCache
    _prompt_BP: Tensor | None
    """bool: which prompt slots are no padding; None if all are."""
    _lag_AB: Tensor
    """How far positions lag behind slots."""
    _offsets_BS: Tensor
    """Offsets of the tail's slots."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self.kinds = layer_kinds(config)
        self._additive = config._attn_implementation == "eager"
        self.vocab_size: int = config.vocab_size
        self.num_layers = len(self.kinds)
        self._sees_all = all(kind is not None and kind.sees_all for kind in self.kinds)
        self._cache_name = cache_name(model)
        kinds = list(enumerate(self.kinds))
        self._layers: dict[str, Any] = {
            "without": {index for index, kind in kinds if kind is None or not kind.has_slots},
            "recurrent": {index: kind.num_states for index, kind in kinds if kind is not None and kind.num_states},
        }
        self.device = home_device(model)
        self.num_forwards = 0
        self.states: dict[int, Tensor] = {}
        self._kept: frozenset[int] = frozenset()

    @property
    def keeps_states(self) -> bool:
        """Whether a layer has a state that the next token overwrites: what is committed cannot be taken back then."""
        return bool(self._layers["recurrent"])

    @cached_property
    def _runs(self) -> PreTrainedModel:
        """What is called: where a layer has states, a copy that steps its mixers."""
        return walking(self.model, TreeCache(self.num_layers, 1, **self._layers)) if self.keeps_states else self.model

    @cached_property
    def views(self) -> LayerViews:
        """The model's layers, for drafters that run some of them."""
        return LayerViews(self._runs)

    def keep_states(self, depths: Iterable[int]) -> None:
        """From now on keep the hidden states after these numbers of layers (1 and more) in `states`, besides others."""
        self._kept |= frozenset(depths)

    @property
    def kept_depths(self) -> frozenset[int]:
        """The numbers of layers after which states are kept."""
        return self._kept

    def _new_inputs(self, tokens_BT: Tensor) -> dict[str, Any]:
        """Of tokens that follow what is committed."""
        num_rows, num_new = tokens_BT.shape
        offsets_BT = torch.arange(num_new, device=self.device).expand(num_rows, num_new)
        seen_BTT = None if num_new == 1 else (offsets_BT[:, :, None] >= offsets_BT[:, None]).contiguous()
        return self._inputs(0, tokens_BT, offsets_BT, seen_BTT)

    def _forward_layers(
        self,
        layers: Layers,
        tokens_BT: Tensor,
        offsets_BT: Tensor,
        seen_BTK: Tensor | None,
        hidden: Sequence[Tensor] = (),
    ) -> Forwarded:
        """Append T slots to the tail of some layers.

        Args:
            hidden: the states [B, T, C] before them, if there are layers before them.
        """
        return self._run_layers(layers, self._inputs(self._tail_of(layers), tokens_BT, offsets_BT, seen_BTK), hidden)

    def _run_layers(self, layers: Layers, inputs: dict[str, Any], hidden: Sequence[Tensor]) -> Forwarded:
        view = self._whole() if layers == ALL_LAYERS else self.views.some(layers, self._kept)
        for hidden_BTC in hidden:
            view.set_input_states(hidden_BTC)
        outputs = self._run(view, inputs)
        return outputs.logits if layers.stop is None else None, self._at_home(view.states)

    def _tail_of(self, layers: Layers) -> int:
        """How much of a tail some layers hold."""
        if layers == ALL_LAYERS:
            return self.cache.tail
        return min((layer.tail for layer in self.cache.stored_in(*layers)), default=0)

    def visible_slots(self, row: int) -> Tensor:
        """int64 [S] the committed slots of a row that are no padding, in order."""
        slots_S = torch.arange(self.cache.lengths[row], device=self.device)
        if self._prompt_BP is None:
            return slots_S
        prompt_P = self._prompt_BP[row, : len(slots_S)]
        return torch.cat([prompt_P.nonzero()[:, 0], slots_S[len(prompt_P) :]])

    @property
    def next_positions_AB(self) -> Tensor:
        """int64 positions of every row's next token."""
        return self.cache.lengths_on(self.device) - self._lag_AB

    @property
    def next_positions_B(self) -> Tensor:
        """int64 position of every row's next token; past an image that of its rotation."""
        return self.next_positions_AB[-1]

    def _at_home(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """The states of layers on several devices, on one."""
        return {depth: states_BTC.to(self.device) for depth, states_BTC in states.items()}

    def _whole(self) -> View:
        return self.views.whole(self._kept) if self._kept else self._bare

    @cached_property
    def _bare(self) -> View:
        """The whole model, nothing kept."""
        return self.views.whole() if self._is_fused else View(self._runs)

    @cached_property
    def _body(self) -> View:
        """What reads tokens whose logits nobody wants."""
        return self.views.body() if self._is_fused else self._bare

    @cached_property
    def _is_fused(self) -> bool:
        try:
            return prepared(self.model) is not None and self.views.uses_fused_layers
        except UnsupportedModelError:  # there are no layers to be found, and none are needed
            return False

    def _call(self, view: View, num_tail: int, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Any:
        """Forward new slots where the running layers already hold a tail of `num_tail`."""
        return self._run(view, self._inputs(num_tail, tokens_BT, offsets_BT, seen_BTK))

    def _run(self, view: View, inputs: dict[str, Any], *, num_logits: int = 0) -> Any:
        """
        Args:
            num_logits: of the last slots, at least; 0 for all.
        """
        fewer = {"logits_to_keep": num_logits} if num_logits and self.model._supports_logits_to_keep() else {}
        return view.run(**inputs, **fewer)

    def _inputs(self, num_tail: int, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> dict[str, Any]:
        if self.cache.states is not None:
            self.cache.states.begin_step(seen_BTK, tokens_BT.shape[1])
        self._offsets_BS = torch.cat([self._offsets_BS, offsets_BT], 1) if num_tail else offsets_BT
        positions_ABT = self.next_positions_AB.unsqueeze(2) + offsets_BT
        return {
            "input_ids": tokens_BT,
            "attention_mask": self._mask(seen_BTK, offsets_BT),
            "position_ids": positions_ABT if len(positions_ABT) > 1 else positions_ABT[0],
            self._cache_name: self.cache,
            "use_cache": True,
        }

    def _start_masks(self, attention_mask: Tensor | None, next_AB: Tensor | None) -> None:
        self._prompt_BP = None if attention_mask is None else attention_mask.to(self.device, torch.bool)
        lengths_B = self.cache.lengths_on(self.device)
        self._lag_AB = torch.zeros_like(lengths_B[None]) if next_AB is None else lengths_B - next_AB.to(self.device)

    def _mask(self, seen_BTK: Tensor | None, offsets_BT: Tensor) -> Any:
        """The 4-D mask of a forward, one for each kind of layer if they differ; None where every slot is visible."""
        if seen_BTK is None and self._sees_all and self._prompt_BP is None:
            lengths = self.cache.lengths
            if min(lengths) == max(lengths):
                return None
        by_name = masks.by_kind(
            [kind for kind in self.kinds if kind is not None],
            seen_BTK,
            offsets_BT,
            self._offsets_BS,
            self.cache.lengths,
            self._prompt_BP,
        )
        made = {id(mask): self._as_model_takes(mask) for mask in by_name.values()}
        if len(made) <= 1:
            return next(iter(made.values()), None)
        named = {name: made[id(mask)] for name, mask in by_name.items()}
        return masks.with_states(named) if self.keeps_states else named

    def _as_model_takes(self, visible_BTS: Tensor) -> Tensor:
        """[B, 1, T, S]"""
        mask_B1TS = visible_BTS.unsqueeze(1)
        return masks.additive(mask_B1TS, self.model.dtype) if self._additive else mask_B1TS
