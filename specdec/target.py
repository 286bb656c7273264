"""A Hugging Face causal LM that forwards token trees: prefill, then speculative forwards, then commit or rollback.

The target is one; so is a small draft model. Masks are built once a forward and handed to the model as they are
(4-D); positions follow the depth in the tree. `docs/structures.md` walks a round through the modules.

Shape legend: B rows, P prompt, T new slots, K tail slots (old and new), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from specdec import masks
from specdec.cache import TreeCache, sliding_windows
from trees import TreeBatch


def home_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; the CPU for one that accelerate has offloaded (its hooks move them on)."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


class TreeModel:
    """A causal LM with its cache and masks, for the length of one run.

    Args:
        model: a decoder-only model that has passed `compatibility.check_model`.
    """

    cache: TreeCache
    _prompt_BP: Tensor | None
    """bool: which prompt slots are no padding; None if all are."""
    _lag_B: Tensor
    """How far positions lag behind slots."""
    _offsets_BK: Tensor
    """Offsets of the tail's slots."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self._windows = sliding_windows(config)
        self._additive = config._attn_implementation == "eager"
        self.vocab_size: int = config.vocab_size
        self.device = home_device(model)
        self.num_forwards = 0

    def prefill(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        generation_config: GenerationConfig | None = None,
        capacity: int = 0,
        **model_inputs: Any,
    ) -> Tensor:
        """Read the prompt the way `model.generate()` does and commit it.

        Args:
            input_ids: int64 [B, P].
            attention_mask: [B, P] (with a cache: [B, past + P]), None if nothing is masked.
            past_key_values: states of earlier tokens; copied, never written to.
            capacity: expected number of slots of the run, to allocate once.

        Returns:
            The logits after the last token, [B, 1, V].
        """
        config = generation_config or GenerationConfig()
        if attention_mask is None and not hasattr(config, "_mask_length"):
            config._mask_length = input_ids.shape[1]
        num_rows = input_ids.shape[0]
        past = past_key_values if past_key_values is not None else DynamicCache()
        self.cache = TreeCache.adopt(past, len(self._windows), num_rows, capacity)
        if attention_mask is not None and "position_ids" not in model_inputs:
            model_inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if self.model._supports_logits_to_keep():
            model_inputs["logits_to_keep"] = 1
        cached = {"attention_mask": attention_mask, "past_key_values": self.cache, "use_cache": True}
        # transformers' own prefill: chunking, inputs_embeds and caches behave there as they always do
        outputs = self.model._prefill(input_ids, config, {**model_inputs, **cached})
        self.num_forwards += 1
        self.cache.commit([range(self.cache.tail)] * num_rows)
        self._start_masks(attention_mask, model_inputs.get("position_ids"))
        return outputs.logits[:, -1:]

    def _start_masks(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        self._prompt_BP = None if attention_mask is None else attention_mask.to(self.device, torch.bool)
        lengths_B = torch.tensor(self.cache.lengths, device=self.device)
        if position_ids is None:
            self._lag_B = torch.zeros_like(lengths_B)
        else:
            self._lag_B = lengths_B - (position_ids[:, -1].to(self.device) + 1)

    def verify(self, trees: TreeBatch, roots_B1: Tensor) -> Tensor:
        """Forward the root and the nodes of every tree; they become the tail, the root its first slot.

        Args:
            roots_B1: int64 the last committed token of each row.

        Returns:
            Logits after every slot, [B, 1 + N, V], in the model's dtype.
        """
        tokens_BT = torch.cat([roots_B1, trees.tokens_BN], 1)
        return self.forward(tokens_BT, trees.depths_BT, trees.ancestors_BTT if trees.width else None)

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        """Append T slots to the tail.

        Args:
            tokens_BT: int64.
            offsets_BT: int64 distance of each token from its row's first uncommitted position.
            seen_BTK: bool: which tail slots, old and new, each token sees. None says that T is 1 and the token
                sees the whole tail.

        Returns:
            Logits after every new slot, [B, T, V], in the model's dtype.
        """
        lengths_B = torch.tensor(self.cache.lengths, device=self.device)
        self._note_offsets(offsets_BT)
        outputs = self.model(
            input_ids=tokens_BT,
            attention_mask=self._mask(seen_BTK, offsets_BT),
            position_ids=(lengths_B - self._lag_B).unsqueeze(1) + offsets_BT,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.num_forwards += 1
        return outputs.logits

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these tail slots of each row (see `TreeCache.commit`)."""
        self.cache.commit(kept)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.cache.select_rows(rows)
        self._lag_B = self._lag_B[list(rows)]
        if self._prompt_BP is not None:
            self._prompt_BP = self._prompt_BP[list(rows)]

    def _note_offsets(self, offsets_BT: Tensor) -> None:
        continued = self.cache.tail > 0
        self._offsets_BK = torch.cat([self._offsets_BK, offsets_BT], 1) if continued else offsets_BT

    def _mask(self, seen_BTK: Tensor | None, offsets_BT: Tensor) -> Any:
        """The 4-D mask of a forward, one for each kind of layer; None where every slot is visible."""
        lengths = self.cache.lengths
        num_tail = self.cache.tail + offsets_BT.shape[1]
        num_slots = max(lengths) + num_tail
        windows = {w if w is not None and w < num_slots else None for w in self._windows}
        if seen_BTK is None:
            if windows == {None} and self.cache.is_uniform and self._prompt_BP is None:
                return None
            seen_BTK = offsets_BT.new_ones((len(lengths), 1, num_tail), dtype=torch.bool)
        visible_BTS = masks.visible_slots(seen_BTK, lengths, self._prompt_BP)
        by_window = {}
        for window in windows:
            mask_BTS = visible_BTS
            if window is not None:
                mask_BTS = visible_BTS & masks.within_window(window, offsets_BT, self._offsets_BK, lengths)
            mask_B1TS = mask_BTS.unsqueeze(1)
            by_window[window] = masks.additive(mask_B1TS, self.model.dtype) if self._additive else mask_B1TS
        if len(by_window) == 1:
            return by_window.popitem()[1]
        (window,) = windows - {None}
        return {"full_attention": by_window[None], "sliding_attention": by_window[window]}
